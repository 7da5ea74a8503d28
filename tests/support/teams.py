"""Several workers of one team, as forked processes over gloo."""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as distributed

from raydream.train.team import Team


def together(size: int, store: Path, work: Callable[[Team], object]) -> None:
    """Runs ``work`` in ``size`` workers, which meet by the file ``store``; it returns True where all is well."""
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue = context.Queue()
    workers = [context.Process(target=_worker, args=(r, size, store, work, results)) for r in range(size)]
    for worker in workers:
        worker.start()
    try:
        answers = [results.get(timeout=500) for _ in workers]
    finally:
        for worker in workers:
            worker.join(timeout=5)
            worker.kill()
    assert all(answer is True for _, answer in answers), "\n".join(str(answer) for _, answer in answers)


def _worker(rank: int, size: int, store: Path, work: Callable[[Team], object], results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        results.put((rank, work(Team(rank, size))))
        distributed.destroy_process_group()
    except Exception:  # told to the test; the other workers would wait for this one
        results.put((rank, traceback.format_exc()))
