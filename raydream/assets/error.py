"""Why an asset cannot be used; and what of one was left out: ``word`` or ``word: name``, the word from a list."""

from collections.abc import Iterable

_COLOUR_PREFIXES = ("texture_", "texcoord_", "color_", "material_", "emissive_")
_MAX_NAME = 120


class AssetError(Exception):
    """An asset that cannot be used; ``reason`` is a stable word for reports, the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["AssetError"], tuple[str, str]]:
        return AssetError, (self.reason, self.detail)  # must survive the way from a worker to the driver


def warning(word: str, name: str = "") -> str:
    """A warning about a file or a part of it by its ``name``, which comes from strangers."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name[:_MAX_NAME]).strip()
    return f"{word}: {shown}" if shown else word


def word_of(warning: str) -> str:
    """The stable word of a warning, by which warnings are counted."""
    return warning.partition(":")[0]


def loses_colours(warnings: Iterable[str]) -> bool:
    """Whether the asset looks other than its maker meant: some of its colours could not be read."""
    return any(each.startswith(_COLOUR_PREFIXES) for each in warnings)
