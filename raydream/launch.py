"""A request becomes a run: checks that are cheap, then the run folder, the signals, and the pipeline."""

import json
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from raydream import cli
from raydream.config import strict_json
from raydream.config.checks import require
from raydream.config.run import RunConfig, cluster_config
from raydream.report.terminal import say, settle
from raydream.store.run_folder import CONFIG, RunFolder

if TYPE_CHECKING:
    from raydream.cluster.runtime import Runtime

_BAD_INPUT, _FAILED, _STOPPED = 2, 1, 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(description: str, words: Sequence[str] | None = None) -> int:
    """The main job: returns the process's exit code (0 done, 1 failed, 2 bad input, 130 stopped and resumable)."""
    try:
        return _main(description, words)
    except OSError as error:  # a run folder that cannot be written, before the run or at its very end
        say(f"error: {error}")
        return _FAILED
    finally:
        settle()


def _main(description: str, words: Sequence[str] | None) -> int:
    try:
        request = cli.parse(description, words)
        if request.dry_run:
            print(strict_json.dumps(request.config))
            return 0
        config = check_prior(request.config)
        if config.cluster.runtime == "ray":
            from raydream.cluster.connection import check_address  # Ray only for those who want it

            check_address()
        run = (
            RunFolder.open(request.out) if request.resume else RunFolder.create(request.out, strict_json.dumps(config))
        )
        with ExitStack() as stack:
            stack.enter_context(run.lock())
            stack.callback(run.close)
            held = stack.pop_all()
    except ValueError as error:
        say(f"error: {error}")
        return _BAD_INPUT
    with held:
        if request.resume:
            keep_output(config, run)
        return _run(config, run)


def keep_output(config: RunConfig, run: RunFolder) -> None:
    """What a resumed run is to leave behind from now on, in its own settings: the report tells of it, and the next
    resume need not be told again.
    """
    saved, output = json.loads(run.read_config()), strict_json.to_json(config.output)
    if saved.get("output") != output:
        run.write_text(CONFIG, json.dumps(saved | {"output": output}, indent=2, ensure_ascii=False))


def check_prior(config: RunConfig) -> RunConfig:
    """Makes sure that the priors can be found, before anything starts; an exhibit's assets are named in the result."""
    from raydream.diffusion import prompts
    from raydream.priors import find

    geometry, camera = config.stages[0].geometry, config.stages[0].camera
    if geometry.agp != "off":
        folder = find.resolve_agp(geometry.agp)
        agp_prior = find.resolve_agp_prior(geometry.prior, config.prior.source)
        prompts.check_lengths(agp_prior, config.prompt, "")
        find.check_agp_cameras(folder, camera.distance, camera.fov_y_deg)
    if config.prior.kind == "diffusers":
        folder = find.resolve_prior(config.prior.source, config.prior.allow_download)
        find.check_image_px(folder, config.prior.image_px)
        prompts.check_lengths(folder, config.prompt, config.negative_prompt)
        find.check_prompt(folder, config.prompt)
        return config
    from raydream.priors.exhibit_modes import check_prompt

    stage = config.stages[0]
    require(stage.guidance.scale == 1, "scale", "an exhibit's score is exact; guidance scale must be 1")
    require(
        not config.negative_prompt, "negative_prompt", "an exhibit knows the names of its objects only; leave it empty"
    )
    require(not stage.guidance.perp_neg, "perp_neg", "an exhibit has no view words; switch it off")
    return cli.with_assets(config, check_prompt(config.prompt, config.prior.exhibit.assets or None))


def _run(config: RunConfig, run: RunFolder) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from raydream.distill.loop import RunFailed
    from raydream.distill.pipeline import run_pipeline
    from raydream.distill.watch import RunWatch
    from raydream.report.progress import Progress
    from raydream.report.tensorboard import TensorboardLog

    stop, resume = threading.Event(), f"resume with: python jobs/vsd_particles.py --resume {shlex.quote(run.uri)}"
    say(f"run folder: {run.uri}")
    with ExitStack() as stack:
        listen = stack.enter_context(_stopped_by_signals(stop, resume))
        checkpoint = run.latest_checkpoint()
        start = checkpoint.step if checkpoint else 0
        progress = stack.enter_context(Progress(config.stages[0].num_steps, start))
        watch = RunWatch(run, progress, TensorboardLog(run, start), config.n)
        stack.callback(watch.close)
        try:
            reached = run_pipeline(config, run, _runtime_factory(config, listen, watch.phase, stop), watch, stop)
        except RunFailed as failure:
            say(f"error: {failure}\n{resume}")
            return _FAILED
        except (KeyboardInterrupt, SystemExit):  # SystemExit: a SIGTERM while Ray starts
            say(f"left at once\n{resume}")
            return _STOPPED
    if reached < config.stages[0].num_steps:
        say(f"stopped at step {reached}\n{resume}")
        return _STOPPED
    return 0


def _runtime_factory(
    config: RunConfig, listen: Callable[[], None], tell: Callable[[str], None], stop: threading.Event
) -> Callable[[], "Runtime"]:
    from raydream.cluster.runtime import LocalRuntime
    from raydream.distill.loop import RunFailed

    def make() -> "Runtime":
        runtime: "Runtime" = LocalRuntime()
        if config.cluster.runtime == "ray":
            from raydream.cluster.connection import connect
            from raydream.cluster.ray_runtime import RayRuntime

            try:
                connect()
                listen()  # again: Ray takes SIGTERM for itself when it starts
                runtime = RayRuntime(cluster_config(config), config.n, tell=tell, stop=stop)
            except ValueError as error:  # the cluster is away, or cannot hold what the settings ask for
                raise RunFailed(str(error)) from error
        return runtime

    return make


@contextmanager
def _stopped_by_signals(stop: threading.Event, resume: str) -> Iterator[Callable[[], None]]:
    """Until the end of the block a first signal sets ``stop`` and a second one is a ``KeyboardInterrupt``; yields
    what takes the signals back from whoever else took them.
    """

    def handle(_number: int, _frame: object) -> None:
        if stop.is_set():  # the person does not want to wait for the checkpoint
            raise KeyboardInterrupt
        stop.set()
        # how to resume is said at once: a scheduler may not leave us the time to say it at the end
        say(f"stopping after this step; once more to leave without a checkpoint\n{resume}")

    def listen() -> None:
        for number in _SIGNALS:
            signal.signal(number, handle)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
