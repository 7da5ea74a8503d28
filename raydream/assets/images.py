"""Textures as strangers encode them, and as RGBA bytes of the colour that their file means."""

import io
import warnings

import numpy as np
from PIL import Image

from raydream.assets.error import AssetError

# PIL has readers for more; these are the ones that hold textures and whose readers are looked after.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TGA", "GIF", "TIFF", "DDS")


def decode_texture(data: bytes, max_px: int, side_px: int) -> np.ndarray:
    """RGBA bytes of an encoded image, reduced so that no side is over ``side_px``; AssetError ``bad_texture``, or
    ``too_large`` before one of more than ``max_px`` is unpacked.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_px:
            raise AssetError("too_large", f"a texture of {image.width} x {image.height}")
        factor = -(-max(image.size) // side_px)
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
