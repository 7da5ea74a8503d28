"""What every file reader yields (parts: triangles with one material each) and how parts become an ``Asset``.

Alpha masks are turned into geometry here, so that whatever rasterises the asset later needs no alpha test: a masked
triangle is split until its pieces are opaque or empty.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from raydream.assets.asset import WRAP_MIRROR, WRAP_REPEAT, Asset, AssetError, Textures, flat_normals, no_textures

# A blended surface is drawn opaque where more than this of it is there: an albedo has one layer.
BLEND_CUTOFF = 0.2
# In float32 a place has 24 bits: an object that lies so many of its sides away keeps 16 for its shape.
FAR_SIDES, TINY_SIDE = 256, 1e-12
DARK = 8  # of 255: what JPEG makes of an image that is black
MASK_LATTICE, MASK_LEVELS, MASK_MAX_PIECES = 12, 4, 30_000


@dataclass(frozen=True, eq=False)
class Material:
    """A base colour: ``factor`` is linear RGBA, ``image`` display-space RGBA bytes; no ``alpha_cutoff`` is opaque."""

    factor: np.ndarray = field(default_factory=lambda: np.ones(4))
    image: np.ndarray | None = None
    wrap: tuple[int, int] = (WRAP_REPEAT, WRAP_REPEAT)
    smooth: bool = True
    alpha_cutoff: float | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Triangles in world space with one material; per-vertex normals, uv (v down) and linear RGBA may be missing."""

    positions: np.ndarray
    triangles: np.ndarray
    material: Material
    normals: np.ndarray | None = None
    uv: np.ndarray | None = None
    colors: np.ndarray | None = None


@dataclass
class _Soup:
    """Parts laid side by side; ``corners`` holds normal 3, uv 2 and linear RGBA 4 of each corner."""

    positions: list[np.ndarray] = field(default_factory=list)
    faces: list[np.ndarray] = field(default_factory=list)
    corners: list[np.ndarray] = field(default_factory=list)
    texture: list[np.ndarray] = field(default_factory=list)
    num_vertices: int = 0

    def add(self, positions: np.ndarray, faces: np.ndarray, corners: np.ndarray, texture: int) -> None:
        self.positions.append(positions)
        self.faces.append(faces + self.num_vertices)
        self.corners.append(corners)
        self.texture.append(np.full(len(faces), texture))
        self.num_vertices += len(positions)


def build_asset(uid: str, caption: str, parts: list[Part], warning_words: list[str]) -> Asset:
    """One asset from the parts of a file; AssetError ``no_faces``, ``non_finite`` or ``degenerate``."""
    soup = _Soup()
    baked: dict[tuple, int] = {}
    texture_images: list[Material] = []
    for part in parts:
        if not len(part.triangles):
            continue
        if not np.isfinite(part.positions[part.triangles]).all():
            raise AssetError("non_finite", "positions hold NaN or infinity")
        material = part.material
        texture = -1
        if material.image is not None and part.uv is not None:
            key = (id(material.image), material.factor[:3].tobytes(), material.wrap, material.smooth)
            texture = baked.setdefault(key, len(baked))
            if texture == len(texture_images):
                texture_images.append(material)
        corners = _corner_attributes(part, textured=texture >= 0)
        if material.alpha_cutoff is None:
            soup.add(part.positions, part.triangles, corners, texture)
        else:
            pieces = mask_to_geometry(part.positions[part.triangles], corners, material, textured=texture >= 0)
            faces = np.arange(3 * len(pieces)).reshape(-1, 3)
            soup.add(pieces[..., :3].reshape(-1, 3), faces, pieces[..., 3:], texture)
    if not sum(map(len, soup.faces)):
        opaque = [replace(part, material=replace(part.material, alpha_cutoff=None)) for part in parts]
        if not any(len(part.triangles) for part in parts):
            raise AssetError("no_faces", "nothing to draw")
        # converters often write alpha 0 for alpha 1; an asset that is nowhere visible was not meant
        return build_asset(uid, caption, opaque, [*warning_words, "alpha_ignored"])
    num_source_faces = sum(len(part.triangles) for part in parts)
    return _finish(uid, caption, soup, pack_textures(texture_images), num_source_faces, warning_words)


