"""Processes that stay loaded between runs: they are the same ones, and the runs end with the same bits."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from small_runs import assert_same_end, new_run, small_config, train

from raydream.cluster.ray_runtime import ProcessPool, RayRuntime
from raydream.distill.particle import import_particle
from raydream.distill.score import import_score
from raydream.store.run_folder import RunFolder

pytestmark = pytest.mark.ray
STEPS = 4
SETTINGS = ("cluster.cpus_per_particle=0.3", "cluster.cpus_per_score=0.3", "cluster.gpus_per_particle=0")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    """Two particles and a score model, in a cluster with two cores."""
    temporary = tempfile.mkdtemp(prefix="rd-")  # short: paths of sockets have to fit into 107 characters
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 128 * 2**20}
    ray.shutdown()  # whatever tests before these left running in this process
    ray.init(address="local", num_cpus=2, _temp_dir=temporary, **options)
    config = small_config("n=2", *SETTINGS).cluster
    pool = ProcessPool(config, 2, {"particle": import_particle, "score": import_score})
    yield pool
    pool.close()
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


def pid_of(place) -> int:
    return ray.get(place.__ray_call__.options(concurrency_group="ctl").remote(lambda host: os.getpid()))


def pids(pool: ProcessPool) -> dict[tuple[str, int], int]:
    return {key: pid_of(place) for key, place in pool._places.items()}


def run_in(pool: ProcessPool, folder: Path, *settings: str) -> tuple[RunFolder, list[int]]:
    """A run in the pool's processes, and the pids of all that it had."""
    config = small_config(*SETTINGS, *settings, steps=STEPS)
    run, runtime = new_run(folder, config), RayRuntime(config.cluster, config.n, pool)
    try:
        assert train(run, config, runtime) == STEPS
        return run, [pid_of(actor.place) for actor in runtime._started]
    finally:
        runtime.close()


def undisturbed(folder: Path, *settings: str) -> RunFolder:
    config = small_config(*SETTINGS, *settings, steps=STEPS)
    run = new_run(folder, config)
    train(run, config)
    return run


def test_one_run_after_the_other_has_the_same_processes_and_a_clean_start(pool: ProcessPool, tmp_path: Path) -> None:
    before = pids(pool)
    for name, settings in {
        "a": ("n=2",),
        "b": ("n=2", "seed=1"),
        "c": ("n=1", "stages.0.branches.0.method=sds"),
    }.items():
        run, used = run_in(pool, tmp_path / name, *settings)
        assert set(used) <= set(before.values())
        assert_same_end(run, undisturbed(tmp_path / f"{name}-local", *settings))
    assert pids(pool) == before


def test_more_particles_than_places_start_processes_of_their_own(pool: ProcessPool, tmp_path: Path) -> None:
    before = pids(pool)
    run, used = run_in(pool, tmp_path / "run", "n=3")
    assert set(before.values()) < set(used)
    assert_same_end(run, undisturbed(tmp_path / "local", "n=3"))
    assert pids(pool) == before


def test_a_process_that_died_between_two_runs_is_replaced(pool: ProcessPool, tmp_path: Path) -> None:
    before = pids(pool)
    os.kill(before["particle", 1], signal.SIGKILL)
    run, used = run_in(pool, tmp_path / "run", "n=2")
    assert before["particle", 1] not in used
    assert before["score", 0] in used
    assert_same_end(run, undisturbed(tmp_path / "local", "n=2"))
