"""Turns on a GPU that processes share: where its memory holds one call's graph, the calls come one after the other."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def turn_on_gpu() -> Iterator[None]:
    """Waits until no other process of this user and node is within such a block on the GPUs that this one sees.

    The lock is the kernel's, on an open file: it ends with the process, however that ends. Memory that is not in use is
    given back to the others before it.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    path = Path(tempfile.gettempdir()) / f"raydream-{os.getuid()}-gpu-{seen.replace('/', '-')}.lock"
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        torch.cuda.empty_cache()
        os.close(held)
