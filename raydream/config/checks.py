"""Checks that settings make of themselves: a message starts with the field's name and ends with what would be right."""


def require(condition: bool, name: str, remedy: str) -> None:
    """Raises a ``ValueError`` that names the field and says what would be right."""
    if not condition:
        raise ValueError(f"{name}: {remedy}")


def require_range(low_high: tuple[float, float], name: str, low: float, high: float) -> None:
    """The same for a lower and an upper end, both within ``[low, high]``."""
    ok = low <= low_high[0] <= low_high[1] <= high
    require(ok, name, f"must be two numbers, smaller first, within [{low:.3g}, {high:.3g}], got {list(low_high)}")
