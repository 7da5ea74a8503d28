"""The measurements as tables for people and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from raydream.bench.figures import CallCount, RunCost
from raydream.bench.particle_step import STEP_PARTS, StepComparison

TARGET_SPEEDUP, TARGET_OUTSIDE = 10.0, 0.10
_QUIET = 0.05  # with more than that going on beside it, a wall time says little


def step_table(comparisons: Sequence[StepComparison]) -> Table:
    """One line for each setting and backend: milliseconds of each part, and how many times faster than plain torch."""
    table = Table(title="One particle's step in one thread, ms: median (quartiles)", title_justify="left")
    for name in ("setting", "device", "samples", "backend", *STEP_PARTS, "step", "times plain torch"):
        is_word = name in ("setting", "device", "backend")
        table.add_column(name, justify="left" if is_word else "right", no_wrap=is_word)
    for comparison in comparisons:
        for i, cost in enumerate(comparison.costs):
            is_first, is_last = i == 0, i == len(comparison.costs) - 1
            table.add_row(
                comparison.setting.text() if is_first else "",
                comparison.device if is_first else "",
                str(comparison.num_samples) if is_first else "",
                cost.backend,
                *(f"{cost.parts_s[part].median * 1e3:.1f}" for part in STEP_PARTS),
                cost.total_s.text(1e3, 1 if cost.total_s.median < 0.1 else 0),
                comparison.speedup.text() if is_last else "1",
                end_section=is_last,
            )
    return table


def run_table(costs: Sequence[RunCost]) -> Table:
    """One line for each number of particles and replicas: seconds of a step and the share that is nobody's work."""
    table = Table(title="A step of a whole run", title_justify="left")
    columns = ("n", "score replicas", "steps", "wall s", "wall s / n", "CPU s", "CPU s / n", "CPU outside")
    for name in (*columns, "wall outside", "other programs"):
        table.add_column(name, justify="right")
    for cost in costs:
        outside = cost.cpu_outside
        table.add_row(
            str(cost.num_particles),
            str(cost.score_replicas),
            str(cost.num_steps),
            *(f"{seconds:.3f}" for seconds in (cost.wall_s, cost.wall_s / cost.num_particles)),
            *(f"{seconds:.3f}" for seconds in (cost.cpu_s, cost.cpu_s / cost.num_particles)),
            "-" if outside is None else f"{outside:.1%}",
            f"{cost.wall_outside:.1%}",
            f"{cost.others:.0%}",
        )
    return table


def verdicts(comparisons: Sequence[StepComparison], costs: Sequence[RunCost]) -> list[str]:
    """Each target with what was measured."""
    lines = [
        f"{comparison.costs[-1].backend} is {comparison.speedup.median:.1f} times plain torch on {comparison.device} "
        f"({comparison.setting.text()}); the target is {TARGET_SPEEDUP:g}"
        for comparison in comparisons
    ]
    if costs:
        largest = max(costs, key=lambda cost: (cost.num_particles, -cost.score_replicas))
        outside = "unknown" if largest.cpu_outside is None else f"{largest.cpu_outside:.1%}"
        noisy = "" if largest.others < _QUIET else f" (not reliable: other programs took {largest.others:.0%})"
        lines.append(
            f"outside render, score and optimiser at n = {largest.num_particles}: {outside} of the CPU time, "
            f"{largest.wall_outside:.1%} of the wall time{noisy}; the target is {TARGET_OUTSIDE:.0%}"
        )
    return lines


def show(
    console: Console,
    comparisons: Sequence[StepComparison],
    costs: Sequence[RunCost],
    counts: Sequence[CallCount] = (),
) -> None:
    """Prints the tables and the verdicts."""
    if comparisons:
        console.print(step_table(comparisons))
    if costs:
        console.print(run_table(costs))
    if counts:
        console.print(launch_table(counts))
    for line in verdicts(comparisons, costs):
        console.print(line)


def launch_table(counts: Sequence[CallCount]) -> Table:
    """One line for each call of a step of a preset."""
    table = Table(title="What each call asks of a GPU, by a pretend device", title_justify="left")
    columns = ("preset", "call", "launches", "waits", "for the wire", "copies", "bytes there", "bytes back")
    for name in columns:
        is_word = name in ("preset", "call")
        table.add_column(name, justify="left" if is_word else "right", no_wrap=is_word)
    for row in counts:
        numbers = (row.launches, row.waits, row.wire_waits, row.copies, row.to_device_bytes, row.to_host_bytes)
        table.add_row(row.preset, row.call, *(f"{number:,}" for number in numbers))
    return table


def to_json(comparisons: Sequence[StepComparison], costs: Sequence[RunCost], counts: Sequence[CallCount] = ()) -> str:
    """All figures; seconds and shares."""
    runs = [asdict(cost) | {"cpu_outside": cost.cpu_outside} for cost in costs]
    launches = [asdict(row) for row in counts]
    steps = [asdict(c) for c in comparisons]
    return json.dumps({"particle_step": steps, "whole_run": runs, "launches": launches}, indent=1)
