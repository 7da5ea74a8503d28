"""Workers of one training on Ray Train: its processes, their surroundings, what happens when one is lost."""

from collections.abc import Callable, Mapping

import ray
from ray.data import Dataset
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raydream.connection import connect

# A training thread of Ray's has a heap of its own, which returns its memory in every step and takes it page by page in
# the next: one heap for all threads, that keeps up to 2 GiB.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30),
}
_MAX_FAILURES = 3


def run_workers(
    work: Callable[[], None], out: str, num_workers: int, on_gpu: bool, datasets: Mapping[str, Dataset] | None = None
) -> None:
    """Runs ``work`` to its end in every worker; ``out``, which all of them reach, also takes Ray Train's own files.

    ``work`` goes on from what it finds in ``out``: after a failure all workers begin it again, three times at most.
    """
    connect()
    trainer = TorchTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=on_gpu),
        datasets=dict(datasets) if datasets else None,
        run_config=RunConfig(  # type: ignore[call-arg]  # its types are those of an older class
            name="ray",
            storage_path=out,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            worker_runtime_env={"env_vars": _ENVIRONMENT},
        ),
    )
    trainer.fit()
    ray.shutdown()
