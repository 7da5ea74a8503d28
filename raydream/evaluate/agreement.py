"""Whether canonical coordinate maps of several views speak of one object: what two of them see must be in one place."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from raydream.camera import clip_from_world
from raydream.coordinates import Box, points_from_canonical
from raydream.types import Cameras

SOLID = 0.5


def ccm_agreement(
    ccm: Float[Tensor, "view h w 3"],
    opacity: Float[Tensor, "view h w 1"],
    cameras: Cameras,
    box: Box,
    tolerance: float = 0.05,
) -> float:
    """The share of coordinates that no other view contradicts, over all ordered pairs of views; 1 for a solid object.

    ``ccm`` is in [0, 1], weighted by opacity, as renders hold it; ``box`` gives coordinates their places. A solid
    pixel's point is projected into another view. It is contradicted where that view, there and in the eight pixels
    around, sees nothing or only what lies behind it by more than ``tolerance`` scene units: such a point would be seen.
    One that lies behind what the other view sees is hidden and does not count. Raises ValueError where no pixel is
    solid.
    """
    solid = opacity[..., 0] > SOLID
    if not solid.any():
        raise ValueError("opacity: no pixel of any view is solid")
    clip = clip_from_world(cameras)
    points = points_from_canonical(ccm / opacity.clamp_min(1e-6), box)
    surface = _depth_range(points, solid, clip)
    right = counted = 0
    for i in range(len(ccm)):
        own = points[i][solid[i]]
        for j in range(len(ccm)):
            if i == j:
                continue
            depth, pixel, inside = _project(own, clip[j], solid.shape[1], solid.shape[2])
            nearest, farthest = (bound[j][pixel[:, 0], pixel[:, 1]] for bound in surface)
            hidden = farthest < depth - tolerance
            seen = inside & ~hidden
            right += int((seen & (nearest <= depth + tolerance)).sum())
            counted += int(seen.sum())
    return right / counted if counted else 0.0


def _depth_range(
    points: Float[Tensor, "view h w 3"], solid: Bool[Tensor, "view h w"], clip: Float[Tensor, "view 4 4"]
) -> tuple[Float[Tensor, "view h w"], Float[Tensor, "view h w"]]:
    """The nearest and the farthest depth among each pixel and its neighbours; infinite where nothing is solid."""
    depth = torch.einsum("vj,vhwj->vhw", clip[:, 3], _homogeneous(points))
    empty = torch.full_like(depth, torch.inf)
    nearest = -torch.nn.functional.max_pool2d(torch.where(solid, -depth, -empty), 3, 1, 1)
    farthest = torch.nn.functional.max_pool2d(torch.where(solid, depth, empty), 3, 1, 1)
    return nearest, farthest


def _project(
    points: Float[Tensor, "point 3"], clip: Float[Tensor, "4 4"], height: int, width: int
) -> tuple[Float[Tensor, " point"], Int[Tensor, "point 2"], Bool[Tensor, " point"]]:
    """Depth along the viewing axis, row and column (clamped), and whether the point lies in the image."""
    place = _homogeneous(points) @ clip.T
    column = ((place[:, 0] / place[:, 3] + 1) / 2 * width).floor().long()
    row = ((1 - place[:, 1] / place[:, 3]) / 2 * height).floor().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (place[:, 3] > 0)
    return place[:, 3], torch.stack([row.clamp(0, height - 1), column.clamp(0, width - 1)], dim=-1), inside


def _homogeneous(points: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 4"]:
    return torch.nn.functional.pad(points, (0, 1), value=1.0)
