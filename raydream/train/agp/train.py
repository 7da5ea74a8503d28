"""The fine-tuning of an aligned geometric prior, in one worker: steps, checkpoints, metrics, pictures. No Ray in here.

A run folder holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``samples/*.png`` (a row for each prompt, a
column for each camera) and ``agp/``, the averaged model as ``AgpDenoiser.load`` reads it.
"""

import io
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from raydream import seeds
from raydream.camera import orbit_cameras
from raydream.config import strict_json
from raydream.config.agp import AgpConfig, AgpDataConfig, AgpGridConfig
from raydream.config.render import ViewConfig
from raydream.coordinates import decode_ccm
from raydream.diffusion.guidance import add_noise, classifier_free, lora_target
from raydream.precision import arithmetic
from raydream.priors.agp import AgpDenoiser, AgpFacts
from raydream.priors.agp_texts import AgpTexts
from raydream.priors.find import resolve_prior
from raydream.store.run_folder import CONFIG, RunFolder
from raydream.train.agp.learner import AgpLearner, EngineMaker
from raydream.train.agp.samples import SCENE_UNITS, Samples, SampleSource, camera_weights, draw_captions
from raydream.train.captions import phrase
from raydream.train.prior.learner import Team, stratified_timesteps
from raydream.types import Condition

AGP, SAMPLES = "agp", "samples"
_GRID_PROMPTS = 8

Report = Callable[[Mapping[str, float | int | str]], None]


@dataclass(frozen=True)
class AgpSession:
    """Where one worker trains, on what, and whom it tells; ``should_stop`` is asked between steps."""

    run: RunFolder
    prior: Path
    views: ViewConfig
    source: SampleSource
    device: torch.device
    team: Team
    make_engine: EngineMaker
    report: Report
    should_stop: Callable[[], bool]


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
    team = session.team
    with ExitStack() as stack:
        if team.rank == 0:
            stack.enter_context(session.run.lock())
        check_settings(config, session.run)
        denoiser = AgpDenoiser.from_prior(session.prior, config.model.rank, config.seed, session.device)
        facts = replace(denoiser.facts, distance=_scene_distance(session.views), fov_y_deg=session.views.fov_y_deg)
        texts = AgpTexts.load(session.prior, session.device)
        checkpoint = session.run.latest_checkpoint() if team.rank == 0 else None
        step = int(team.largest([float(checkpoint.step if checkpoint else -1)], session.device)[0])
        if config.start and step < 0:
            begin_from(denoiser, config)
        if config.model.gradient_checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        denoiser.unet.train()
        learner = AgpLearner(denoiser, config.stage, team)
        if step >= 0:
            learner.load(session.run, step)
        if team.rank == 0:
            session.run.truncate_metrics(learner.step + 1)
            session.run.write_text(CONFIG, strict_json.dumps(config) + "\n")
        trainer = _Trainer(config, session, learner, texts, facts)
        learner.start(session.make_engine, trainer.loss)
        done = trainer.train()
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
    denoiser: AgpDenoiser, texts: AgpTexts, samples: Samples, data: AgpDataConfig, generator: torch.Generator
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
    """New maps for texts and cameras by DPM-Solver++, guided against the empty text seen from the same cameras."""
    solver = DPMSolverMultistepScheduler.from_config(denoiser.scheduler)
    solver.set_timesteps(num_steps, device=denoiser.unet.device)
    view, side = len(cond.text), int(denoiser.unet.config["sample_size"])
    latents = torch.randn(view, 4, side, side, generator=generator).to(denoiser.unet.device)
    cameras = (cond.c2w, cond.fov_y_deg, cond.camera_weight)
    both = Condition(torch.cat([empty.expand_as(cond.text), cond.text]), *(torch.cat([each, each]) for each in cameras))
    for t in solver.timesteps:
        answer = denoiser.predict(torch.cat([latents, latents]), t.expand(2 * view), both)
        negative, positive = answer.chunk(2)
        latents = solver.step(classifier_free(negative, positive, cfg_scale), t, latents, return_dict=False)[0]
    return latents


