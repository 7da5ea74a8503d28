"""Numbers that change during a run, as pure functions of the step (never of epochs, never of a literal's type)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def at(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """``start`` until ``start_step``, ``end`` from ``end_step`` on, a straight line between."""

    start: float
    end: float
    start_step: int
    end_step: int

    def __post_init__(self) -> None:
        if self.end_step < self.start_step:
            raise ValueError(f"end_step: must not lie before start_step={self.start_step}, got {self.end_step}")

    def at(self, step: int) -> float:
        if step < self.start_step:
            return self.start
        if step >= self.end_step:
            return self.end
        fraction = (step - self.start_step) / (self.end_step - self.start_step)
        return self.start + fraction * (self.end - self.start)


@dataclass(frozen=True)
class Steps:
    """A staircase: the value of the last ``(from_step, value)`` whose step is reached; the first starts at 0."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.points]
        if not steps or steps[0] != 0 or any(b <= a for a, b in zip(steps, steps[1:])):
            raise ValueError(f"points: need rising steps that start at 0, got {steps}")

    def at(self, step: int) -> float:
        return next(value for from_step, value in reversed(self.points) if step >= from_step)


@dataclass(frozen=True)
class Polyline:
    """Straight lines between ``(step, value)`` points, level before the first and after the last."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.points]
        if not steps or any(b <= a for a, b in zip(steps, steps[1:])):
            raise ValueError(f"points: need rising steps, got {steps}")

    def at(self, step: int) -> float:
        if step <= self.points[0][0]:
            return self.points[0][1]
        for (start_step, start), (end_step, end) in zip(self.points, self.points[1:]):
            if step < end_step:
                return start + (step - start_step) / (end_step - start_step) * (end - start)
        return self.points[-1][1]


Schedule = Constant | Linear | Steps | Polyline


def lowest(schedule: Schedule) -> float:
    """The smallest value that a schedule takes at any step."""
    return min(_turning_values(schedule))


def highest(schedule: Schedule) -> float:
    """The largest value that a schedule takes at any step."""
    return max(_turning_values(schedule))


def _turning_values(schedule: Schedule) -> list[float]:
    match schedule:
        case Constant(value):
            return [value]
        case Linear(start, end):
            return [start, end]
        case Steps(points) | Polyline(points):
            return [value for _, value in points]
