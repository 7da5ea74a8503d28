"""The operation count of a VSD step with Stable Diffusion 2.1's real shapes: the minimum, on meta tensors."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raydream.diffusion import guidance
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.lora import LoraDenoiser
from raydream.diffusion.vae import VaeCodec
from raydream.types import Condition, Render

# TFLOP for one view, counted on the bare modules with nothing of raydream around them
UNET_FORWARD, LORA_FORWARD_BACKWARD, VAE_ENCODE_TO_PIXELS = 0.804, 1.715, 2.268
GUIDE, FIT = 2 * UNET_FORWARD + UNET_FORWARD, LORA_FORWARD_BACKWARD
META = torch.device("meta")


def sd21_denoiser_on_meta() -> DiffusersDenoiser:
    """The frozen UNet of Stable Diffusion 2.1 with shapes and no numbers."""
    with META:
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
    return DiffusersDenoiser(unet, {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


def views_on_meta(num_views: int) -> tuple[Tensor, Tensor, Condition]:
    """Clean latents, timesteps and conditions of so many views at 512 px."""
    with META:
        text, c2w = torch.empty(num_views, 77, 1024), torch.empty(num_views, 4, 4)
        cond = Condition(text, c2w, torch.empty(num_views), torch.empty(num_views))
        return torch.empty(num_views, 4, 64, 64), torch.zeros(num_views, dtype=torch.int64), cond


def count_tflop(work: Callable[[], object]) -> float:
    """What ``work`` costs, matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def test_parameter_counts_of_stable_diffusion() -> None:
    frozen = sd21_denoiser_on_meta()
    assert sum(value.numel() for value in frozen.unet.parameters()) == 865_910_724
    trainable = LoraDenoiser(frozen, rank=4, seed=0).trainable()
    sizes = {
        part: sum(v.numel() for name, v in trainable.items() if name.startswith(part)) for part in ("unet.", "camera.")
    }
    assert sizes == {"unet.": 829_952, "camera.": 1_661_440}
    assert sum(value.numel() for value in trainable.values()) == sum(sizes.values())


def test_guide_and_fit_cost_the_minimum() -> None:
    """One batched pass for guidance, one conditional LoRA pass, one LoRA training pass; no decoding, nothing twice."""
    frozen = sd21_denoiser_on_meta()
    lora = LoraDenoiser(frozen, rank=4, seed=0)
    num_views = 2
    z_0, t, cond = views_on_meta(num_views)
    noise, abar_t = torch.empty_like(z_0), frozen.alphas_cumprod[t]
    z_t = guidance.add_noise(z_0, noise, abar_t)

    def guide() -> None:
        with torch.no_grad():
            eps = guidance.eps_for_texts(frozen.eps, z_t, t, cond, torch.stack([cond.text, cond.text]))
            prior = guidance.classifier_free(eps[0], eps[1], 7.5)
            w_t = guidance.weight("one_minus_abar", abar_t)
            guidance.distillation_gradient(prior, lora.eps(z_t, t, cond), w_t)

    def fit() -> None:
        target = guidance.lora_target(lora.prediction_type, z_0, noise, abar_t)
        (lora.predict(z_t, t, cond) - target).square().mean().backward()

    assert count_tflop(guide) == pytest.approx(num_views * GUIDE, rel=0.01)
    assert count_tflop(fit) == pytest.approx(num_views * FIT, rel=0.01)
    assert all(value.grad is not None for value in lora.trainable().values())


def test_encoding_a_view_costs_the_minimum() -> None:
    with META:
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        rgb = torch.empty(1, 512, 512, 3, requires_grad=True)
        opacity = torch.empty(1, 512, 512, 1)
    codec, render = VaeCodec(vae, 512, sample_posterior=False), Render(rgb, rgb, opacity, opacity)

    def encode() -> None:
        codec.encode(render, torch.Generator()).sum().backward()

    assert count_tflop(encode) == pytest.approx(VAE_ENCODE_TO_PIXELS, rel=0.01)
    assert rgb.grad is not None
