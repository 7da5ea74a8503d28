"""An asset once it is in memory: triangles, display colours and textures, ready for a rasteriser."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from raydream.assets.error import AssetError as AssetError  # told to whoever loads, also where there is no torch
from raydream.coordinates import tight_box

WRAP_REPEAT, WRAP_MIRROR, WRAP_CLAMP = 0, 1, 2


@dataclass(frozen=True)
class Textures:
    """All textures of an asset with their mip levels in one flat buffer, in display (sRGB) space.

    ``levels[t, l]`` is (first texel, height, width) of level ``l``; a small texture repeats its last level. Row 0 of an
    image is at v = 0 (glTF's convention). ``smooth`` is False where the file asks for the nearest texel.
    """

    texels: UInt8[Tensor, "texel 3"]
    levels: Int[Tensor, "texture level 3"]
    wrap: Int[Tensor, "texture 2"]
    smooth: Bool[Tensor, " texture"]


@dataclass(frozen=True)
class Asset:
    """A triangle mesh with albedo. Colours are display (sRGB) values in [0, 1].

    The albedo at a point of a face is its interpolated ``corner_colors`` times its texture, if ``face_texture`` is not
    -1. Everything is opaque: alpha masks became geometry when it was loaded (``num_source_faces`` counts the
    triangles before). ``corner_normals`` are unit vectors. ``vertices`` are where the file puts them, in its units,
    unless float32 would lose the shape there: then they lie about the origin, those of a tiny object scaled to a side
    of 1. ``warnings`` are those of ``error.warning``.
    """

    uid: str
    caption: str
    vertices: Float[Tensor, "vertex 3"]
    faces: Int[Tensor, "face 3"]
    corner_colors: Float[Tensor, "face 3 3"]
    corner_normals: Float[Tensor, "face 3 3"]
    corner_uv: Float[Tensor, "face 3 2"]
    face_texture: Int[Tensor, " face"]
    textures: Textures
    num_source_faces: int
    warnings: tuple[str, ...] = ()

    @property
    def num_faces(self) -> int:
        return self.faces.shape[0]


def no_textures() -> Textures:
    """The textures of an asset that has none."""
    return Textures(
        torch.zeros(0, 3, dtype=torch.uint8),
        torch.zeros(0, 1, 3, dtype=torch.long),
        torch.zeros(0, 2, dtype=torch.long),
        torch.zeros(0, dtype=torch.bool),
    )


def normalise_asset(asset: Asset, radius: float = 1.0) -> Asset:
    """The asset with its box centred at the origin and its farthest vertex from there at ``radius`` scene units."""
    centred = asset.vertices.double()  # far-off objects lose digits in float32 otherwise
    centred = centred - tight_box(centred).centre
    scale = radius / centred.norm(dim=-1).max()
    return replace(asset, vertices=(centred * scale).to(asset.vertices.dtype))


def turn_front(asset: Asset, front_axis: str | None) -> Asset:
    """The asset turned about +y so that what looked along ``front_axis`` ("+X", ...) looks along +z; None as it is."""
    if front_axis is None or front_axis == "+Z":
        return asset
    rows = {"+X": ((0, 0, -1), (1, 0, 0)), "-Z": ((-1, 0, 0), (0, 0, -1)), "-X": ((0, 0, 1), (-1, 0, 0))}
    x_from, z_from = rows[front_axis]
    turn = torch.tensor([x_from, (0, 1, 0), z_from], dtype=asset.vertices.dtype)
    return replace(asset, vertices=asset.vertices @ turn.T, corner_normals=asset.corner_normals @ turn.T)


def flat_normals(vertices: Float[Tensor, "vertex 3"], faces: Int[Tensor, "face 3"]) -> Float[Tensor, "face 3"]:
    """Unit normals by the right-hand rule; +z for a face of no area."""
    corners = vertices.double()[faces]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = normal.norm(dim=-1, keepdim=True)
    upright = torch.tensor([0.0, 0.0, 1.0], dtype=normal.dtype)
    return torch.where(length > 0, normal / length.clamp_min(1e-300), upright).to(vertices.dtype)
