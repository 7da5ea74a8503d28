"""The views that everything is measured on: an object from all around, at its own scale.

A particle is looked at as the mesh that a person gets, not as the NeRF behind it: so runs, plain folders of meshes and
real assets, the ground truth, go one and the same way.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.assets.asset import Asset, normalise_asset
from raydream.assets.raster import AssetViews, render_asset
from raydream.camera import orbit_cameras
from raydream.config.evaluate import NUM_VIEWS, EvaluateConfig
from raydream.coordinates import Box, tight_box
from raydream.types import Backend, Cameras

AZIMUTHS_DEG = tuple(360.0 * index / NUM_VIEWS for index in range(NUM_VIEWS))
DISTANCE, FOV_Y_DEG = 2.8, 45.0  # the middle of what the embedded prior was trained on
_SUPERSAMPLE = 2


@dataclass(frozen=True)
class Turntable:
    """An object in the unit sphere, seen from ``AZIMUTHS_DEG``; ``box`` is its own, for canonical coordinates."""

    name: str
    cameras: Cameras
    views: AssetViews
    box: Box

    @property
    def rgba(self) -> Float[Tensor, "view h w 4"]:
        """Premultiplied albedo and coverage."""
        return torch.cat([self.views.rgb, self.views.alpha], dim=-1)

    def images(self, background: float) -> Float[Tensor, "view h w 3"]:
        """Albedo over plain grey."""
        return (self.views.rgb + (1 - self.views.alpha) * background).clamp(0, 1)


def standard_cameras(settings: EvaluateConfig) -> Cameras:
    """The cameras of every turntable."""
    azimuth = torch.tensor(AZIMUTHS_DEG)
    each = torch.ones_like(azimuth)
    return orbit_cameras(
        azimuth, settings.elevation_deg * each, DISTANCE * each, FOV_Y_DEG * each, settings.image_px, settings.image_px
    )


def take_turntable(asset: Asset, settings: EvaluateConfig, backend: Backend, name: str = "") -> Turntable:
    """Renders an asset of any size and place."""
    cameras, placed = standard_cameras(settings), normalise_asset(asset)
    views = render_asset(placed, cameras, backend, _SUPERSAMPLE)
    return Turntable(name or asset.uid, cameras, views, tight_box(placed.vertices))
