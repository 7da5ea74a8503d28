"""Checks that settings make of themselves: a message starts with the field's name and ends with what would be right."""

import argparse
import difflib
from collections.abc import Callable, Iterable


def require(condition: bool, name: str, remedy: str) -> None:
    """Raises a ``ValueError`` that names the field and says what would be right."""
    if not condition:
        raise ValueError(f"{name}: {remedy}")


def require_positive(config: object, *names: str) -> None:
    """The same for fields that must be above 0."""
    for name in names:
        require(getattr(config, name) > 0, name, f"must be positive, got {getattr(config, name)}")


def require_not_negative(config: object, *names: str) -> None:
    """The same for fields that must be 0 or above."""
    for name in names:
        require(getattr(config, name) >= 0, name, f"must not be negative, got {getattr(config, name)}")


def require_share(config: object, *names: str) -> None:
    """The same for probabilities, and parts of a whole."""
    for name in names:
        require(0 <= getattr(config, name) <= 1, name, f"must lie in [0, 1], got {getattr(config, name)}")


def require_range(low_high: tuple[float, float], name: str, low: float, high: float) -> None:
    """The same for a lower and an upper end, both within ``[low, high]``."""
    ok = low <= low_high[0] <= low_high[1] <= high
    require(ok, name, f"must be two numbers, smaller first, within [{low:.3g}, {high:.3g}], got {list(low_high)}")


def near(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'sd21'?" where a word is nearly a known one, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {found[0]!r}?" if found else ""


def one_of(*choices: str) -> Callable[[str], str]:
    """The ``type`` of a flag that takes one of these words: argparse's ``choices`` do not say which was meant."""

    def check(word: str) -> str:
        if word not in choices:
            hint = near(word, choices) or f"choose one of {', '.join(choices)}"
            raise argparse.ArgumentTypeError(f"unknown {word!r}; {hint}")
        return word

    return check
