"""Renders to latents: what a codec is, and the one that takes colour and opacity as they are."""

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from raydream.types import Latents, Render


@runtime_checkable
class LatentCodec(Protocol):
    """Turns renders into what a denoiser works on, and back into something to look at."""

    def encode(self, render: Render, generator: torch.Generator) -> Float[Tensor, "view latent lh lw"]:
        """Differentiable by the render."""
        ...

    def decode(self, latents: Float[Tensor, "view latent lh lw"]) -> Float[Tensor, "view h w 3"]:
        """Colours in [0, 1] for previews; never part of a step, and not differentiable."""
        ...


class RgbaCodec:
    """No VAE: the latent is the colour over mid grey and the opacity, each stretched to [-1, 1].

    Renders are resized to ``size_px``; 0 keeps their size.
    """

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px

    def encode(self, render: Render, generator: torch.Generator) -> Latents:
        """The latent of ``render.foreground`` and ``render.opacity``; the render's own background is not seen."""
        over_grey = 2 * render.foreground - render.opacity  # 2 (foreground + (1 - opacity) / 2) - 1
        stretched = torch.cat([over_grey, 2 * render.opacity - 1], dim=-1)
        return resize(stretched.permute(0, 3, 1, 2), self._size_px or render.rgb.shape[1])

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "view h w 3"]:
        return (latents[:, :3].permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)


def normal_picture(render: Render) -> Render:
    """The render with its normals, stretched from [-1, 1] to [0, 1], in place of colours; on black (threestudio)."""
    assert render.normal is not None
    picture = (render.normal + render.opacity) / 2
    return replace(render, rgb=picture, foreground=picture)


def normal_latent(render: Render, turn: Float[Tensor, "3 3"], size_px: int) -> Float[Tensor, "view 4 size size"]:
    """The normals, turned, and the opacity as a latent (Fantasia3D); pixels are joined by their mean."""
    assert render.normal is not None
    latent = torch.cat([render.normal @ turn.to(render.normal).T, render.opacity], dim=-1).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(latent, size_px) if latent.shape[-1] > size_px else resize(latent, size_px)


def random_turn(generator: torch.Generator) -> Float[Tensor, "3 3"]:
    """A rotation, all equally likely: that of a normal quaternion."""
    w, x, y, z = F.normalize(torch.randn(4, generator=generator), dim=0).tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def resize(images: Float[Tensor, "view channel h w"], size_px: int) -> Float[Tensor, "view channel size size"]:
    """Bilinear, with a wider kernel where it shrinks; the same tensor where the size is right already."""
    if images.shape[-2:] == (size_px, size_px):
        return images
    return F.interpolate(images, (size_px, size_px), mode="bilinear", align_corners=False, antialias=True)


def round_trip_loss(rgb: Float[Tensor, "view h w 3"], seen: Float[Tensor, "view size size 3"]) -> Float[Tensor, ""]:
    """Holds views to what a VAE makes of them, ``seen``, from which no gradient flows: half the squared distance,
    summed over each view like the gradient of score distillation, and meant over views.
    """
    pixels = resize(rgb.permute(0, 3, 1, 2), seen.shape[1])
    return 0.5 * (pixels - seen.detach().permute(0, 3, 1, 2)).square().sum() / len(seen)
