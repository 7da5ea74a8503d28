"""How well faces lie in their texture."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.assets.asset import Asset
from raydream.types import Backend

_SHEET_PX = 512
_INSIDE = 1e-3  # of a face: a pixel on the edge between two neighbours is no overlap


@dataclass(frozen=True)
class UvChecks:
    """``coverage`` is the share of the unit square that faces lie on, the mean over an asset's textures, and
    ``overlap`` the share of that where two or more do, both at 512 x 512 places.

    ``stretch`` is the L2 stretch of Sander et al. (2001), by texels and scaled to the whole: 1 where every face has its
    shape and its share of the texture, larger where some are squeezed. ``flat_faces`` have area but none in the
    texture, and are left out of it.
    """

    coverage: float
    overlap: float
    stretch: float | None
    flat_faces: int

    def figures(self) -> dict[str, float | int | str]:
        """What the report of a run says."""
        return {
            "UV coverage": f"{self.coverage:.1%}",
            "UV overlap": f"{self.overlap:.1%}",
            "UV stretch": "none" if self.stretch is None else round(self.stretch, 3),
        }


def check_uv(asset: Asset, backend: Backend) -> UvChecks | None:
    """None where no face has a texture. Coordinates outside of the unit square are not drawn."""
    textured = asset.face_texture >= 0
    if not textured.any():
        return None
    num_covered = num_twice = 0
    sheets = asset.face_texture[textured].unique()
    for sheet in sheets:
        uv = asset.corner_uv[asset.face_texture == sheet].to(asset.vertices.dtype)
        covered, twice = _drawn(uv, asset.faces.dtype, backend)
        num_covered, num_twice = num_covered + covered, num_twice + twice
    stretch, flat_faces = _stretch(asset, textured)
    coverage = num_covered / (len(sheets) * _SHEET_PX**2)
    return UvChecks(coverage, num_twice / max(1, num_covered), stretch, flat_faces)


def _drawn(uv: Float[Tensor, "face 3 2"], index: torch.dtype, backend: Backend) -> tuple[int, int]:
    """At how many places there is a face, and at how many of them two: drawn in two orders, another one is on top."""
    depth = 1 + torch.arange(len(uv), dtype=uv.dtype, device=uv.device) / len(uv)
    faces = torch.arange(3 * len(uv), dtype=index, device=uv.device).view(-1, 3)
    tops = []
    for order in (depth, depth.flip(0)):
        w = order.repeat_interleave(3)[:, None]
        flat = torch.cat([(uv.reshape(-1, 2) * 2 - 1) * w, torch.zeros_like(w), w], dim=-1)
        tops.append(backend.rasterize(flat[None], faces, _SHEET_PX, _SHEET_PX))
    there = tops[0].face >= 0
    well_inside = [top.barycentric.amin(-1) > _INSIDE for top in tops]
    twice = there & (tops[0].face != tops[1].face) & well_inside[0] & well_inside[1]
    return int(there.sum()), int(twice.sum())


def _stretch(asset: Asset, textured: Tensor) -> tuple[float | None, int]:
    """The L2 stretch and how many faces have no room. A face's is the mean of the squared singular values of the map
    from its texels to space, which is half the squared Frobenius norm of its derivative.
    """
    size = asset.textures.levels[asset.face_texture[textured], 0, 1:].flip(-1).double()  # width, height
    texel = asset.corner_uv[textured].double() * size[:, None]
    corner = asset.vertices[asset.faces[textured]].double()
    edge, texel_edge = corner[:, 1:] - corner[:, :1], texel[:, 1:] - texel[:, :1]
    area = torch.linalg.cross(edge[:, 0], edge[:, 1]).norm(dim=-1) / 2
    room = torch.linalg.det(texel_edge).abs() / 2
    flat = (room <= 1e-12 * size.prod(-1)) & (area > 0)
    fits = ~flat & (area > 0)
    if not fits.any():
        return None, int(flat.sum())
    squared = torch.linalg.solve(texel_edge[fits], edge[fits]).square().sum((1, 2)) / 2
    area, room = area[fits], room[fits]
    return float(((squared * area).sum() / area.sum() * room.sum() / area.sum()).sqrt()), int(flat.sum())