def _finish(
    uid: str, caption: str, soup: _Soup, textures: Textures, num_source_faces: int, warning_words: list[str]
) -> Asset:
    positions, faces = np.concatenate(soup.positions), np.concatenate(soup.faces)
    used, faces = np.unique(faces, return_inverse=True)
    positions, faces = positions[used], faces.reshape(-1, 3)
    extents = np.ptp(positions, axis=0)
    if not 0 < extents.max() < 1e18 or (extents > extents.max() * 1e-9).sum() < 2:
        raise AssetError("degenerate", f"extents {extents.tolist()}")
    corners = np.concatenate(soup.corners)
    vertices = torch.from_numpy(_within_float32(positions, float(extents.max()))).float()
    face_index = torch.from_numpy(faces).long()
    normals = torch.from_numpy(corners[..., :3]).float()
    missing = ~torch.isfinite(normals).all(-1, keepdim=True) | (normals.norm(dim=-1, keepdim=True) < 1e-6)
    normals = torch.where(missing, flat_normals(vertices, face_index)[:, None], normals)
    return Asset(
        uid=uid,
        caption=caption,
        vertices=vertices,
        faces=face_index,
        corner_colors=torch.from_numpy(srgb_from_linear(corners[..., 5:8])).float(),
        corner_normals=normals / normals.norm(dim=-1, keepdim=True),
        corner_uv=torch.from_numpy(corners[..., 3:5]).float(),
        face_texture=torch.from_numpy(np.concatenate(soup.texture)).long(),
        textures=textures,
        num_source_faces=num_source_faces,
        warnings=tuple(warning_words),
    )


def _within_float32(positions: np.ndarray, side: float) -> np.ndarray:
    """The positions of an object whose longest side is ``side``, moved or scaled only where float32 loses its shape."""
    if np.abs(positions).max() > FAR_SIDES * side:
        positions = positions - (positions.min(axis=0) + positions.max(axis=0)) / 2
    return positions / side if side < TINY_SIDE else positions


def _corner_attributes(part: Part, textured: bool) -> np.ndarray:
    """Normal, uv and linear RGBA of each corner, ``[face, 3, 9]``; a texture takes the factor's colour on itself."""
    corners = np.zeros((len(part.triangles), 3, 9))
    if part.normals is not None:
        corners[..., :3] = part.normals[part.triangles]
    if part.uv is not None:
        corners[..., 3:5] = np.nan_to_num(part.uv[part.triangles], nan=0.0, posinf=0.0, neginf=0.0).clip(-1e4, 1e4)
    corners[..., 5:] = 1.0 if part.colors is None else np.nan_to_num(part.colors[part.triangles], nan=1.0).clip(0, 1)
    corners[..., 5:8] *= 1.0 if textured else part.material.factor[:3]
    corners[..., 8] *= part.material.factor[3]
    return corners


def mask_to_geometry(triangles: np.ndarray, corners: np.ndarray, material: Material, textured: bool) -> np.ndarray:
    """The opaque pieces of masked triangles, ``[piece, 3, 12]``: position and then the corner attributes.

    Alpha is sampled on a lattice in each triangle; a mixed one is cut in four, up to ``MASK_LEVELS`` times, and what is
    still mixed then is kept if most of it is opaque.
    """
    pieces = np.concatenate([triangles, corners], axis=-1)
    kept: list[np.ndarray] = []
    for level in range(MASK_LEVELS + 1):
        chunks = np.array_split(pieces, 1 + len(pieces) // 4096)
        alpha = np.concatenate([_lattice_alpha(chunk, material, textured) for chunk in chunks])
        opaque = alpha >= material.alpha_cutoff
        last = level == MASK_LEVELS or sum(len(some) for some in kept) + 4 * len(pieces) > MASK_MAX_PIECES
        kept.append(pieces[opaque.mean(axis=1) >= 0.5 if last else opaque.all(axis=1)])
        if last:
            break
        pieces = _quarter(pieces[opaque.any(axis=1) & ~opaque.all(axis=1)])
    return np.concatenate(kept)


def _lattice_alpha(pieces: np.ndarray, material: Material, textured: bool) -> np.ndarray:
    """Alpha at the lattice points of each piece, by the nearest texel."""
    samples = np.einsum("sc,fck->fsk", _lattice(MASK_LATTICE), pieces)
    if not textured or material.image is None:
        return samples[..., 11]
    height, width = material.image.shape[:2]
    column = wrap_texels(np.floor(samples[..., 6] * width).astype(np.int64), width, material.wrap[0])
    row = wrap_texels(np.floor(samples[..., 7] * height).astype(np.int64), height, material.wrap[1])
    return samples[..., 11] * material.image[row, column, 3] / 255


def wrap_texels(index: np.ndarray, size: int, mode: int) -> np.ndarray:
    """Texel indices folded into an image by its wrap mode."""
    if mode == WRAP_REPEAT:
        return index % size
    if mode == WRAP_MIRROR:
        folded = index % (2 * size)
        return np.minimum(folded, 2 * size - 1 - folded)
    return index.clip(0, size - 1)


@lru_cache
def _lattice(order: int) -> np.ndarray:
    """Barycentric points inside a triangle: the centres of the upright small triangles of a regular subdivision."""
    i, j = np.meshgrid(np.arange(order), np.arange(order), indexing="ij")
    i, j = i[i + j < order], j[i + j < order]
    return np.stack([i + 1 / 3, j + 1 / 3, order - i - j - 2 / 3], axis=-1) / order


def _quarter(pieces: np.ndarray) -> np.ndarray:
    """Each triangle as four, by the midpoints of its sides."""
    a, b, c = pieces[:, 0], pieces[:, 1], pieces[:, 2]
    ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
    children = [np.stack(corners, axis=1) for corners in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))]
    return np.concatenate(children)


