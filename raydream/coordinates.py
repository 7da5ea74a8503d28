"""Canonical coordinate maps: which point of the object, in its own box, is seen at a pixel (SweetDreamer, section 4.1).

The tight box of an object is centred and its longest side becomes 1; each axis is then stretched on its own so that the
box fills [0, 1]^3. A map is coded for a denoiser without a VAE: three coordinates in [-1, 1] and ``2 * opacity - 1``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MIN_OPACITY = 1e-3


@dataclass(frozen=True)
class Box:
    """An axis-aligned box in scene units."""

    minimum: Float[Tensor, "3"]
    maximum: Float[Tensor, "3"]

    @property
    def centre(self) -> Float[Tensor, "3"]:
        return (self.minimum + self.maximum) / 2

    @property
    def extents(self) -> Float[Tensor, "3"]:
        return self.maximum - self.minimum


def tight_box(points: Float[Tensor, "point 3"]) -> Box:
    """The smallest box that holds the points."""
    minimum, maximum = torch.aminmax(points, dim=0)
    return Box(minimum, maximum)


def unit_coordinates(points: Float[Tensor, "*point 3"], box: Box) -> Float[Tensor, "*point 3"]:
    """The points with the box centred at the origin and its longest side scaled to 1; proportions are kept."""
    return (points - box.centre) / box.extents.max()


def canonical_coordinates(points: Float[Tensor, "*point 3"], box: Box) -> Float[Tensor, "*point 3"]:
    """Coordinates in [0, 1] along each side of the box; 0.5 along a side of no length (a flat object).

    Equal to normalising the longest side first and stretching each axis after. Differentiable by the points.
    """
    flat = box.extents <= 0
    scaled = (points - box.minimum) / torch.where(flat, 1.0, box.extents)
    return torch.where(flat, 0.5, scaled)


def points_from_canonical(ccm: Float[Tensor, "*point 3"], box: Box) -> Float[Tensor, "*point 3"]:
    """The inverse of ``canonical_coordinates``: points in scene units."""
    return box.minimum + ccm * box.extents


def encode_ccm(ccm: Float[Tensor, "view h w 3"], opacity: Float[Tensor, "view h w 1"]) -> Float[Tensor, "view 4 h w"]:
    """The latent of a map whose coordinates in [0, 1] are weighted by opacity, as renders hold them.

    The first three channels are ``opacity * (2 * coordinate - 1)``: in [-1, 1] where the object is solid, and 0, the
    centre of the box, where there is nothing; the last is ``2 * opacity - 1``. Linear, hence differentiable.
    """
    return torch.cat([2 * ccm - opacity, 2 * opacity - 1], dim=-1).permute(0, 3, 1, 2)


def decode_ccm(latents: Float[Tensor, "view 4 h w"]) -> tuple[Float[Tensor, "view h w 3"], Float[Tensor, "view h w 1"]]:
    """Coordinates in [0, 1], *not* weighted by opacity, and the opacity; both clamped, for showing and measuring.

    Coordinates are 0 where the opacity is under ``MIN_OPACITY``: nothing is known there.
    """
    channels = latents.permute(0, 2, 3, 1)
    opacity = ((channels[..., 3:] + 1) / 2).clamp(0, 1)
    coordinates = (channels[..., :3] / opacity.clamp_min(MIN_OPACITY) + 1) / 2
    return torch.where(opacity < MIN_OPACITY, 0.0, coordinates.clamp(0, 1)), opacity
