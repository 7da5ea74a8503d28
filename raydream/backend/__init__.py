"""The seam between CPU and CUDA: one place that decides whose kernels compute a scene."""

import atexit
import logging
import os
import shutil
import tempfile
from functools import lru_cache
from importlib.util import find_spec

import torch

from raydream.types import Backend

BACKENDS = ("auto", "reference", "numba", "cuda")


def load_backend(name: str, device: str, deterministic: bool = False) -> Backend:
    """The kernels called ``name`` (one of ``BACKENDS``) for tensors on ``device``, a torch device string.

    ``auto`` is cuda on a CUDA device; elsewhere numba where it is installed, else the plain torch reference. Numba's
    sums have an order anyway; ``deterministic`` gives those of cuda one, which makes them slower.
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
            find_cache()
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

            return CudaBackend(deterministic)
        case _:
            from raydream.backend.reference import ReferenceBackend

            return ReferenceBackend()


@lru_cache
def find_cache() -> None:
    """Sees to it that numba can keep compiled kernels, before any module with kernels is imported: in a temporary
    folder where neither the code's own, nor the home, nor ``NUMBA_CACHE_DIR`` can be written (a read-only container).

    The folder goes with this process; processes that it starts are told of it, lest each of them compile for itself.
    """
    import numba

    try:
        numba.njit(cache=True)(_kernel)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        folder = tempfile.mkdtemp(prefix="raydream_kernels_")  # for this user alone: what lies there is executed
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
        logging.getLogger(__name__).warning(
            "backend: neither the code nor the home can be written, so kernels are compiled anew for this run; set "
            "NUMBA_CACHE_DIR to a folder to keep them"
        )


def _kernel() -> None:
    """Asks numba where it would keep this; it is never compiled."""


@lru_cache
def _choose(on_cuda: bool) -> str:
    """What ``auto`` stands for here; cached, so that the choice is logged once in a process."""
    if on_cuda:
        name = "cuda" if find_spec("triton") else "reference"
    else:
        name = "numba" if find_spec("numba") else "reference"
    logging.getLogger(__name__).info("backend: auto chose %s", name)
    return name
