"""The seam between CPU and CUDA: one place that decides whose kernels compute a scene."""

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch

from raydream.types import Backend

BACKENDS = ("auto", "reference", "numba", "cuda")


def load_backend(name: str, device: str) -> Backend:
    """The kernels called ``name`` (one of ``BACKENDS``) for tensors on ``device``, a torch device string.

    ``auto`` is cuda on a CUDA device; elsewhere numba where it is installed, else the plain torch reference.
    Raises ValueError naming ``backend`` where the name is unknown or this machine cannot run it.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown name {name!r}; choose one of {', '.join(BACKENDS)}")
    on_cuda = torch.device(device).type == "cuda"
    if name == "auto":
        name = _choose(on_cuda)
    match name:
        case "numba":
            if on_cuda:
                raise ValueError(f"backend: numba runs on the CPU, not on {device}; use auto, cuda or reference")
            if find_spec("numba") is None:
                raise ValueError("backend: numba is not installed; pip install numba, or use reference")
            from raydream.backend.cpu import NumbaBackend

            return NumbaBackend()
        case "cuda":
            if not on_cuda or not torch.cuda.is_available():
                raise ValueError(
                    f"backend: cuda needs a CUDA device, which {device!r} is not here; use numba or reference"
                )
            if find_spec("triton") is None:
                raise ValueError(
                    "backend: cuda needs triton, which is not installed; pip install triton, or use reference"
                )
            from raydream.backend.cuda import CudaBackend

            return CudaBackend()
        case _:
            from raydream.backend.reference import ReferenceBackend

            return ReferenceBackend()


@lru_cache
def _choose(on_cuda: bool) -> str:
    """What ``auto`` stands for here; cached, so that the choice is logged once in a process."""
    if on_cuda:
        name = "cuda" if find_spec("triton") else "reference"
    else:
        name = "numba" if find_spec("numba") else "reference"
    logging.getLogger(__name__).info("backend: auto chose %s", name)
    return name
