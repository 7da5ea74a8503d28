"""Measured values in short, for tables and for JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COUNTED = ("cpu/render_s", "cpu/apply_s", "cpu/guide_s", "cpu/fit_s")


@dataclass(frozen=True)
class Spread:
    """A median between the quartiles of its measurements."""

    median: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """``median (low-high)``, each multiplied by ``scale``."""
        return f"{self.median * scale:.{digits}f} ({self.low * scale:.{digits}f}-{self.high * scale:.{digits}f})"


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class RunCost:
    """Mean costs of a step over a window. ``others`` is what the rest of the machine did, as a share of its cores."""

    num_particles: int
    score_replicas: int
    num_steps: int
    wall_s: float
    cpu_s: float
    parts_cpu_s: dict[str, float]
    wall_outside: float
    others: float

    @property
    def cpu_outside(self) -> float | None:
        """The share of the CPU seconds outside render, score and optimiser; None where not all parts are known."""
        known = all(name in self.parts_cpu_s for name in COUNTED)
        return 1 - sum(self.parts_cpu_s.values()) / self.cpu_s if known else None


@dataclass(frozen=True)
class CallCount:
    """What one call of a step asked of a device. ``wire_waits`` are those for the answer that the call is there for,
    ``waits`` all others, by whom they were asked for in ``askers``.
    """

    preset: str
    call: str
    launches: int
    waits: int
    wire_waits: int
    copies: int
    to_device_bytes: int
    to_host_bytes: int
    askers: dict[str, int]