def pack_textures(materials: list[Material]) -> Textures:
    """The images of materials, times their factors, with mip levels in one buffer."""
    if not materials:
        return no_textures()
    texels, chains, offset = [], [], 0
    for material in materials:
        chain = []
        for image in mip_chain(_baked_image(material)):
            texels.append(image.reshape(-1, 3))
            chain.append((offset, *image.shape[:2]))
            offset += len(texels[-1])
        chains.append(chain)
    num_levels = max(map(len, chains))
    return Textures(
        texels=torch.from_numpy(np.concatenate(texels)),
        levels=torch.tensor([chain + chain[-1:] * (num_levels - len(chain)) for chain in chains]),
        wrap=torch.tensor([material.wrap for material in materials]),
        smooth=torch.tensor([material.smooth for material in materials]),
    )


def shines(base: Material, glow: Material) -> bool:
    """Whether what is emitted gives a surface a colour. One grey for all of it does so only where the rest is black:
    else it is a lamp's brightness or, far more often, what a converter left of an image that it dropped.
    """
    colour = glow.factor[:3]
    if not colour.any() or glow.image is not None or np.ptp(colour) > 0.02:
        return bool(colour.any())
    return not base.factor[:3].any() or (base.image is not None and int(base.image[..., :3].max()) <= DARK)


def with_emission(base: Material, glow: Material) -> Material:
    """The base colour with what shines by itself: of both the brighter, in each channel and at each place.

    Their sum would be what a lamp shows, but many files give one image as both to be drawn without light. Where both
    have an image, these must lie on the surface in the same way. A base that is nowhere darker comes back as it is.
    """
    if base.image is None and glow.image is None:
        return replace(base, factor=np.append(np.maximum(base.factor[:3], glow.factor[:3]), base.factor[3]))
    placed = glow if base.image is None else base
    sizes = [material.image.shape[:2] for material in (base, glow) if material.image is not None]
    height, width = (max(sides) for sides in zip(*sizes))
    shown = [_resized(_display_rgb(material), width, height) for material in (base, glow)]
    if (shown[0] >= shown[1]).all():
        return base
    alpha = np.full((height, width, 1), 255, np.uint8)
    if base.image is not None:
        alpha = _resized(base.image[..., 3], width, height)[..., None]
    image = np.concatenate([np.maximum(*shown), alpha], axis=-1)
    factor = np.append(np.ones(3), base.factor[3])
    return Material(factor, image, placed.wrap, placed.smooth, base.alpha_cutoff)


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _display_rgb(material: Material) -> np.ndarray:
    """Display-space RGB of a texture times its factor; one texel of the factor alone where there is no texture."""
    image = np.full((1, 1, 4), 255, np.uint8) if material.image is None else material.image
    levels = linear_from_srgb(np.arange(256) / 255)[:, None] * material.factor[:3]
    table = np.round(srgb_from_linear(levels) * 255).astype(np.uint8)
    return np.stack([table[:, channel][image[..., channel]] for channel in range(3)], axis=-1)


def _baked_image(material: Material) -> np.ndarray:
    """``_display_rgb`` of a material with a texture; where it is masked away, the mean of the rest bleeds less."""
    image = material.image
    assert image is not None
    rgb = _display_rgb(material)
    if material.alpha_cutoff is not None:
        hidden = image[..., 3] < 255 * material.alpha_cutoff
        if hidden.any() and not hidden.all():
            rgb[hidden] = rgb[~hidden].mean(axis=0).round()
    return rgb


def mip_chain(image: np.ndarray) -> list[np.ndarray]:
    """The image and its box-filtered halves down to one texel."""
    chain = [image]
    while max(image.shape[:2]) > 1:
        height, width = (max(1, side // 2) for side in image.shape[:2])
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
        chain.append(image)
    return chain


def linear_from_srgb(value: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, from display values in [0, 1] to linear light."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb_from_linear(value: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, from linear light in [0, 1] to display values."""
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * np.clip(value, 0.0, 1.0) ** (1 / 2.4) - 0.055)
