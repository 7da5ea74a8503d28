"""Makes the next step's batch while the current one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

BatchT = TypeVar("BatchT")


class Prefetch(Generic[BatchT]):
    """``get(step)`` answers ``make(step)``, which a second thread has usually begun one step earlier.

    ``make`` must depend on the step alone: then what is trained does not depend on the thread. An error in it is
    raised by ``get`` of its step. A context manager: the thread ends with the block.
    """

    def __init__(self, make: Callable[[int], BatchT]) -> None:
        self._make = make
        # PyTorch's number of threads belongs to each thread: without this the second one would take all cores
        self._worker = ThreadPoolExecutor(1, "prefetch", torch.set_num_threads, (torch.get_num_threads(),))
        self._step = -1
        self._ahead: Future[BatchT] | None = None

    def get(self, step: int) -> BatchT:
        """The batch of a step; the next one is begun."""
        future = (
            self._ahead if self._ahead is not None and self._step == step else self._worker.submit(self._make, step)
        )
        batch = future.result()
        self._step, self._ahead = step + 1, self._worker.submit(self._make, step + 1)
        return batch

    def __enter__(self) -> "Prefetch[BatchT]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
