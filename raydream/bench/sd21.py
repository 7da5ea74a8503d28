"""Stable Diffusion 2.1's shapes without its weights: what is counted on them, or measured with random numbers in them,
holds for it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from raydream.config.actors import ScoreConfig
from raydream.config.branches import BranchConfig
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.graphs import Record
from raydream.diffusion.prompts import bank_prompts
from raydream.diffusion.text import TextBank
from raydream.diffusion.vae import VaeCodec
from raydream.distill.branches import Branch
from raydream.distill.score import Score
from raydream.priors.kinds import prior_kind
from raydream.seeds import generator

SD21_UNET: dict[str, Any] = {  # the published configs, as far as shapes go
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SD21_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SD21_SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD21_TOKENS = 77
# TFLOP of one view at 512 px, forward: the UNet, its passes forward and back through a LoRA, the VAE's encoder to the
# pixels and back (counted in tests/bench/test_flops.py)
UNET_TFLOP, LORA_TFLOP, VAE_TFLOP = 0.804, 1.715, 2.268
# A tenth as wide: as many layers, so as many launches, in seconds on a CPU.
NARROW_UNET = SD21_UNET | {
    "block_out_channels": [32, 64, 128, 128],
    "attention_head_dim": [1, 1, 2, 2],
    "cross_attention_dim": 64,
}  # latents of any size
NARROW_VAE = SD21_VAE | {"block_out_channels": [32] * 4}


def random_denoiser(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> DiffusersDenoiser:
    """A frozen UNet of random weights that predicts noise."""
    with device:
        unet = UNet2DConditionModel(**config)
    return DiffusersDenoiser(torch.nn.Module.to(unet, device=device, dtype=dtype), SD21_SCHEDULE)


def random_codec(
    config: Mapping[str, Any], size_px: int, sample_posterior: bool, dtype: torch.dtype, device: torch.device
) -> VaeCodec:
    """A VAE of random weights."""
    with device:
        vae = AutoencoderKL(**config)
    return VaeCodec(torch.nn.Module.to(vae, device=device, dtype=dtype), size_px, sample_posterior)


def random_texts(prompt: str, negative_prompt: str, branch: BranchConfig, width: int, device: torch.device) -> TextBank:
    """Embeddings of Stable Diffusion 2.1's length that say nothing."""
    draws = generator(0, "texts", 0, 0)
    texts = bank_prompts(prompt, negative_prompt)
    embeddings = {text: torch.randn(SD21_TOKENS, width, generator=draws).to(device) for text in texts}
    return TextBank(embeddings, prompt, negative_prompt, branch)


def random_score(
    config: ScoreConfig,
    unet: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    record: Record | None = None,
) -> Score:
    """A score model with one branch, whose LoRA stands on a UNet of its own where the settings name another prior."""
    (branch,) = config.branches
    frozen = random_denoiser(unet, dtype, device)
    texts = random_texts(config.prompt, config.negative_prompt, branch, int(unet["cross_attention_dim"]), device)
    learner = None
    if branch.learns:
        base = random_denoiser(unet, dtype, device) if config.learner.prior else frozen
        here = replace(config.learner, prior="")
        learner = prior_kind(config.prior).learner(base, here, generator(config.seed, "learner", 0, 0))
    return Score(config, device, [Branch(branch, frozen, texts, frozen.alphas_cumprod)], learner, record)
