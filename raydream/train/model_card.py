"""The README.md of a trained prior: what it was made of, what it may be used for, and how well it knows its words."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from raydream.config import strict_json
from raydream.config.train import TrainConfig
from raydream.train.batches import BatchMaker
from raydream.train.captions import Lexicon
from raydream.train.gate import table
from raydream.views.view_set import ViewSet

GATE = "gate.json"


def write_card(
    folder: Path,
    lexicon: Lexicon,
    views: ViewSet,
    train: BatchMaker,
    config: TrainConfig,
    results: dict[str, Any],
    steps: dict[str, str],
) -> None:
    """Writes ``README.md`` and ``gate.json`` into a prior's folder."""
    licences = Counter(views.objects[subject.index].licence for subject in train.subjects)
    passed = results["passed"]
    verdict = (
        "passes all tests" if all(passed.values()) else f"fails: {', '.join(t for t, ok in passed.items() if not ok)}"
    )
    text = f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
---
# A small text-to-image prior of 3D objects

A latent diffusion model in the Stable Diffusion layout for {views.image_px} px images of single objects on a grey
ground, trained from nothing by `jobs/train_prior.py`. It is meant as a prior for text-to-3D, not as an image generator.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("THIS_FOLDER")
pipeline("a red chair", height={views.image_px}, width={views.image_px}, guidance_scale=4.0).images[0]
```

## Words
{len(lexicon.nouns)} nouns: {", ".join(sorted(lexicon.nouns))}.
Colours: {", ".join(lexicon.colours)}.
Sides: ", front view", ", side view", ", back view" (objects whose front is known).
Other words mean: {", ".join(f"{alias} = {noun}" for alias, noun in lexicon.aliases)}.

## Data
{len(train.subjects)} 3D models, {views.num_views} views each, by licence: {dict(licences)}. No image from the web.
Half of the renders are recoloured while training; light, grey level and mirroring are drawn each time. Never trained:
the pairs {", ".join(f"{colour} {noun}" for noun, colour in lexicon.held_out)}, one object in ten, and
{views.num_views - train.pixels.shape[1]} of the {views.num_views} angles of each trained one.

## Quality
The gate {verdict}. P[loss(right caption) < loss(wrong caption)] with the same noise; VAE as PSNR in dB:

{table(results)}

## Training
{json.dumps(steps)}

```json
{strict_json.dumps(_without_folders(config))}
```
"""
    (folder / GATE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")


def _without_folders(config: TrainConfig) -> TrainConfig:
    """A card that is given away does not tell the folders of the machine that wrote it."""
    vae = replace(config.vae, start=Path(config.vae.start).name)
    return replace(config, start=Path(config.start).name, vae=vae)
