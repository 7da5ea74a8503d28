"""A folder in the diffusers layout: its parts, what their configs say, and which of its weights to read.

Imports no torch and no library but the standard one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from raydream.diffusion.weight_files import check_whole, weights_files

LEXICON = "lexicon.json"
PredictionType = Literal["epsilon", "v_prediction"]

WEIGHT_STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}


def latent_px(folder: Path) -> int:
    """The width and height of the latents that the prior's UNet was made for."""
    return int(read_config(folder, "unet/config.json")["sample_size"])


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The prior's own scheduler settings, from which its betas and its prediction type are read."""
    return read_config(folder, "scheduler/scheduler_config.json")


def prediction_type(scheduler: Mapping[str, Any]) -> PredictionType:
    """What the prior's UNet answers; old configs do not say and mean the noise. ``ValueError`` for any other kind."""
    match scheduler.get("prediction_type", "epsilon"):
        case "epsilon":
            return "epsilon"
        case "v_prediction":
            return "v_prediction"
        case kind:
            raise ValueError(f"prior: it predicts {kind!r}; raydream can use 'epsilon' and 'v_prediction'")


def weights_variant(folder: Path, part: str) -> str | None:
    """The ``variant`` that diffusers must be asked for: None for plain weights, "fp16" where there are only those.

    ``ValueError`` about ``prior`` where there are none, and naming the file where one of them is not whole.
    """
    for variant in (None, "fp16"):
        try:
            found = [path for stem in WEIGHT_STEMS[part] for path in weights_files(folder / part, stem, variant)]
            for path in found:
                check_whole(path)
        except ValueError as error:
            raise ValueError(f"prior: {error}") from error
        if found:
            return variant
    raise ValueError(f"prior: {folder} has no weights in {part}/; the download may be incomplete")


def native_image_px(folder: Path) -> int:
    """The image size that the prior was made for: its UNet's latent size times its VAE's downscaling."""
    unet, vae = read_config(folder, "unet/config.json"), read_config(folder, "vae/config.json")
    return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """One JSON object of the folder; ``ValueError`` about ``prior`` where it is missing or is none."""
    path = folder / name
    ensure(path.is_file(), folder, f"has no {name}; it must be a folder in the diffusers layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"prior: {path} is not valid JSON ({error})") from error
    ensure(isinstance(content, dict), folder, f"has a {name} that is not a JSON object")
    return content


def ensure(condition: bool, folder: Path, what: str) -> None:
    """``ValueError`` about ``prior`` and its folder unless the condition holds."""
    if not condition:
        raise ValueError(f"prior: {folder} {what}")
