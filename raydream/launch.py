"""A request becomes a run: checks that are cheap, then the run folder, the signals, and the pipeline."""

import contextlib
import json
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raydream import cli
from raydream.config import strict_json
from raydream.config.run import RunConfig
from raydream.report.terminal import say, settle
from raydream.runs import advance, check_run, make_runtime
from raydream.store.run_folder import CONFIG, RunFolder

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
            _tell_costs(request.config)
            return 0
        config = check_run(request.config)
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


def _tell_costs(config: RunConfig) -> None:
    """What the run's actors would take, beside the settings; an exact score takes nothing worth telling."""
    if config.prior.mixture is not None:
        return
    from raydream.distill.costs import cost_lines

    sys.stdout.flush()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries that are imported may have something to say
            lines = cost_lines(config)
        say("\n".join(lines))
    except ValueError as error:
        say(f"what its actors would take cannot be told: {error}")


def _program() -> str:
    """How a person starts what was started here: with this Python, also where another comes first in the path."""
    if sys.argv[0] == "raydream run":
        return "raydream run"
    found = shutil.which("python")
    mine = found is not None and Path(found).parent == Path(sys.executable).parent
    return f"{'python' if mine else shlex.quote(sys.executable)} jobs/vsd_particles.py"


def keep_output(config: RunConfig, run: RunFolder) -> None:
    """What a resumed run is to leave behind from now on, in its own settings: the report tells of it, and the next
    resume need not be told again.
    """
    saved, output = json.loads(run.read_config()), strict_json.to_json(config.output)
    if saved.get("output") != output:
        run.write_text(CONFIG, json.dumps(saved | {"output": output}, indent=2, ensure_ascii=False))


def _run(config: RunConfig, run: RunFolder) -> int:
    from raydream.distill.loop import RunFailed

    stop, resume = threading.Event(), f"resume with: {_program()} --resume {shlex.quote(run.uri)}"
    say(f"run folder: {run.uri}")
    with _stopped_by_signals(stop, resume) as listen:
        try:
            # Ray takes SIGTERM for itself when it starts, and gives it back by ``listen``
            reached = advance(config, run, lambda watch: make_runtime(config, watch.phase, stop, listen), stop)
        except RunFailed as failure:
            say(f"error: {failure}\n{resume}")
            return _FAILED
        except (KeyboardInterrupt, SystemExit):  # SystemExit: a SIGTERM while Ray starts
            say(f"left at once\n{resume}")
            return _STOPPED
    if reached < config.num_steps:
        say(f"stopped at step {reached}\n{resume}")
        return _STOPPED
    return 0


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
