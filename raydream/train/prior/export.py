"""A trained prior as a folder that diffusers' ``StableDiffusionPipeline`` loads unmodified, and pictures of samples."""

import copy
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from raydream import seeds
from raydream.config.train import GateConfig
from raydream.diffusion.layout import LEXICON
from raydream.train.captions import Lexicon, phrase
from raydream.train.prior.models import PriorModels, sample_latents
from raydream.train.sampling import png_grid
from raydream.train.word_tokenizer import save_tokenizer

MAX_BYTES = 25_000_000
SHEET = "samples/sheet.png"
_SHEET_SIDE = 10


def export_prior(models: PriorModels, folder: Path) -> int:
    """Writes the prior in float16 and returns its size in bytes; an older one in the same place gives way at the end.

    Raises ValueError naming ``unet.channels`` where it would be larger than what may ship.
    """
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    vae, unet, text_encoder = (copy.deepcopy(each).half() for each in (models.vae, models.unet, models.text_encoder))
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, models.tokenizer, unet, models.scheduler,  # type: ignore[arg-type]
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip
    pipeline.save_pretrained(part)
    _name_dtype(part / "text_encoder" / "config.json")
    for config in part.glob("*/config.json"):
        _forget_origin(config)
    save_tokenizer(models.tokenizer, models.lexicon.words, part / "tokenizer")
    (part / LEXICON).write_text(models.lexicon.dumps() + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"unet.channels: the prior takes {size} bytes, more than {MAX_BYTES}")
    if (folder / "README.md").is_file():
        shutil.copy(folder / "README.md", part)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    return size


def save_grid(images: Float[Tensor, "view 3 h w"], path: Path, columns: int) -> None:
    """Images in [-1, 1] as one PNG, row by row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    path.write_bytes(png_grid(pixels.permute(0, 2, 3, 1), columns))


def sheet_prompts(lexicon: Lexicon, count: int) -> list[str]:
    """So many prompts: all nouns in turn, each time with another colour, and without one every third time."""
    nouns, colours = lexicon.nouns, lexicon.colours
    wanted = [(nouns[i % len(nouns)], colours[(7 * i + i // len(nouns)) % len(colours)]) for i in range(count)]
    return [phrase(noun, None if i % 3 == 2 else colour) for i, (noun, colour) in enumerate(wanted)]


def save_sheet(models: PriorModels, config: GateConfig, path: Path) -> None:
    """Ten by ten samples of ``sheet_prompts``, one draw each, and the prompts beside it as text."""
    prompts = sheet_prompts(models.lexicon, _SHEET_SIDE**2)
    generator = seeds.generator(0, "sheet", 0, 0)
    rows = [
        models.decode(
            sample_latents(models, prompts[i : i + _SHEET_SIDE], config.cfg_scale, config.sample_steps, generator)
        )
        for i in range(0, len(prompts), _SHEET_SIDE)
    ]
    save_grid(torch.cat(rows), path, _SHEET_SIDE)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def _forget_origin(path: Path) -> None:
    """A file that is given away does not tell the folders of the machine that wrote it."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _name_dtype(path: Path) -> None:
    """Has transformers load its part in float32 unless asked otherwise, as diffusers loads the others."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
