"""Textures as strangers encode them, and as RGBA bytes of the colour that their file means."""

import io
import warnings
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from raydream.assets.error import AssetError, warning
from raydream.assets.files import AssetLimits, Folder, read_named

# PIL has readers for more; these are the ones that hold textures and whose readers are looked after.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TGA", "GIF", "TIFF", "DDS")
# What an asset can do without, by the reason of its AssetError: the words of warnings.
_WARNINGS = {"missing_file": "texture_missing", "outside_folder": "texture_outside_folder"} | dict.fromkeys(
    ("bad_texture", "bad_reference", "truncated", "malformed"), "texture_unreadable"
)


@dataclass
class AssetSource:
    """What an asset is read from and how much of it. ``warnings`` collects what was left out, once each."""

    folder: Folder
    limits: AssetLimits
    warnings: dict[str, None] = field(default_factory=dict)
    _textures: dict[str, np.ndarray | None] = field(default_factory=dict)

    def warn(self, word: str, name: str = "") -> None:
        self.warnings[warning(word, name)] = None

    def inside(self, folder: Folder) -> "AssetSource":
        """The same asset, in an archive that was opened."""
        return AssetSource(folder, self.limits, self.warnings)

    def texture(self, name: str) -> np.ndarray | None:
        """RGBA bytes of an image that the asset names, read once; None, with a warning, where it cannot be read."""
        if name not in self._textures:
            self._textures[name] = self._read_texture(name)
        return self._textures[name]

    def _read_texture(self, name: str) -> np.ndarray | None:
        try:
            return decode_texture(read_named(self.folder, name, self.limits.max_bytes), self.limits)
        except AssetError as error:
            self.warn(texture_warning(error), name)
            return None


def texture_warning(error: AssetError) -> str:
    """The word of the warning for a texture that cannot be read; raises the error that no asset can do without."""
    if error.reason not in _WARNINGS:
        raise error
    return _WARNINGS[error.reason]


def decode_texture(data: bytes, limits: AssetLimits) -> np.ndarray:
    """RGBA bytes of an encoded image, reduced where a side is too long; AssetError ``bad_texture``, or ``too_large``
    before one of too many pixels is unpacked.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > limits.max_texture_px:
            raise AssetError("too_large", f"a texture of {image.width} x {image.height}")
        factor = -(-max(image.size) // limits.texture_side_px)
        rgba = _eight_bits(image).convert("RGBA")
        return np.asarray(rgba.reduce(factor) if factor > 1 else rgba)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's readers raise
        raise AssetError("bad_texture", str(error)[:200]) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits in the 8 that it means: PIL's own conversion makes everything above 255 white.

    ValueError for numbers of which nobody says which is white, and for what PIL would take for RGB.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"an image of mode {image.mode} is not in display colours")
    return image
