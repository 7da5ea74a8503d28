"""How far a run is, for the person who watches: a bar on a terminal, plain lines in a job's log."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from raydream.report.terminal import LastingStream

_MARKS_PERCENT = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
_WARM_UP_STEPS = 3  # caches, just-in-time kernels and lazy imports: not how the rest will go
_HALF_LIFE_STEPS = 20


def seconds_per_step(durations_s: Sequence[float]) -> float | None:
    """How long a next step should take, by those after the warm-up, the latest above all; None where none is known."""
    recent = durations_s[max(_WARM_UP_STEPS, len(durations_s) - 10 * _HALF_LIFE_STEPS) :]
    if not recent:
        return None
    weights = [0.5 ** (age / _HALF_LIFE_STEPS) for age in range(len(recent) - 1, -1, -1)]
    return sum(w * d for w, d in zip(weights, recent)) / sum(weights)


def last_mark(num_done: int, total: int) -> int:
    """The greatest of 0, 1, 5, 10, 20 .. 100 percent that ``num_done`` of ``total`` steps reach."""
    return max(mark for mark in _MARKS_PERCENT if 100 * num_done >= mark * total)


def format_duration(seconds: float) -> str:
    """``42 s``, ``5 min 07 s`` or ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


class Progress:
    """Fed by the driver once a step; use as a context manager.

    ``start_step`` is where a resumed run goes on. Where the console is no terminal a line is written at 0, 1, 5, 10, 20
    .. 100 % and where ``interval_s`` passed without one.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert 0 <= start_step <= total_steps
        assert total_steps > 0
        self.total_steps = total_steps
        self.num_done = start_step
        self.interval_s = interval_s
        self.clock = clock
        self.console = Console(file=LastingStream(sys.stderr)) if console is None else console  # type: ignore[arg-type]
        self.durations_s: list[float] = []
        self.last_step_s: float | None = None
        self.last_line_s = clock()
        self.mark = last_mark(start_step, total_steps) if start_step else -1
        self.bar = _bar(self.console)
        self.task = self.bar.add_task("", total=total_steps, completed=start_step, words="") if self.bar else None

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def phase(self, message: str) -> None:
        """Says what the run is at: "starting 8 particles", "exporting". Its time does not count as a step's."""
        self.last_step_s = None
        self.last_line_s = self.clock()
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=escape(message))
        else:
            print(message, file=self.console.file, flush=True)

    def update(self, step: int, stats: Mapping[str, float | int]) -> None:
        """Step ``step`` (from 0) is done; ``stats`` are shown in their order, such as the loss of each branch."""
        now = self.clock()
        if self.last_step_s is not None:
            self.durations_s.append(now - self.last_step_s)
        self.last_step_s = now
        self.num_done = step + 1
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=self.num_done, words=escape(self._words(stats)))
            return
        mark = last_mark(self.num_done, self.total_steps)
        if mark > self.mark or now - self.last_line_s >= self.interval_s:
            self.mark, self.last_line_s = mark, now
            percent = 100 * self.num_done // self.total_steps
            line = f"step {self.num_done}/{self.total_steps}  {percent} %  {self._words(stats)}"
            print(line, file=self.console.file, flush=True)

    def _words(self, stats: Mapping[str, float | int]) -> str:
        words = []
        step_s = seconds_per_step(self.durations_s)
        if step_s:
            speed = f"{1 / step_s:.2f} steps/s" if step_s < 1 else f"{step_s:.1f} s/step"
            remaining = format_duration(step_s * (self.total_steps - self.num_done))
            words = [speed, "done" if self.num_done == self.total_steps else f"{remaining} left"]
        return "  ".join(words + [f"{name} {value:.4g}" for name, value in stats.items()])


def _bar(console: Console) -> RichProgress | None:
    """Asked of the file itself: colours may be forced for a log, a bar that redraws itself must not be."""
    if not console.file.isatty() or console.is_dumb_terminal:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
    words = TextColumn("{task.fields[words]}")
    return RichProgress(*columns, words, console=console, expand=True, refresh_per_second=4)
