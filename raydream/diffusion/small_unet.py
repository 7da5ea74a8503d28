"""The learned reference beside an exact score: a small UNet (that of a diffusers prior is its LoRA, in ``lora.py``)."""

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raydream.config.prior import SMALL_UNET_PATCH_PX
from raydream.diffusion.guidance import PredictionType, eps_from_v
from raydream.precision import arithmetic
from raydream.types import Condition, Latents


class SmallUnetLearner(nn.Module):
    """A camera-conditioned v-prediction UNet, trained from nothing during the run.

    It works on 4x4 patches, so 64 px latents cost as much as a 16 px UNet. v-prediction behaves at both ends of t: it
    is the image at high noise and the noise at low noise.
    """

    prediction_type: PredictionType = "v_prediction"
    dtype = torch.float32  # beside bfloat16, whose range is as wide

    def __init__(
        self,
        channels: tuple[int, ...],
        latent_px: int,
        alphas_cumprod: Float[Tensor, " t"],
        bfloat16: str,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._bfloat16 = bfloat16
        self._patch = SMALL_UNET_PATCH_PX if latent_px % 16 == 0 else 1
        self._alphas_cumprod = alphas_cumprod
        patch_channels = 4 * self._patch**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            self.unet = UNet2DModel(
                sample_size=latent_px // self._patch,
                in_channels=patch_channels,
                out_channels=patch_channels,
                block_out_channels=channels,
                down_block_types=("DownBlock2D",) * len(channels),
                up_block_types=("UpBlock2D",) * len(channels),
                layers_per_block=1,
                norm_num_groups=16,
                add_attention=False,
                class_embed_type="identity",
            )
            width = 4 * channels[0]
            self.camera = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.unet.conv_out.weight)

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The predicted noise."""
        abar = self._alphas_cumprod.to(z_t)[t]
        return eps_from_v(self.predict(z_t, t, cond), z_t, abar)

    def predict(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The predicted v = alpha eps - sigma z_0."""
        camera = self.camera(cond.c2w.flatten(1)) * cond.camera_weight[:, None]
        patches = F.pixel_unshuffle(z_t, self._patch)
        with arithmetic(self._bfloat16, z_t.device):
            answer = self.unet(patches, t, class_labels=camera).sample
        return F.pixel_shuffle(answer.to(z_t.dtype), self._patch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters, by name."""
        return dict(self.named_parameters())
