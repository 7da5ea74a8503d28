"""A run from Python: what the command line, the service and notebooks share."""

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING

from raydream.config import strict_json
from raydream.config.cluster import GPU_ALLOCATOR
from raydream.config.kernels import need_cuda
from raydream.config.run import PREVIOUS, RunConfig, cluster_config
from raydream.store.run_folder import RunFolder

if TYPE_CHECKING:
    from raydream.cluster.gpus import Need
    from raydream.cluster.runtime import Runtime
    from raydream.config.cluster import Budget
    from raydream.distill.loop import Observer
    from raydream.distill.watch import RunWatch
    from raydream.report.progress import Progress

MakeRuntime = Callable[["Observer"], "Runtime"]


def generate(config: RunConfig, out: str, stop: threading.Event | None = None) -> RunFolder:
    """Makes the assets that ``config`` asks for in the run folder ``out``, a new path or URI, or goes on with the run
    that is there, whose settings must be the same. Once ``stop`` is set it ends at a checkpoint.

    Raises ``ValueError`` naming the field for what cannot be, before anything heavy loads, and ``RunFailed`` where the
    run cannot go on; what was made until then stays, and the same call goes on from its last checkpoint.
    """
    config, stop = check_run(config), stop or threading.Event()
    with ExitStack() as stack:
        run = _open(config, out)
        stack.callback(run.close)
        stack.enter_context(run.lock())
        advance(config, run, lambda observer: make_runtime(config, observer.phase, stop), stop)
    return run


def check_run(config: RunConfig) -> RunConfig:
    """The run with whatever its priors take from elsewhere named outright; ``ValueError`` naming the field for what
    cannot be had or does not fit together.
    """
    if "usdz" in config.output.mesh_formats and find_spec("pxr") is None:
        raise ValueError("output.mesh_formats: usdz needs usd-core; pip install 'raydream[usd]', or leave it out")
    for name, value in GPU_ALLOCATOR.items():
        os.environ.setdefault(name, value)  # for particles in this process
    if config.cluster.runtime == "local" and need_cuda(config.cluster.kernels):  # Ray may have it elsewhere
        from raydream.backend import load_backend
        from raydream.device import own_device

        load_backend(config.cluster.kernels, own_device().type)
    from raydream.priors.geometric import check_priors  # torch only for what is to be run

    for start in {stage.start for stage in config.stages} - {"", PREVIOUS}:
        from raydream.distill.loop import other_run

        other_run(start, config.n)
    return check_priors(config)


def advance(
    config: RunConfig,
    run: RunFolder,
    runtime_for: MakeRuntime,
    stop: threading.Event,
    watched_by: "Callable[[RunWatch, Progress], Observer] | None" = None,
) -> int:
    """Takes the run in an open, locked folder to its end, or to a checkpoint once ``stop`` is set, and returns the step
    that was reached. Progress goes to the terminal and TensorBoard, and by way of ``watched_by`` to whoever else asks.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from raydream.distill.pipeline import run_pipeline
    from raydream.distill.watch import RunWatch
    from raydream.report.progress import Progress
    from raydream.report.tensorboard import TensorboardLog

    checkpoint = run.latest_checkpoint()
    start = checkpoint.step if checkpoint else 0
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config.num_steps, start))
        watch = RunWatch(run, progress, TensorboardLog(run, start), config.n)
        stack.callback(watch.close)
        observer: Observer = watched_by(watch, progress) if watched_by else watch
        return run_pipeline(config, run, lambda: runtime_for(observer), observer, stop)


def make_runtime(
    config: RunConfig,
    on_phase: Callable[[str], None],
    stop: threading.Event | None = None,
    on_connected: Callable[[], None] = lambda: None,
) -> "Runtime":
    """The runtime that the settings ask for; ``RunFailed`` where the cluster is away or cannot hold the run."""
    from raydream.cluster.runtime import LocalRuntime
    from raydream.distill.loop import RunFailed

    if config.cluster.runtime == "local":
        try:
            return LocalRuntime(_own_budget(config, on_phase))
        except ValueError as error:
            raise RunFailed(str(error)) from error
    from raydream.cluster.connection import connect
    from raydream.cluster.ray_runtime import RayRuntime

    try:
        connect()
        on_connected()
        return RayRuntime(
            cluster_config(config), config.n, on_phase=on_phase, stop=stop, find_needs=lambda: memory_needs(config)
        )
    except ValueError as error:
        raise RunFailed(str(error)) from error


def memory_needs(config: RunConfig) -> "list[Need]":
    """What a run's actors take on GPUs under each budget, as far as it can be told here: the prior may be on the
    workers only.
    """
    from raydream.cluster.gpus import Load, Need
    from raydream.distill.costs import run_costs

    try:
        costs = run_costs(config)
    except ValueError:
        return []
    return [
        Need(budget, *(Load.of(cost.held_bytes, cost.peak_bytes) for cost in actors))
        for budget, actors in costs.items()
    ]


def _own_budget(config: RunConfig, on_phase: Callable[[str], None]) -> "Budget | None":
    """What this process's GPU asks for, by the memory that is free there now: decided anew when a run goes on, since
    that may be elsewhere; on the same machine it is the same again, and on a CPU there is nothing to decide.
    """
    from raydream.cluster.gpus import plan_on_own_gpu
    from raydream.device import free_bytes, own_device

    free = free_bytes(own_device())
    needs = memory_needs(config) if free is not None else []
    if free is None or not needs:
        return None
    words, budget = plan_on_own_gpu(config.n, config.cluster.score_replicas, needs, free / 2**30)
    on_phase(words)
    return budget


def _open(config: RunConfig, out: str) -> RunFolder:
    try:
        run = RunFolder.open(out)
    except ValueError:
        return RunFolder.create(out, strict_json.dumps(config))
    if strict_json.loads(RunConfig, run.read_config()) != config:
        run.close()
        raise ValueError(f"out: {out!r} holds a run with other settings; name a new folder")
    return run
