"""The modes of an exhibit: real assets, seen from whatever camera a score is asked about."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.assets.asset import Asset, normalise_asset
from raydream.assets.exhibit import exhibit_assets
from raydream.assets.raster import AssetViews, asset_to, render_asset
from raydream.config.prior import ExhibitConfig
from raydream.types import Backend, Cameras, PerView

LIGHT_DIRECTION = (0.36, 0.8, 0.48)  # unit, towards the light: from above and in front
AMBIENT = 0.6  # the least part of an albedo that is seen
OBJECT_RADIUS = 0.9


class ExhibitModes:
    """Renders assets to the latents of ``RgbaCodec``: colour over mid grey and opacity, both stretched to [-1, 1]."""

    def __init__(
        self,
        assets: Sequence[Asset],
        supersample: int,
        backend: Backend,
        device: torch.device,
        object_radius: float = OBJECT_RADIUS,
    ) -> None:
        self.assets = [asset_to(normalise_asset(asset, object_radius), device) for asset in assets]
        self._supersample, self._backend = supersample, backend
        self._light_direction = torch.tensor(LIGHT_DIRECTION, device=device)

    @classmethod
    def load(cls, prompt: str, config: ExhibitConfig, backend: Backend, device: torch.device) -> "ExhibitModes":
        """The assets that a prompt means; ``ValueError`` naming ``prompt`` where there are none."""
        assets = exhibit_assets(prompt, config.assets or None, config.num_modes)
        return cls(assets, config.supersample, backend, device)

    @property
    def num_modes(self) -> int:
        return len(self.assets)

    def means(
        self,
        c2w: Float[Tensor, "view 4 4"],
        fov_y_deg: PerView,
        used: Int[Tensor, " used"],
        size_px: int,
    ) -> Float[Tensor, "view used latent h w"]:
        """The latents of the modes ``used`` seen from each camera."""
        angles = torch.zeros_like(fov_y_deg)  # a rasteriser needs only the matrices
        cameras = Cameras(c2w, fov_y_deg, angles, angles, size_px, size_px)
        images = []
        for index in used.tolist():
            views = render_asset(self.assets[index], cameras, self._backend, self._supersample)
            rgb = views.rgb * self._light(views)
            latents = torch.cat([2 * rgb - views.alpha, 2 * views.alpha - 1], dim=-1)
            images.append(latents.permute(0, 3, 1, 2))
        return torch.stack(images, dim=1)

    def _light(self, views: AssetViews) -> Float[Tensor, "view h w 1"]:
        """Half-Lambert light that stands still in the world, so that all cameras agree on the colour of a point."""
        cosine = (views.normal @ self._light_direction)[..., None] / views.alpha.clamp_min(1e-4)
        return AMBIENT + (1 - AMBIENT) * (cosine.clamp(-1, 1) + 1) / 2
