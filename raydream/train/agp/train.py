"""The fine-tuning of an aligned geometric prior, in one worker: steps, checkpoints, metrics, pictures. No Ray in here.

A run folder holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``samples/*.png`` (a row for each prompt, a
column for each camera) and ``agp/``, the averaged model as ``AgpDenoiser.load`` reads it.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream import seeds
from raydream.camera import orbit_cameras
from raydream.config import strict_json
from raydream.config.agp import AgpConfig, AgpGridConfig
from raydream.config.render import ViewConfig
from raydream.coordinates import decode_ccm
from raydream.diffusion.guidance import add_noise, lora_target, stratified_timesteps
from raydream.precision import arithmetic
from raydream.priors.agp import AgpDenoiser
from raydream.priors.find import resolve_prior
from raydream.store.run_folder import CONFIG, RunFolder
from raydream.train.agp import checkpoint
from raydream.train.agp.samples import SCENE_UNITS, SampleSource, camera_weights, draw_captions
from raydream.train.captions import phrase
from raydream.train.loop import Every, MetricsRow, Stage, Worker, train
from raydream.train.sampling import png_grid, sample
from raydream.train.texts import CachedTexts
from raydream.types import Condition

AGP, SAMPLES = "agp", "samples"
_GRID_PROMPTS, _GRID_ZOOM = 8, 4
DataKind = Literal["memory", "stream"]


@dataclass(frozen=True)
class AgpRequest:
    """A checked request: nothing in it can fail for a mistake of the user's. ``deepspeed`` is None without it."""

    views: str
    prior: Path
    out: str
    config: AgpConfig
    deepspeed: Mapping[str, Any] | None
    data: DataKind
    latent_px: int
    view_config: ViewConfig


@dataclass(frozen=True)
class AgpBatch:
    """Maps, the noise that was added to them, and what the denoiser is told, on its device."""

    latents: Float[Tensor, "view 4 h w"]
    noise: Float[Tensor, "view 4 h w"]
    noised: Float[Tensor, "view 4 h w"]
    t: Int[Tensor, " view"]
    cond: Condition


def finetune_agp(request: AgpRequest, source: SampleSource, worker: Worker) -> bool:
    """One worker's part of fine-tuning, or going on with, the AGP in a run folder; True when it is finished.

    Run it again with the same settings after any interruption, with any number of workers. ValueError names ``out``
    where the folder's settings or checkpoint do not fit.
    """
    config, team, run = request.config, worker.team, RunFolder.open(request.out)
    torch.set_num_threads(config.num_threads)
    with run.lock() if team.rank == 0 else nullcontext():
        check_settings(config, run)
        denoiser = AgpDenoiser.from_prior(request.prior, config.model.rank, config.seed, worker.device)
        texts = CachedTexts.load(request.prior, worker.device)
        found = run.latest_checkpoint() if team.rank == 0 else None
        step = int(team.largest([float(found.step if found else -1)], worker.device)[0])
        if config.start and step < 0:
            begin_from(denoiser, config)
        if config.model.gradient_checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        denoiser.unet.train()

        def loss(step: int) -> Tensor:
            return agp_loss(denoiser, draw_batch(config, denoiser, texts, source, team.rank, step), config.bfloat16)

        def save() -> None:
            checkpoint.save(learner, run, denoiser.facts.prior_sha256)
            if team.rank == 0:
                run.prune_checkpoints(config.keep_checkpoints)

        def log(row: MetricsRow) -> None:
            if team.rank == 0:
                run.append_metrics([row])
            worker.report(row)

        learner = checkpoint.begin(
            denoiser, config.stage, team, request.deepspeed, run, step if step >= 0 else None, lambda: loss(0)
        )
        if team.rank == 0:
            run.truncate_metrics(learner.step + 1)
            run.write_text(CONFIG, strict_json.dumps(config) + "\n")
        stage = Stage(
            loss=loss,
            save=save,
            show=lambda average: _show(average, learner.step, request, run, texts, source),
            log=log,
            log_every_steps=config.log_every_steps,
            save_every=Every(steps=config.save_every_steps),
            show_every=Every(steps=config.sample_every_steps),
            shows_when_stopped=True,
        )
        done = train(learner, stage, worker)
        run.close()
        return done


def begin_from(denoiser: AgpDenoiser, config: AgpConfig) -> None:
    """Gives an untrained AGP the weights of the trained one that ``config.start`` names, as near as its rank allows;
    ValueError naming ``start`` or ``start_prior`` where they do not fit.
    """
    try:
        found = AgpDenoiser.load(Path(config.start), resolve_prior(config.start_prior), denoiser.unet.device)
        denoiser.load_nearest(found.whole_state())
    except ValueError as error:
        raise ValueError(f"start, start_prior: {error}") from error


def check_settings(config: AgpConfig, run: RunFolder) -> None:
    """ValueError naming ``out`` where the folder holds a fine-tuning with another seed, model or data."""
    saved = strict_json.loads(AgpConfig, run.read_config())
    if (saved.seed, saved.model, saved.data) != (config.seed, config.model, config.data):
        raise ValueError(
            f"out: {run.uri} holds an AGP with other seed, model or data settings; give another folder, or change "
            "only stage.*, grid.* and how often it is saved and shown"
        )


