"""The fine-tuning of an aligned geometric prior, in one worker: steps, checkpoints, metrics, pictures. No Ray in here.

A run folder holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``samples/*.png`` (a row for each prompt, a
column for each camera) and ``agp/``, the averaged model as ``AgpDenoiser.load`` reads it.
"""

import functools
import io
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from raydream import seeds
from raydream.camera import orbit_cameras
from raydream.config import strict_json
from raydream.config.agp import AgpConfig, AgpDataConfig, AgpGridConfig
from raydream.config.render import ViewConfig
from raydream.coordinates import decode_ccm
from raydream.diffusion.guidance import add_noise, lora_target
from raydream.precision import arithmetic
from raydream.priors.agp import AgpDenoiser, AgpFacts
from raydream.priors.find import resolve_prior
from raydream.store.run_folder import CONFIG, RunFolder
from raydream.train.agp import checkpoint
from raydream.train.agp.samples import SCENE_UNITS, Samples, SampleSource, camera_weights, draw_captions
from raydream.train.captions import phrase
from raydream.train.engine import EngineMaker
from raydream.train.learner import Learner
from raydream.train.loop import Every, MetricsRow, Stage, Worker, train
from raydream.train.sampling import sample, stratified_timesteps
from raydream.train.texts import CachedTexts
from raydream.types import Condition

AGP, SAMPLES = "agp", "samples"
_GRID_PROMPTS = 8


@dataclass(frozen=True)
class AgpSession:
    """Where one worker trains, on what, and by which engine."""

    run: RunFolder
    prior: Path
    views: ViewConfig
    source: SampleSource
    make_engine: EngineMaker
    worker: Worker


@dataclass(frozen=True)
class AgpBatch:
    """Maps, the noise that was added to them, and what the denoiser is told, on its device."""

    latents: Float[Tensor, "view 4 h w"]
    noise: Float[Tensor, "view 4 h w"]
    noised: Float[Tensor, "view 4 h w"]
    t: Int[Tensor, " view"]
    cond: Condition


def finetune_agp(config: AgpConfig, session: AgpSession) -> bool:
    """Fine-tunes, or goes on with, the AGP in a run folder; True when it is finished.

    Run it again with the same settings after any interruption, with any number of workers. ValueError names ``out``
    where the folder's settings or checkpoint do not fit.
    """
    torch.set_num_threads(config.num_threads)
    team, device = session.worker.team, session.worker.device
    with ExitStack() as stack:
        if team.rank == 0:
            stack.enter_context(session.run.lock())
        check_settings(config, session.run)
        denoiser = AgpDenoiser.from_prior(session.prior, config.model.rank, config.seed, device)
        facts = replace(denoiser.facts, distance=_scene_distance(session.views), fov_y_deg=session.views.fov_y_deg)
        texts = CachedTexts.load(session.prior, device)
        found = session.run.latest_checkpoint() if team.rank == 0 else None
        step = int(team.largest([float(found.step if found else -1)], device)[0])
        if config.start and step < 0:
            begin_from(denoiser, config)
        if config.model.gradient_checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        denoiser.unet.train()
        loss = functools.partial(_loss, config, session, denoiser, texts)
        learner = checkpoint.begin(
            denoiser, config.stage, team, session.make_engine, session.run, step if step >= 0 else None, lambda: loss(0)
        )
        if team.rank == 0:
            session.run.truncate_metrics(learner.step + 1)
            session.run.write_text(CONFIG, strict_json.dumps(config) + "\n")
        shown = _Shown(config, session, texts, facts)
        stage = Stage(
            loss=lambda: loss(learner.step),
            save=lambda: _save(learner, facts.prior_sha256, config, session),
            show=lambda: shown.write(learner),
            log=functools.partial(_log, session),
            log_every_steps=config.log_every_steps,
            save_every=Every(steps=config.save_every_steps),
            show_every=Every(steps=config.sample_every_steps),
            shows_when_stopped=True,
        )
        done = train(learner, stage, session.worker)
        session.run.close()
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
    abar = denoiser.alphas_cumprod[batch.t]
    return (answer - lora_target(denoiser.prediction_type, batch.latents, batch.noise, abar)).square().mean()


