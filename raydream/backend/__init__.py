"""The seam between CPU and CUDA, and between our kernels and other people's: one place that decides whose kernels
compute a scene.
"""

import atexit
import logging
import os
import shutil
import tempfile
from functools import lru_cache
from importlib.util import find_spec

import torch

from raydream.config.kernels import kernel_packages, need_cuda
from raydream.types import Backend

PACKAGE_COMMANDS = {  # how each is had; all three are compiled against the torch that is there, which takes nvcc
    "tinycudann": "pip install 'setuptools<82' && pip install --no-build-isolation 'raydream[tinycudann]'",
    "nerfacc": "pip install 'raydream[nerfacc]'",
    "nvdiffrast": "pip install --no-build-isolation 'raydream[nvdiffrast]'",
}


def load_backend(name: str, device: str, deterministic: bool = False) -> Backend:
    """The kernels that ``cluster.kernels`` calls ``name``, for tensors on ``device``, a torch device string. Numba's
    sums have an order anyway; ``deterministic`` gives those of cuda one, which makes them slower.

    Raises ValueError naming ``kernels`` where the name is unknown or this machine cannot run it.
    """
    on_cuda = torch.device(device).type == "cuda"
    if name == "auto":
        name = _choose(on_cuda)
    if name == "ours":
        name = "cuda" if on_cuda else "numba"
    packages = kernel_packages(name)
    if need_cuda(name) and not (on_cuda and torch.cuda.is_available()):
        raise ValueError(f"kernels: {name} needs a CUDA device, which {device!r} is not here; use ours or reference")
    if packages:
        backend = load_backend("ours", device, deterministic)
        for package in reversed(packages):  # so that the name of all says what was asked for
            backend = _with_package(package, backend, device)
        return backend
    match name:
        case "numba":
            if on_cuda:
                raise ValueError(f"kernels: numba runs on the CPU, not on {device}; use auto, cuda or reference")
            if find_spec("numba") is None:
                raise ValueError("kernels: numba is not installed; pip install numba, or use reference")
            find_cache()
            from raydream.backend.cpu import NumbaBackend

            return NumbaBackend()
        case "cuda":
            if find_spec("triton") is None:
                raise ValueError(
                    "kernels: cuda needs triton, which is not installed; pip install triton, or use reference"
                )
            from raydream.backend.cuda import CudaBackend

            return CudaBackend(deterministic)
        case _:
            from raydream.backend.reference import ReferenceBackend

            return ReferenceBackend()


def _with_package(package: str, inner: Backend, device: str) -> Backend:
    """``inner`` with what a package replaces of it, once each of its kernels has run: what was built for other cards,
    or cannot be compiled, says so here and not in the middle of a run.
    """
    from raydream.backend.exercise import exercise

    try:
        backend = _wrap(package, inner)
        exercise(backend, device)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise ValueError(
            f"kernels: {package} cannot be used here ({type(error).__name__}: {error}); "
            f"{PACKAGE_COMMANDS[package]}, or use ours"
        ) from error
    return backend


def _wrap(package: str, inner: Backend) -> Backend:
    match package:
        case "tinycudann":
            from raydream.backend.with_tinycudann import WithTinyCudaNn

            return WithTinyCudaNn(inner)
        case "nerfacc":
            from raydream.backend.with_nerfacc import WithNerfacc

            return WithNerfacc(inner)
        case _:
            from raydream.backend.with_nvdiffrast import WithNvdiffrast

            return WithNvdiffrast(inner)


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
            "kernels: neither the code nor the home can be written, so kernels are compiled anew for this run; set "
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
    logging.getLogger(__name__).info("kernels: auto chose %s", name)
    return name
