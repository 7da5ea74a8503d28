"""The frozen UNet of a Stable-Diffusion-class prior as a ``Denoiser``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor

from raydream.diffusion import layout
from raydream.diffusion.guidance import alphas_cumprod, eps_from_v
from raydream.precision import memory_format, tf32
from raydream.types import Condition, Latents

_MAX_PLAIN_SIDE = 32


def suit_attention(unet: UNet2DConditionModel, device: torch.device) -> None:
    """Gives a small UNet on a CPU the plain attention: PyTorch's fused kernel takes several times as long to go
    backward over the few tokens that such a UNet has (19 % of a training step at 16x16 latents, 12 tokens of text).
    """
    if device.type == "cpu" and int(unet.config["sample_size"]) <= _MAX_PLAIN_SIDE:
        unet.set_attn_processor(AttnProcessor())


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a prior that ``priors.find.resolve_prior`` has found good, on the CPU."""
    return UNet2DConditionModel.from_pretrained(
        folder,
        subfolder="unet",
        variant=layout.weights_variant(folder, "unet"),
        torch_dtype=dtype,
        local_files_only=True,
    )


class DiffusersDenoiser:
    """A frozen UNet that reads text and time; whether it predicts noise or v is read from the prior and hidden inside.

    Works in the UNet's own dtype and answers in the dtype of ``z_t``. Differentiable by ``z_t`` unless the caller says
    ``no_grad``. Arguments must lie on the UNet's device. ``call`` is what runs the UNet; a training engine may put
    itself in its place.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: Mapping[str, Any]) -> None:
        self.unet = unet.requires_grad_(False).eval()
        self.call: Callable[..., tuple[Tensor]] = unet
        suit_attention(unet, unet.device)
        self.prediction_type = layout.prediction_type(scheduler)
        self.alphas_cumprod: Float[Tensor, "1000"] = alphas_cumprod(scheduler).float().to(unet.device)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> "DiffusersDenoiser":
        """The denoiser of a folder that ``priors.find.resolve_prior`` has found good; on the meta device without its
        weights.
        """
        if device.type == "meta":
            with device:
                unet = UNet2DConditionModel.from_config(layout.read_config(folder, "unet/config.json"))
            torch.nn.Module.to(unet, dtype)  # diffusers' own warns of weights, of which there are none
        else:
            unet = load_unet(folder, dtype)
        unet.to(device, memory_format=memory_format(dtype, device))  # type: ignore[arg-type]
        return cls(unet, layout.scheduler_config(folder))

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The predicted noise; the camera is not looked at."""
        return self.to_eps(self.run(z_t, t, cond.text), z_t, t)

    def run(
        self,
        z_t: Latents,
        t: Int[Tensor, " view"],
        text: Float[Tensor, "view token width"],
        extra: Float[Tensor, "view feature"] | None = None,
    ) -> Latents:
        """The UNet's answer in its own parametrisation; ``extra`` is for a module in its class embedding slot."""
        dtype = self.unet.dtype
        with tf32():
            answer = self.call(z_t.to(dtype), t, text.to(dtype), class_labels=extra, return_dict=False)[0]
        return answer.to(z_t.dtype)

    def to_eps(self, answer: Latents, z_t: Latents, t: Int[Tensor, " view"]) -> Latents:
        """The noise that the UNet's answer implies."""
        if self.prediction_type == "epsilon":
            return answer
        return eps_from_v(answer, z_t, self.alphas_cumprod[t].to(z_t.dtype))
