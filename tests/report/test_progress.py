"""Speed, remaining time and when a line is due; the clock is the test's own."""

import io
import itertools
import re

import pytest
from rich.console import Console

from raydream.report.progress import Progress, format_duration, last_mark, seconds_per_step


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(total: int, step_s: float, start_step: int = 0, interval_s: float = 1e9) -> list[str]:
    """The lines of a whole run whose steps all take ``step_s``."""
    clock, stream = Clock(), io.StringIO()
    with Progress(total, start_step, Console(file=stream), interval_s, clock) as progress:
        for step in range(start_step, total):
            clock.now_s += step_s
            progress.update(step, {"rgb": 0.25, "lora": 1e-5})
    return stream.getvalue().splitlines()


def test_steps_of_one_length_are_expected_to_go_on():
    assert seconds_per_step([0.2] * 50) == pytest.approx(0.2)


def test_the_warm_up_does_not_count():
    assert seconds_per_step([60.0, 9.0, 5.0]) is None
    assert seconds_per_step([60.0, 9.0, 5.0, 0.2, 0.2]) == pytest.approx(0.2)


def test_half_life():
    # Closed form: after a change from 1 s to 3 s that is one half-life old, both halves weigh the same.
    durations = [1.0] * 4000 + [3.0] * 20
    assert seconds_per_step(durations) == pytest.approx(2.0, abs=0.01)


def test_one_long_pause_is_forgotten():
    assert seconds_per_step([0.1] * 100 + [60.0] + [0.1] * 200) == pytest.approx(0.1, rel=0.01)


def test_marks():
    reached = [last_mark(done, 1000) for done in (0, 9, 10, 49, 50, 99, 100, 199, 200, 999, 1000)]
    assert reached == [0, 0, 1, 1, 5, 5, 10, 10, 20, 90, 100]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (307.0, "5 min 07 s"),
        (3600.0, "1 h 00 min"),
        (11_150.0, "3 h 05 min"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_a_log_gets_a_line_at_each_mark():
    lines = run(total=1000, step_s=0.5)
    assert [int(re.match(r"step (\d+)/1000", line)[1]) for line in lines] == [1, 10, 50, *range(100, 1001, 100)]


def test_a_line_tells_speed_remaining_time_and_losses():
    lines = run(total=1000, step_s=0.5)
    assert "step 500/1000  50 %  2.00 steps/s  4 min 10 s left  rgb 0.25  lora 1e-05" in lines
    assert "done" in lines[-1]


def test_slow_steps_are_told_in_seconds():
    assert "2.5 s/step" in run(total=100, step_s=2.5)[-1]


def test_a_slow_run_gets_a_line_at_each_interval():
    lines = run(total=10_000, step_s=1.0, interval_s=30.0)
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert max(b - a for a, b in itertools.pairwise(steps)) == 30


def test_a_resumed_run_goes_on_where_it_was():
    lines = run(total=1000, step_s=0.5, start_step=420)
    assert [int(re.match(r"step (\d+)/", line)[1]) for line in lines] == [500, 600, 700, 800, 900, 1000]
    assert "4 min 10 s left" in lines[0]


def test_a_phase_is_told_and_is_not_a_step():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, 0, Console(file=stream), 1e9, clock)
    for step in range(100):
        if step == 50:
            progress.phase("checkpoint of step 50")
            clock.now_s += 1000.0
        clock.now_s += 0.5
        progress.update(step, {})
    lines = stream.getvalue().splitlines()
    assert "checkpoint of step 50" in lines
    assert "step 60/100  60 %  2.00 steps/s  20 s left" in lines


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(50, 0, Console(file=stream, width=120)) as progress:
        progress.phase("optimising [8 particles]")
        for step in range(50):
            progress.update(step, {"rgb": 0.25})
    shown = stream.getvalue()
    assert "50/50" in shown
    assert "optimising [8 particles]" in shown
    assert "\x1b[" in shown


def test_forced_colours_do_not_put_a_bar_into_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not any("\x1b" in line for line in run(total=20, step_s=0.5))
