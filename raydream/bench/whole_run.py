"""What a step of a whole run costs, and how much of it is not rendering, score or optimiser.

Two measures, since one of them alone can be fooled. Both look at a window of steps in the middle of a run, with the
loop's look-ahead the same at both of its ends.

*CPU*: seconds that the driver and all its descendants (Ray's daemons, every actor) took from the cores, minus those
that the metrics' ``cpu/*_s`` give to render, apply, guide and fit. Other programs on the machine hardly disturb it.

*Wall*: the part of the window in which no actor was inside render, apply, guide or fit: everybody waited for the
driver, Ray or a transfer. It holds on a machine without other work; ``others`` says how much of that there was.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import psutil

from raydream.bench.figures import COUNTED, RunCost
from raydream.cluster.runtime import Actor, Reference, Runtime
from raydream.config import strict_json
from raydream.config.presets import exhibit
from raydream.config.run import RunConfig
from raydream.distill.loop import Row, RunLoop
from raydream.runs import check_run, make_runtime
from raydream.store.run_folder import RunFolder

WORK = frozenset({"render", "apply", "guide", "fit", "fit_gradients", "fit_update"})
_WARM_STEPS = 10
_LOOK_AHEAD = 3  # steps that the loop may have submitted beyond the last row
_NEVER = 10**9
_REPLICAS = (1, 2)

Span = tuple[str, float, float]  # method, start and end by the machine's monotonic clock


def sweep(counts: Sequence[int], num_steps: int, runtime: str, overrides: Sequence[str]) -> list[RunCost]:
    """The cost of a step for each number of particles and 1 and 2 score replicas, in a cluster of its own."""
    os.environ.pop("RAY_ADDRESS", None)  # only descendants of this process can be counted
    costs = []
    for n in counts:
        for replicas in _REPLICAS:
            if replicas <= n:
                print(f"measuring n = {n} with {replicas} score replica(s)", file=sys.stderr)
                costs.append(_measure(_run_config(n, replicas, num_steps, runtime, overrides)))
    return costs


def _run_config(n: int, replicas: int, num_steps: int, runtime: str, overrides: Sequence[str]) -> RunConfig:
    """The default preset at its full size from the first step on, without previews and checkpoints in between."""
    settings = [
        f"n={n}",
        f"cluster.score_replicas={replicas}",
        f"cluster.runtime={runtime}",
        "stages.0.camera.image_px=64",
        "stages.0.learner.warm_up_fits=0",
        f"output.checkpoint_every={_NEVER}",
        f"output.preview_every={_NEVER}",
    ]
    steps = _WARM_STEPS + num_steps + _LOOK_AHEAD + 1
    return check_run(strict_json.apply_overrides(exhibit(steps), [*settings, *overrides]))


def _measure(config: RunConfig) -> RunCost:
    """Runs the stage of ``config`` once and looks at its steps after the first and before the last few."""
    window = Window(_WARM_STEPS, config.num_steps - _LOOK_AHEAD - 1)
    with TemporaryDirectory() as folder:
        run = RunFolder.create(str(Path(folder) / "run"), strict_json.dumps(config))
        runtime = ClockedRuntime(make_runtime(config, window.phase))
        try:
            loop = RunLoop(cast(Runtime, runtime), run, config, window)
            loop.start(0)
            loop.train(0, threading.Event())
            calls = [runtime.call(actor, "spans") for actor in loop.actors]
            spans = [span for spans in runtime.get(calls, 60.0) for span in spans]
        finally:
            runtime.close()
            run.close()
    return window.cost(spans, config)


@dataclass(frozen=True)
class Mark:
    """The clocks at one moment: wall, CPU of this process and its descendants, busy seconds of all cores."""

    wall_s: float
    tree_s: float
    machine_s: float


def mark() -> Mark:
    """Reads the clocks."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return Mark(time.monotonic(), tree_cpu_s(), sum(times[:8]) - idle)


def tree_cpu_s() -> float:
    """CPU seconds of this process and all its descendants; those that ended are in their parents' figures."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass
class Window:
    """An observer of the loop that reads the clocks when the rows of its first and last step come in."""

    first: int
    last: int
    marks: list[Mark] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.first < self.last, "the run is too short to look into its middle"

    def phase(self, message: str) -> None:
        """Not needed."""

    def preview(self, step: int, pictures: list[np.ndarray]) -> None:
        """Not needed."""

    def row(self, step: int, row: Row) -> None:
        """The figures of a finished step."""
        if step in (self.first, self.last):
            self.marks.append(mark())
        if self.first < step <= self.last:
            self.rows.append(row)

    def cost(self, spans: Iterable[Span], config: RunConfig) -> RunCost:
        """The mean step between the two marks."""
        start, end = self.marks
        num_steps, wall_s, tree_s = len(self.rows), end.wall_s - start.wall_s, end.tree_s - start.tree_s
        working = covered_s([(a, b) for method, a, b in spans if method in WORK], start.wall_s, end.wall_s)
        names = [name for name in COUNTED if all(name in row for row in self.rows)]
        return RunCost(
            config.n,
            config.cluster.score_replicas,
            num_steps,
            wall_s / num_steps,
            tree_s / num_steps,
            {name: sum(row[name] for row in self.rows) / num_steps for name in names},
            1 - working / wall_s,
            max(0.0, end.machine_s - start.machine_s - tree_s) / (wall_s * (psutil.cpu_count() or 1)),
        )


def covered_s(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """The length of the union of intervals within ``[start, end]``."""
    total, reached = 0.0, start
    for a, b in sorted(spans):
        low, high = max(a, reached), min(b, end)
        if high > low:
            total += high - low
            reached = high
    return total


class Clocked:
    """Stands before a particle or a score and notes when each of its methods was at work."""

    def __init__(self, factory: Callable[[], object]) -> None:
        self._target, self._spans = factory(), list[Span]()

    def spans(self) -> list[Span]:
        """All calls until now."""
        return self._spans

    def __getattr__(self, method: str) -> Callable[..., Any]:
        call = getattr(self._target, method)

        def clocked(*args: Any) -> Any:
            start = time.monotonic()
            try:
                return call(*args)
            finally:
                self._spans.append((method, start, time.monotonic()))

        return clocked


class ClockedRuntime:
    """A runtime whose actors are ``Clocked``."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def build(self, actor: Actor, factory: Callable[[], object]) -> Reference:
        return self._runtime.build(actor, partial(Clocked, factory))

    def __getattr__(self, method: str) -> Any:
        return getattr(self._runtime, method)
