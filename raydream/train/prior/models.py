"""The four parts of a small Stable-Diffusion-class prior: built from settings, or loaded from a folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raydream.config.train import UnetConfig, VaeConfig
from raydream.diffusion.denoiser import load_unet, suit_attention
from raydream.diffusion.guidance import add_noise, alphas_cumprod, v_target
from raydream.diffusion.layout import LEXICON
from raydream.diffusion.text import encode_texts, load_text_encoder
from raydream.train.captions import Lexicon
from raydream.train.sampling import sample
from raydream.train.word_tokenizer import word_tokenizer

_LATENT_CHANNELS = 4
_START_LOG_VARIANCE = -6.0


@dataclass(frozen=True)
class PriorModels:
    """A prior at work: everything on one device, images in [-1, 1], latents already times the scaling factor."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    lexicon: Lexicon

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def alphas_cumprod(self) -> Float[Tensor, "1000"]:
        return alphas_cumprod(self.scheduler.config).float().to(self.device)

    def encode_text(self, captions: list[str]) -> Float[Tensor, "view token width"]:
        """The text encoder's last hidden states; what is too long is cut. Differentiable by the encoder."""
        return encode_texts(self.tokenizer, self.text_encoder, captions, self.tokenizer.model_max_length)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "view 3 h w"]) -> Float[Tensor, "view 4 lh lw"]:
        """The posterior's mean, as raydream's particles encode their renders."""
        return self.vae.encode(images).latent_dist.mean.float() * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "view 4 lh lw"]) -> Float[Tensor, "view 3 h w"]:
        """Images in [-1, 1]."""
        return self.vae.decode(latents / self.vae.config["scaling_factor"], return_dict=False)[0].float().clamp(-1, 1)

    def v_loss(
        self,
        latents: Float[Tensor, "view 4 h w"],
        text: Float[Tensor, "view token width"],
        t: Int[Tensor, " view"],
        noise: Float[Tensor, "view 4 h w"],
    ) -> Float[Tensor, " view"]:
        """The v-prediction error of each view; its expectation is the training loss."""
        abar = self.alphas_cumprod()[t]
        answer = self.unet(add_noise(latents, noise, abar), t, text, return_dict=False)[0].float()
        return (answer - v_target(latents, noise, abar)).square().mean(dim=(1, 2, 3))


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """A VAE that starts with quantisation convolutions that do nothing and with little posterior noise."""
    levels = len(config.channels)
    vae = AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(conv.bias)
        conv.weight.data.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
    vae.quant_conv.bias.data[_LATENT_CHANNELS:] = _START_LOG_VARIANCE
    return vae


def build_models(config: UnetConfig, vae: AutoencoderKL, image_px: int, lexicon: Lexicon) -> PriorModels:
    """A prior with untrained text encoder and UNet around a trained VAE."""
    tokenizer = word_tokenizer(lexicon.words, config.num_tokens)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        max_position_embeddings=config.num_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    levels = len(config.channels)
    reads = [level in config.attention for level in range(levels)]
    unet = UNet2DConditionModel(
        sample_size=image_px // 2 ** (len(vae.config["block_out_channels"]) - 1),
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        block_out_channels=config.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if read else "DownBlock2D" for read in reads),
        up_block_types=tuple("CrossAttnUpBlock2D" if read else "UpBlock2D" for read in reversed(reads)),
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.num_heads,  # diffusers' name for the number of heads
        norm_num_groups=config.norm_groups,
        use_linear_projection=True,
        addition_embed_type="text" if config.pooled_text else None,
        addition_embed_type_num_heads=config.text_heads,
    )
    nn.init.zeros_(unet.conv_out.weight)
    return PriorModels(vae, unet, CLIPTextModel(text_config), tokenizer, make_scheduler(config), lexicon)


def make_scheduler(config: UnetConfig) -> DDIMScheduler:
    """Stable Diffusion's noise, by default rescaled so that the last step is pure noise (arXiv 2305.08891): a small
    latent still shows its mean grey through the original's.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=config.zero_terminal_snr,
        steps_offset=1,  # what diffusers expects; timesteps that trail do not ask for it
        timestep_spacing="trailing",
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Float[Tensor, "view 3 h w"]) -> None:
    """Gives each latent channel mean 0 and deviation 1 over these images by rewriting the quantisation convolutions;
    reconstructions stay the same. The scaling factor is then measured, not assumed.
    """
    latents = vae.encode(images).latent_dist.mean.float()
    mean = latents.mean(dim=(0, 2, 3))
    deviation = latents.std(dim=(0, 2, 3)).clamp_min(1e-4)
    channels, moments, inverse = _LATENT_CHANNELS, vae.quant_conv, vae.post_quant_conv
    assert moments is not None and moments.bias is not None  # noqa: PT018
    assert inverse is not None and inverse.bias is not None  # noqa: PT018
    moments.weight[:channels] /= deviation[:, None, None, None]
    moments.bias[:channels] = (moments.bias[:channels] - mean) / deviation
    moments.bias[channels:] -= 2 * deviation.log()
    inverse.bias += inverse.weight[:, :, 0, 0] @ mean
    inverse.weight *= deviation[None, :, None, None]
    vae.register_to_config(scaling_factor=1 / float(vae.encode(images).latent_dist.mean.float().std()))


def load_models(folder: Path, device: torch.device) -> PriorModels:
    """A prior that ``export.export_prior`` wrote, in float32."""

    lexicon = Lexicon.loads((folder / LEXICON).read_text(encoding="utf-8"))
    tokenizer, text, _ = load_text_encoder(folder, device)
    unet = load_unet(folder, torch.float32)
    vae = load_vae(folder)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    suit_attention(unet, device)
    vae, unet = (module.float().eval().requires_grad_(False).to(device) for module in (vae, unet))
    return PriorModels(vae, unet, text, tokenizer, scheduler, lexicon)


def copy_weights(source: nn.Module, target: nn.Module, what: str) -> None:
    """Gives one model's weights to another; ValueError that begins with ``what`` where the shapes are others."""
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{what} has other layers than the settings ask for: {error}") from error


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a prior that ``export.export_prior`` wrote, in float32."""
    return AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)


@torch.no_grad()
def sample_latents(
    models: PriorModels, captions: list[str], cfg_scale: float, num_steps: int, generator: torch.Generator
) -> Float[Tensor, "view 4 h w"]:
    """New latents for captions, guided against the empty text."""
    text = models.encode_text(captions + [""] * len(captions))

    def answers(both: Float[Tensor, "view 4 h w"], t: Int[Tensor, ""]) -> tuple[Tensor, Tensor]:
        positive, negative = models.unet(both, t, text, return_dict=False)[0].float().chunk(2)
        return negative, positive

    side = int(models.unet.config["sample_size"])
    shape = (len(captions), _LATENT_CHANNELS, side, side)
    return sample(answers, models.scheduler.config, shape, cfg_scale, num_steps, generator, models.device)
