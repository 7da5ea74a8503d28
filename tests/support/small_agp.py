"""A small untrained prior and a few rendered maps, for the tests of the aligned geometric prior."""

from dataclasses import replace
from pathlib import Path

import torch
from small_views import small_config, small_views

from raydream.backend import load_backend
from raydream.config import strict_json
from raydream.config.agp import AgpConfig, AgpGridConfig, AgpModelConfig
from raydream.config.render import RenderJobConfig, prior_recipe
from raydream.config.train import StageSettings, UnetConfig
from raydream.store.storage import resolve
from raydream.train.captions import make_lexicon, object_palette
from raydream.train.prior.export import export_prior
from raydream.train.prior.models import build_models, build_vae
from raydream.views.folder import VIEWS, read_shard_records, shard_name
from raydream.views.plan import open_plan
from raydream.views.render import render_record
from raydream.views.schema import ShardBuffer, views_schema

LATENT_PX, NUM_OBJECTS, NUM_VIEWS = 8, 4, 4


def write_prior(folder: Path, seed: int = 0, zero_terminal_snr: bool = True) -> Path:
    """A prior with random weights in the diffusers layout: 8 x 8 latents, two levels, v-prediction."""
    torch.manual_seed(seed)
    config, views = small_config(1, 1), small_views(4)
    unet = UnetConfig(
        channels=(16, 32), norm_groups=8, num_heads=2, text_width=16, text_layers=1, text_heads=2, num_tokens=16,
        zero_terminal_snr=zero_terminal_snr, stage=config.unet.stage,
    )  # fmt: skip
    lexicon = make_lexicon(views, object_palette(views), config.words)
    models = build_models(unet, build_vae(config.vae), LATENT_PX * 4, lexicon)
    torch.nn.init.normal_(models.unet.conv_out.weight, std=0.02)
    export_prior(models, folder)
    return folder


def view_recipe() -> RenderJobConfig:
    """Four procedural objects, four views of 16 px."""
    plain = prior_recipe()
    views = replace(plain.views, num_views=NUM_VIEWS, image_px=2 * LATENT_PX, supersample=1, images=("alpha", "ccm"))
    library = replace(plain.library, source="procedural", max_objects=NUM_OBJECTS)
    return replace(plain, views=views, library=library, pool=replace(plain.pool, objects_per_shard=2))


def write_views(folder: Path, config: RenderJobConfig) -> str:
    """What ``jobs/render_ccm.py`` would write, in this process."""
    files = resolve(str(folder), None)
    plan = open_plan(files, config)
    backend = load_backend("auto", "cpu")
    for shard in range(plan.num_shards):
        rows = ShardBuffer(views_schema(config.views))
        for record in read_shard_records(files, plan, shard):
            rows.append(render_record(record, config.views, backend))
        files.write(shard_name(VIEWS, shard), rows.finish())
    return str(folder)


def agp_config(num_steps: int, rank: int = 4) -> AgpConfig:
    """Seconds of training."""
    stage = StageSettings(num_steps=num_steps, batch_size=4, lr=3e-3, warm_up_steps=1, ema_decay=0.9)
    grid = AgpGridConfig(prompts=("a chair",), azimuths_deg=(0.0, 90.0), sample_steps=2)
    return AgpConfig(
        model=AgpModelConfig(rank), stage=stage, grid=grid, bfloat16="off", save_every_steps=2, sample_every_steps=100,
        log_every_steps=1,
    )  # fmt: skip


def settings_json(config: AgpConfig, path: Path) -> str:
    """The settings as a file for ``--config``."""
    path.write_text(strict_json.dumps(config), encoding="utf-8")
    return str(path)
