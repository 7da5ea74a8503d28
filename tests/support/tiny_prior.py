"""A whole Stable-Diffusion-class prior in the diffusers layout, with random weights, small enough for a CPU."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raydream.bench.sd21 import SD21_SCHEDULE, SD21_UNET, SD21_VAE
from raydream.diffusion.layout import PredictionType

NUM_TOKENS = 64
TEXT_WIDTH = 32


def make_tiny_prior(
    folder: Path, prediction_type: PredictionType = "epsilon", seed: int = 0, latent_channels: int = 4
) -> Path:
    """Writes the prior and returns its folder: 64 px images, 16 x 16 latents, the same bytes for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=NUM_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text_encoder = CLIPTextModel(text_config)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=8,
            scaling_factor=0.5,
        )
    _save(folder, vae, text_encoder, tokenizer, unet, prediction_type)
    return folder


def make_sd21_prior(folder: Path) -> Path:
    """Writes a prior of Stable Diffusion 2.1's shapes with random weights in bfloat16, 1.9 GB, and returns its folder;
    its text encoder has two layers instead of 23.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=SD21_UNET["cross_attention_dim"],
            num_hidden_layers=2,
            num_attention_heads=16,
            max_position_embeddings=NUM_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        parts: Any = UNet2DConditionModel(**SD21_UNET), AutoencoderKL(**SD21_VAE), CLIPTextModel(config)
    unet, vae, text_encoder = (part.to(torch.bfloat16) for part in parts)
    _save(folder, vae, text_encoder, tokenizer, unet, "epsilon")
    return folder


def _save(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    prediction_type: PredictionType,
) -> None:
    scheduler = DDIMScheduler(
        **SD21_SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def _tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over single letters, digits and signs: there are no merges, so a token is a character."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=NUM_TOKENS)
