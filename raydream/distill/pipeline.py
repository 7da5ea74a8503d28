"""A whole run: set the actors up, train, export every particle, write the report."""

import importlib.metadata
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from raydream import __version__
from raydream.cluster.runtime import Runtime, Withdrawn
from raydream.config.run import RunConfig, cluster_config
from raydream.distill.loop import PREVIEW_AZIMUTHS_DEG, PREVIEW_ELEVATION_DEG, Observer, RunFailed, RunLoop
from raydream.report.page import ReportFacts, write_report
from raydream.store.run_folder import VERSIONS, RunFolder, Scalar

_PACKAGES = ("torch", "ray", "diffusers", "peft", "transformers", "numba", "numpy", "pyarrow", "trimesh", "xatlas")


def run_pipeline(
    config: RunConfig,
    run: RunFolder,
    make_runtime: Callable[[], Runtime],
    observer: Observer,
    stop: threading.Event,
) -> int:
    """Runs or resumes what the folder holds and returns the step that was reached.

    Where ``stop`` is set on the way, the run ends at a checkpoint without exports. Raises ``RunFailed`` where an
    actor cannot be brought back or the run folder cannot be written; everything up to the last checkpoint stays. A run
    whose steps are all done is exported again.
    """
    try:
        return _run(config, run, make_runtime, observer, stop)
    except OSError as error:
        raise RunFailed(f"the run folder {run.uri} cannot be used: {error}") from error
    finally:
        with suppress(OSError):  # nobody writes any more, and what is half written may be what fills the disk
            run.drop_unfinished_checkpoints()


def _run(
    config: RunConfig,
    run: RunFolder,
    make_runtime: Callable[[], Runtime],
    observer: Observer,
    stop: threading.Event,
) -> int:
    phases: dict[str, float] = {}
    run.drop_unfinished_checkpoints()
    run.write_text(VERSIONS, json.dumps(versions(), indent=1))
    checkpoint = run.latest_checkpoint()
    start = checkpoint.step if checkpoint else 0
    run.truncate_metrics(start)
    num_steps = config.num_steps
    with _timed(phases, "start"):
        observer.phase(f"starting {config.n} particles and {config.cluster.score_replicas} score model(s)")
        try:
            runtime = make_runtime()
        except Withdrawn:
            return start
    try:
        loop = RunLoop(runtime, run, config, observer)
        with _timed(phases, "set up"):
            observer.phase("loading the prior and the scenes")
            loop.start(start)
        if start == 0:
            where = (list(PREVIEW_AZIMUTHS_DEG), PREVIEW_ELEVATION_DEG, config.output.preview_px)
            observer.preview(0, loop.everywhere(0, "look_at", lambda actor: where))
        if start < num_steps:
            observer.phase(_going_on(config, start) if start else f"{config.method} for {num_steps} steps")
        with _timed(phases, "distil"):
            reached = loop.train(start, stop)
        if reached < num_steps:
            return reached
        observer.phase("exporting meshes, films and pictures")
        with _timed(phases, "export"):
            particles = loop.everywhere(reached, "export", lambda actor: (run.uri,))
    finally:
        runtime.close()
    write_report(run, report_facts(config, run, phases, particles))
    for index, stats in enumerate(particles):
        if stats.get("note"):
            observer.phase(f"particle {index}: {stats['note']}")
    observer.phase(f"done: {run.uri}/report.html")
    return reached


def _going_on(config: RunConfig, start: int) -> str:
    """On a GPU the order of sums is anybody's, unless the settings want one."""
    cluster = cluster_config(config)
    loose = cluster.gpus_per_particle != 0 and not cluster.deterministic
    how = " (on GPUs to rounding; cluster.deterministic=true keeps our kernels' bits and costs time)" if loose else ""
    return f"going on from step {start}{how}"


def versions() -> dict[str, str]:
    """What the run was made with, for the run folder."""
    found = {"raydream": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def report_facts(
    config: RunConfig, run: RunFolder, phases: dict[str, float], particles: list[dict[str, Scalar]]
) -> ReportFacts:
    """The figures of the report that are in no file of the run folder."""
    rows = run.read_metrics()

    def mean(name: str) -> float:
        values = [value for row in rows if isinstance(value := row.get(name), float)]
        return sum(values) / len(values) if values else 0.0

    parts = {
        "render (all particles)": mean("time/render_s"),
        "apply (all particles)": mean("time/apply_s"),
        "guide": mean("time/guide_s"),
        "fit": mean("time/fit_s"),
    }
    summary = {
        "preset": config.preset,
        "method": config.method,
        "particles": str(config.n),
        "steps": str(config.num_steps),
        "one step": f"{mean('time/step_s'):.2f} s",
        "seed": str(config.seed),
    }
    machine = {"system": platform.platform(), "processor": platform.machine(), "cores": str(os.cpu_count())}
    return ReportFacts(config.prompt, summary, phases, parts, machine, particles)


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        phases[name] = time.monotonic() - started
