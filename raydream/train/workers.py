"""Workers of one training on Ray Train: its processes, their surroundings, what happens when one is lost."""

import functools
import logging
from collections.abc import Callable, Mapping

import ray
from ray.data import Dataset
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from raydream.cluster.connection import connect

# A training thread of Ray's has a heap of its own, which returns its memory in every step and takes it page by page in
# the next: one heap for all threads, that keeps up to 2 GiB.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30),
}
_MAX_FAILURES = 3


class _BadInput(UserCallback):
    """Ends a training at once for a ValueError, what is wrong with its input: it would be wrong again."""

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called by Ray Train in its controller's process; what it raises is not tried again."""
        for error in worker_exceptions.values():
            cause = getattr(error, "_base_exc", error)  # Ray wraps it to bring its traceback along
            if isinstance(cause, ValueError):
                _quiet_console()
                raise ValueError(str(cause))


def _told_once(_settings: Mapping[str, object] | None = None, *, work: Callable[[], None]) -> None:
    try:
        work()
    except ValueError:
        _quiet_console()
        raise


def _quiet_console() -> None:
    """The driver tells what is wrong, in a line; the traceback goes into Ray Train's log files alone."""
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL + 1)


def run_workers(
    work: Callable[[], None], out: str, num_workers: int, on_gpu: bool, datasets: Mapping[str, Dataset] | None = None
) -> None:
    """Runs ``work`` to its end in every worker; ``out``, which all of them reach, also takes Ray Train's own files.

    ``work`` goes on from what it finds in ``out``: after a failure all workers begin it again, three times at most; a
    ValueError in a worker, which would come again, is raised at once.
    """
    connect()
    trainer = TorchTrainer(
        functools.partial(_told_once, work=work),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=on_gpu),
        datasets=dict(datasets) if datasets else None,
        run_config=RunConfig(  # type: ignore[call-arg]  # its types are those of an older class
            name="ray",
            storage_path=out,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            worker_runtime_env={"env_vars": _ENVIRONMENT},
            callbacks=[_BadInput()],  # type: ignore[list-item]
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, ValueError):
            raise ValueError(str(error.controller_failure)) from error
        raise
    finally:
        ray.shutdown()
