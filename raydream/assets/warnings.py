"""What of an asset's file was left out when it was read: ``word`` or ``word: name``, the word from a stable list."""

from collections.abc import Callable, Iterable

Warn = Callable[[str, str], None]  # told the word and the name of what was left out

_COLOUR_PREFIXES = ("texture_", "texcoord_", "color_", "material_", "emissive_")
_MAX_NAME = 120


def warning(word: str, name: str = "") -> str:
    """A warning about a file or a part of it by its ``name``, which comes from strangers."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name[:_MAX_NAME]).strip()
    return f"{word}: {shown}" if shown else word


def word_of(told: str) -> str:
    """The stable word of a warning, by which warnings are counted."""
    return told.partition(":")[0]


def loses_colours(warnings: Iterable[str]) -> bool:
    """Whether the asset looks other than its maker meant: some of its colours could not be read."""
    return any(told.startswith(_COLOUR_PREFIXES) for told in warnings)
