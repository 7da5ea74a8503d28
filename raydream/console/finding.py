"""What the doctor finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``remedy`` is empty where nothing is amiss, ``is_broken`` where runs would fail."""

    name: str
    text: str
    remedy: str = ""
    is_broken: bool = False
