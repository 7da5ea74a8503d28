"""The VAE of a Stable-Diffusion-class prior as a ``LatentCodec``."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from raydream.device import send
from raydream.diffusion import layout
from raydream.diffusion.latent import resize
from raydream.precision import memory_format
from raydream.types import Render


class VaeCodec:
    """The VAE of a latent diffusion prior; frozen, so a backward pass reaches the pixels and nothing else.

    Renders of any size are resized to ``size_px`` first. The latent is the posterior's mean, or a sample of it, times
    the VAE's scaling factor.
    """

    def __init__(self, vae: AutoencoderKL, size_px: int, sample_posterior: bool) -> None:
        self.vae = vae.requires_grad_(False).eval()
        self._size_px = size_px
        self._sample_posterior = sample_posterior
        self._scaling_factor = float(vae.config["scaling_factor"])

    @classmethod
    def load(
        cls, folder: Path, size_px: int, sample_posterior: bool, dtype: torch.dtype, device: torch.device
    ) -> "VaeCodec":
        """The VAE of a folder that ``priors.find.resolve_prior`` has found good; on the meta device without its
        weights.
        """
        if device.type == "meta":
            with device:
                vae = AutoencoderKL.from_config(layout.read_config(folder, "vae/config.json"))
            torch.nn.Module.to(vae, dtype)  # diffusers' own warns of weights, of which there are none
        else:
            vae = AutoencoderKL.from_pretrained(
                folder,
                subfolder="vae",
                variant=layout.weights_variant(folder, "vae"),
                torch_dtype=dtype,
                local_files_only=True,
            )
        vae.to(device, memory_format=memory_format(dtype, device))
        return cls(vae, size_px or layout.native_image_px(folder), sample_posterior)

    def encode(self, render: Render, generator: torch.Generator) -> Float[Tensor, "view latent lh lw"]:
        """The latent of ``render.rgb``; ``generator`` is drawn from only if the posterior is sampled."""
        pixels = resize(render.rgb.permute(0, 3, 1, 2), self._size_px) * 2 - 1
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latents = posterior.mean
        if self._sample_posterior:
            noise = torch.randn(latents.shape, generator=generator, device=generator.device)
            latents = latents + posterior.std * send(noise, latents.device).to(latents.dtype)
        return latents.to(pixels.dtype) * self._scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "view latent lh lw"]) -> Float[Tensor, "view h w 3"]:
        scaled = latents.to(self.vae.dtype) / self._scaling_factor
        pixels = self.vae.decode(scaled, return_dict=False)[0].to(latents.dtype)
        return (pixels.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