def make_batch(
    denoiser: AgpDenoiser, texts: CachedTexts, samples: Samples, data: AgpDataConfig, generator: torch.Generator
) -> AgpBatch:
    """Samples with noise of levels that cover 0..999 evenly, a caption each, texts and cameras dropped here and
    there.
    """
    size, device = len(samples.cards), denoiser.unet.device
    t = stratified_timesteps(size, generator)
    noise = torch.randn(samples.latents.shape, generator=generator).to(device)
    text = texts.encode(draw_captions(samples, data, generator))
    weights = camera_weights(size, data, generator).to(device)
    latents, t = samples.latents.to(device), t.to(device)
    cond = Condition(text, samples.c2w.to(device), samples.fov_y_deg.to(device), weights)
    return AgpBatch(latents, noise, add_noise(latents, noise, denoiser.alphas_cumprod[t]), t, cond)


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


def picture(latents: Float[Tensor, "view 4 h w"], columns: int, zoom: int = 4) -> bytes:
    """Maps as colours (x, y, z as red, green, blue) on white, row by row; a PNG."""
    coordinates, opacity = decode_ccm(latents.float().cpu())
    images = coordinates * opacity + (1 - opacity)
    view, height, width, _ = images.shape
    sheet = images.view(view // columns, columns, height, width, 3).permute(0, 2, 1, 3, 4)
    pixels = (sheet.reshape(-1, columns * width, 3) * 255).round().byte()
    pixels = pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _loss(config: AgpConfig, session: AgpSession, denoiser: AgpDenoiser, texts: CachedTexts, step: int) -> Tensor:
    """The loss of this worker's batch at a step."""
    draw = seeds.generator(config.seed, "agp batch", session.worker.team.rank, step)
    samples = session.source.samples(config.stage.batch_size, draw)
    return agp_loss(denoiser, make_batch(denoiser, texts, samples, config.data, draw), config.bfloat16)


def _log(session: AgpSession, row: MetricsRow) -> None:
    if session.worker.team.rank == 0:
        session.run.append_metrics([row])
    session.worker.report(row)


def _save(learner: Learner[nn.Module], prior_sha256: str, config: AgpConfig, session: AgpSession) -> None:
    checkpoint.save(learner, session.run, prior_sha256)
    if session.worker.team.rank == 0:
        session.run.prune_checkpoints(config.keep_checkpoints)


class _Shown:
    """The averaged model as the run folder shows it: its files, and a grid of its samples."""

    def __init__(self, config: AgpConfig, session: AgpSession, texts: CachedTexts, facts: AgpFacts) -> None:
        self._config, self._session, self._texts, self._facts = config, session, texts, facts
        self._denoiser: AgpDenoiser | None = None

    def write(self, learner: Learner[nn.Module]) -> None:
        """Writes both, in rank 0; all workers call it together."""
        averaged = learner.averaged()
        if self._session.worker.team.rank:
            return
        run, config = self._session.run, self._config
        rank = config.model.export_rank or config.model.rank
        if self._denoiser is None:
            self._denoiser = AgpDenoiser.from_prior(self._session.prior, rank, config.seed, self._session.worker.device)
            self._denoiser.unet.eval()
        if config.model.export_rank:
            self._denoiser.load_nearest(averaged)
        else:
            self._denoiser.load_state(averaged)
        facts = replace(self._facts, num_steps=learner.step, rank=rank)
        for name, content in self._denoiser.files(facts).items():
            run.write_bytes(f"{AGP}/{name}", content)
        grid = config.grid
        prompts = grid.prompts or tuple(phrase(noun) for noun in self._session.source.nouns()[:_GRID_PROMPTS])
        if prompts:
            distance, fov = (sum(low_high) / 2 for low_high in (facts.distance, facts.fov_y_deg))
            cond = grid_condition(self._texts, prompts, grid, distance, fov)
            generator = seeds.generator(config.seed, "agp grid", 0, 0)
            empty = self._texts.encode([""])[0]
            maps = sample_maps(self._denoiser, cond, empty, grid.cfg_scale, grid.sample_steps, generator)
            run.write_bytes(f"{SAMPLES}/step_{facts.num_steps:07d}.png", picture(maps, len(grid.azimuths_deg)))


def _scene_distance(views: ViewConfig) -> tuple[float, float]:
    units = SCENE_UNITS[views.normalise]
    return units * views.distance[0], units * views.distance[1]