def agp_loss(denoiser: AgpDenoiser, batch: AgpBatch, bfloat16: str) -> Tensor:
    """The mean squared error in the prior's own parametrisation; differentiable by the denoiser."""
    with arithmetic(bfloat16, batch.latents.device):
        answer = denoiser.predict(batch.noised, batch.t, batch.cond).float()
    abar = denoiser.model.alphas_cumprod[batch.t]
    return (answer - lora_target(denoiser.model.prediction_type, batch.latents, batch.noise, abar)).square().mean()


def draw_batch(
    config: AgpConfig, denoiser: AgpDenoiser, texts: CachedTexts, source: SampleSource, rank: int, step: int
) -> AgpBatch:
    """A worker's batch of a step: samples with noise of levels that cover 0..999 evenly, a caption each, texts and
    cameras dropped here and there.
    """
    size, device = config.stage.batch_size, denoiser.unet.device
    generator = seeds.generator(config.seed, "agp batch", rank, step)
    samples = source.samples(size, generator)
    t = stratified_timesteps(size, generator)
    noise = torch.randn(samples.latents.shape, generator=generator).to(device)
    text = texts.encode(draw_captions(samples, config.data, generator))
    weights = camera_weights(size, config.data, generator).to(device)
    latents, t = samples.latents.to(device), t.to(device)
    cond = Condition(text, samples.c2w.to(device), samples.fov_y_deg.to(device), weights)
    return AgpBatch(latents, noise, add_noise(latents, noise, denoiser.model.alphas_cumprod[t]), t, cond)


@torch.no_grad()
def sample_maps(
    denoiser: AgpDenoiser,
    cond: Condition,
    empty: Float[Tensor, "token width"],
    cfg_scale: float,
    num_steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "view 4 h w"]:
    """New maps for texts and cameras, guided against the empty text seen from the same cameras."""
    cameras = (cond.c2w, cond.fov_y_deg, cond.camera_weight)
    both = Condition(torch.cat([empty.expand_as(cond.text), cond.text]), *(torch.cat([each, each]) for each in cameras))

    def answers(latents: Float[Tensor, "view 4 h w"], t: Int[Tensor, ""]) -> tuple[Tensor, Tensor]:
        negative, positive = denoiser.predict(latents, t.expand(len(latents)), both).chunk(2)
        return negative, positive

    side = int(denoiser.unet.config["sample_size"])
    shape = (len(cond.text), 4, side, side)
    return sample(answers, denoiser.scheduler, shape, cfg_scale, num_steps, generator, denoiser.unet.device)


def grid_condition(
    texts: CachedTexts, prompts: tuple[str, ...], grid: AgpGridConfig, distance: float, fov_y_deg: float
) -> Condition:
    """Every prompt from every camera of the grid, prompt by prompt."""
    angles = torch.tensor(grid.azimuths_deg * len(prompts))
    elevation, far, fov = (torch.full_like(angles, value) for value in (grid.elevation_deg, distance, fov_y_deg))
    cameras = orbit_cameras(angles, elevation, far, fov, 1, 1)
    text = texts.encode([prompt for prompt in prompts for _ in grid.azimuths_deg])
    device = text.device
    weight = torch.ones(len(angles), device=device)
    return Condition(text, cameras.c2w.to(device), cameras.fov_y_deg.to(device), weight)


def _show(
    average: Mapping[str, Tensor],
    step: int,
    request: AgpRequest,
    run: RunFolder,
    texts: CachedTexts,
    source: SampleSource,
) -> None:
    """Writes the averaged model as the run folder shows it: its files, and a grid of its samples."""
    config, grid, views = request.config, request.config.grid, request.view_config
    rank = config.model.export_rank or config.model.rank
    denoiser = AgpDenoiser.from_prior(request.prior, rank, config.seed, texts.device)
    denoiser.unet.eval()
    if config.model.export_rank:
        denoiser.load_nearest(average)
    else:
        denoiser.load_state(average)
    units = SCENE_UNITS[views.normalise]
    distance = units * views.distance[0], units * views.distance[1]
    facts = replace(denoiser.facts, distance=distance, fov_y_deg=views.fov_y_deg, num_steps=step)
    for name, content in denoiser.files(facts).items():
        run.write_bytes(f"{AGP}/{name}", content)
    prompts = grid.prompts or tuple(phrase(noun) for noun in source.nouns()[:_GRID_PROMPTS])
    if prompts:
        cond = grid_condition(texts, prompts, grid, sum(distance) / 2, sum(views.fov_y_deg) / 2)
        generator = seeds.generator(config.seed, "agp grid", 0, 0)
        maps = sample_maps(denoiser, cond, texts.encode([""])[0], grid.cfg_scale, grid.sample_steps, generator)
        coordinates, opacity = decode_ccm(maps.float().cpu())  # x, y, z as red, green, blue on white
        picture = png_grid(coordinates * opacity + (1 - opacity), len(grid.azimuths_deg), _GRID_ZOOM)
        run.write_bytes(f"{SAMPLES}/step_{step:07d}.png", picture)
