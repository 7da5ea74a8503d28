"""Renders to latents: directly with opacity as the fourth channel, or through a prior's VAE (``vae.py``)."""

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from raydream.types import Render

CodecKind = Literal["vae", "rgba"]


@runtime_checkable
class LatentCodec(Protocol):
    """Turns renders into what a denoiser works on, and back into something to look at."""

    def encode(self, render: Render, generator: torch.Generator) -> Float[Tensor, "view 4 lh lw"]:
        """Differentiable by the render."""
        ...

    def decode(self, latents: Float[Tensor, "view 4 lh lw"]) -> Float[Tensor, "view h w 3"]:
        """Colours in [0, 1] for previews; never part of a step, and not differentiable."""
        ...


def make_codec(
    kind: CodecKind, size_px: int, prior: Path | None, sample_posterior: bool, dtype: torch.dtype, device: torch.device
) -> LatentCodec:
    """The codec of a prior; "rgba" needs none. ``size_px`` is the image size before encoding, 0 for the natural one."""
    if kind == "rgba":
        return RgbaCodec(size_px)
    assert prior is not None, "a VAE codec needs the folder of its prior"
    from raydream.diffusion.vae import VaeCodec  # diffusers takes seconds to import, and "rgba" does not need it

    return VaeCodec.load(prior, size_px, sample_posterior, dtype, device)


class RgbaCodec:
    """No VAE: the latent is the colour over mid grey and the opacity, each stretched to [-1, 1].

    Renders are resized to ``size_px``; 0 keeps their size.
    """

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px

    def encode(self, render: Render, generator: torch.Generator) -> Float[Tensor, "view 4 h w"]:
        """The latent of ``render.foreground`` and ``render.opacity``; the render's own background is not seen."""
        over_grey = 2 * render.foreground - render.opacity  # 2 (foreground + (1 - opacity) / 2) - 1
        stretched = torch.cat([over_grey, 2 * render.opacity - 1], dim=-1)
        return resize(stretched.permute(0, 3, 1, 2), self._size_px or render.rgb.shape[1])

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "view 4 h w"]) -> Float[Tensor, "view h w 3"]:
        return (latents[:, :3].permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)


def resize(images: Float[Tensor, "view channel h w"], size_px: int) -> Float[Tensor, "view channel size size"]:
    """Bilinear, with a wider kernel where it shrinks; the same tensor where the size is right already."""
    if images.shape[-2:] == (size_px, size_px):
        return images
    return F.interpolate(images, (size_px, size_px), mode="bilinear", align_corners=False, antialias=True)
