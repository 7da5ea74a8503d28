"""Makes the next step's batch while the current one trains."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

BatchT = TypeVar("BatchT")


@contextmanager
def prefetched(make: Callable[[int], BatchT]) -> Iterator[Callable[[int], BatchT]]:
    """Within the block, a function that answers ``make(step)``, which a second thread has usually begun a step earlier.

    ``make`` must depend on the step alone: then what is trained does not depend on the thread. An error in it is
    raised in its own step.
    """
    ahead: dict[int, Future[BatchT]] = {}

    def get(step: int) -> BatchT:
        batch = (ahead.pop(step, None) or worker.submit(make, step)).result()
        ahead.clear()
        ahead[step + 1] = worker.submit(make, step + 1)
        return batch

    # PyTorch's number of threads belongs to each thread: without this the second one would take all cores
    with ThreadPoolExecutor(1, "prefetch", torch.set_num_threads, (torch.get_num_threads(),)) as worker:
        yield get
