"""The choice of a codec: colour and opacity as they are (``latent.py``), or a prior's VAE (``vae.py``)."""

from pathlib import Path
from typing import Literal

import torch

from raydream.diffusion.latent import LatentCodec, RgbaCodec

CodecKind = Literal["vae", "rgba"]


def make_codec(
    kind: CodecKind, size_px: int, prior: Path | None, sample_posterior: bool, dtype: torch.dtype, device: torch.device
) -> LatentCodec:
    """The codec of a prior; "rgba" needs none. ``size_px`` is the image size before encoding, 0 for the natural one."""
    if kind == "rgba":
        return RgbaCodec(size_px)
    assert prior is not None, "a VAE codec needs the folder of its prior"
    from raydream.diffusion.vae import VaeCodec  # diffusers takes seconds to import, and "rgba" does not need it

    return VaeCodec.load(prior, size_px, sample_posterior, dtype, device)