def grid_condition(
    texts: AgpTexts, prompts: tuple[str, ...], grid: AgpGridConfig, distance: float, fov_y_deg: float
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


class _Trainer:
    """The loop of one worker."""

    def __init__(
        self, config: AgpConfig, session: AgpSession, learner: AgpLearner, texts: AgpTexts, facts: AgpFacts
    ) -> None:
        self._config, self._session, self._learner = config, session, learner
        self._texts, self._facts = texts, facts
        self._shown: AgpDenoiser | None = None

    def loss(self) -> Tensor:
        """The loss of this worker's next batch."""
        rank, step, config = self._session.team.rank, self._learner.step, self._config
        draw = seeds.generator(config.seed, "agp batch", rank, step)
        samples = self._session.source.samples(config.stage.batch_size, draw)
        batch = make_batch(self._learner.denoiser, self._texts, samples, config.data, draw)
        return agp_loss(self._learner.denoiser, batch, config.bfloat16)

    def train(self) -> bool:
        """Steps until the stage is done (True) or the session must stop (False); a checkpoint is left either way."""
        learner, config, team = self._learner, self._config, self._session.team
        before_s, started = learner.elapsed_s, time.monotonic()
        first = saved = logged_step = learner.step
        logged, stop = started, False
        while learner.progress < 1 and not stop:
            loss = learner.update(self.loss)
            now = time.monotonic()
            agreed = [before_s + now - started, float(self._session.should_stop())]
            agreed = team.largest(agreed, self._session.device)
            learner.elapsed_s, stop = agreed[0], agreed[1] > 0
            if learner.step % config.log_every_steps == 0:
                num_samples = (learner.step - logged_step) * config.stage.batch_size * team.size
                self._log(loss, num_samples / (now - logged))
                logged, logged_step = now, learner.step
            if learner.step % config.save_every_steps == 0:
                self._save()
                saved = learner.step
            if learner.step % config.sample_every_steps == 0:
                self._show()
        if learner.step > saved:
            self._save()
        if learner.step > first and learner.step % config.sample_every_steps:
            self._show()
        return not stop

    def _log(self, loss: float, samples_per_s: float) -> None:
        row: dict[str, float | int | str] = {
            "step": self._learner.step,
            "progress": round(self._learner.progress, 4),
            "loss": loss,
            "samples_per_s": round(samples_per_s, 2),
            "elapsed_s": round(self._learner.elapsed_s, 1),
        }
        if self._session.team.rank == 0:
            self._session.run.append_metrics([row])
        self._session.report(row)

    def _save(self) -> None:
        self._learner.save(self._session.run)
        if self._session.team.rank == 0:
            self._session.run.prune_checkpoints(self._config.keep_checkpoints)

    def _show(self) -> None:
        """Writes the averaged model and a grid of its samples."""
        averaged = self._learner.averaged()
        if self._session.team.rank:
            return
        run, config, device = self._session.run, self._config, self._session.device
        rank = config.model.export_rank or config.model.rank
        if self._shown is None:
            self._shown = AgpDenoiser.from_prior(self._session.prior, rank, config.seed, device)
            self._shown.unet.eval()
        if config.model.export_rank:
            self._shown.load_nearest(averaged)
        else:
            self._shown.load_state(averaged)
        facts = replace(self._facts, num_steps=self._learner.step, rank=rank)
        for name, content in self._shown.files(facts).items():
            run.write_bytes(f"{AGP}/{name}", content)
        grid = config.grid
        prompts = grid.prompts or tuple(phrase(noun) for noun in self._session.source.nouns()[:_GRID_PROMPTS])
        if prompts:
            distance, fov = (sum(low_high) / 2 for low_high in (facts.distance, facts.fov_y_deg))
            cond = grid_condition(self._texts, prompts, grid, distance, fov)
            generator = seeds.generator(config.seed, "agp grid", 0, 0)
            empty = self._texts.encode([""])[0]
            maps = sample_maps(self._shown, cond, empty, grid.cfg_scale, grid.sample_steps, generator)
            run.write_bytes(f"{SAMPLES}/step_{facts.num_steps:07d}.png", picture(maps, len(grid.azimuths_deg)))


def _scene_distance(views: ViewConfig) -> tuple[float, float]:
    units = SCENE_UNITS[views.normalise]
    return units * views.distance[0], units * views.distance[1]
