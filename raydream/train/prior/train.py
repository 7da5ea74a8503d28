"""Trains a text-to-image prior in two stages: a VAE, then text encoder and UNet on its latents. No Ray in here.

Everything lies in one folder: ``config.json``, ``lexicon.json``, a checkpoint of each stage, ``metrics.jsonl``,
``samples/*.png`` and, from the first save of the second stage on, ``prior/``: the finished Stable Diffusion folder.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel

from raydream import seeds
from raydream.config import strict_json
from raydream.config.train import TrainConfig
from raydream.diffusion.denoiser import suit_attention
from raydream.diffusion.guidance import stratified_timesteps
from raydream.diffusion.layout import LEXICON
from raydream.precision import arithmetic
from raydream.priors.find import resolve_prior
from raydream.train.batches import BatchMaker
from raydream.train.captions import (
    CaptionedObject,
    Lexicon,
    describe,
    make_lexicon,
    most_typical,
    object_palette,
    split_objects,
    split_views,
    with_other_word,
)
from raydream.train.learner import ModuleT, set_parameters
from raydream.train.loop import Every, MetricsRow, Stage, Worker
from raydream.train.loop import train as train_stage
from raydream.train.prefetch import prefetched
from raydream.train.prior import checkpoint
from raydream.train.prior.check import CONFIG, check_same_training, training_lock
from raydream.train.prior.export import export_prior, save_grid
from raydream.train.prior.models import (
    PriorModels,
    build_models,
    build_vae,
    copy_weights,
    load_models,
    load_vae,
    normalise_latents,
    sample_latents,
)
from raydream.views.view_set import ViewSet

METRICS, SAMPLES, PRIOR = "metrics.jsonl", "samples", "prior"
_LATENT_IMAGES = 512
_GRID_COLUMNS = 10
_CONTRAST_MARGIN = 0.2  # relative, about twice what side words change in a loss at t = 800


@dataclass(frozen=True)
class TrainSets:
    """Makers of training and of two kinds of held-out batches: of trained objects from angles that were never trained
    (of all angles where none is held out), and of other objects.
    """

    train: BatchMaker
    held_out_views: BatchMaker
    held_out: BatchMaker


@dataclass(frozen=True)
class Session:
    """One worker's part of a training: its settings and its folder."""

    config: TrainConfig
    out: Path
    worker: Worker


@dataclass(frozen=True)
class NoisedBatch:
    """What the UNet learns from in a step, on the training device; ``wrong`` are captions that tell what some of the
    views do not show, by the numbers of these views.
    """

    latents: Float[Tensor, "view 4 h w"]
    captions: tuple[str, ...]
    t: Int[Tensor, " view"]
    noise: Float[Tensor, "view 4 h w"]
    wrong: Mapping[int, str]


def make_sets(views: ViewSet, config: TrainConfig, device: torch.device, lexicon: Lexicon | None = None) -> TrainSets:
    """Splits the objects and their views, and chooses the words if no ``lexicon`` is given; the same views and settings
    give the same sets anywhere. ValueError names ``views`` where they have no object of a given lexicon's noun.
    """
    palette = object_palette(views)
    lexicon = lexicon or make_lexicon(views, palette, config.words)
    subjects = describe(views, palette, lexicon, config.words)
    train, held_out = split_objects(subjects, views, config.words.held_out_assets)
    if config.words.assets_per_noun:
        train = most_typical(train, views, config.words.assets_per_noun)
    kept, spare = split_views(views.num_views, config.words.held_out_views)

    def maker(chosen: list[CaptionedObject], angles: list[int]) -> BatchMaker:
        return BatchMaker(views, chosen, angles, palette, lexicon, config.look, config.words, config.seed, device)

    return TrainSets(maker(train, kept), maker(train, spare or kept), maker(held_out, kept + spare))


def train_prior(views: ViewSet, config: TrainConfig, out: Path, worker: Worker) -> bool:
    """Trains, or goes on training, the prior in folder ``out``; True when both stages are finished.

    Run it again with the same settings after any interruption. ValueError names ``out`` where it holds a training with
    other settings than the stages' lengths and paces.
    """
    torch.set_num_threads(config.num_threads)
    out.mkdir(parents=True, exist_ok=True)
    team, device = worker.team, worker.device
    with training_lock(out) if team.rank == 0 else nullcontext():
        if team.rank == 0:
            check_same_training(config, out)
            (out / CONFIG).write_text(strict_json.dumps(config) + "\n", encoding="utf-8")
        session = Session(config, out, worker)
        given = load_models(resolve_prior(config.start), device) if config.start else None
        sets = make_sets(views, config, device, given.lexicon if given else None)
        if team.rank == 0:
            _check_lexicon(sets.train.lexicon, out)
        vae = given.vae if given else _train_vae(sets, session)
        return vae is not None and _train_unet(vae, sets, session, given)


def _train_vae(sets: TrainSets, session: Session) -> AutoencoderKL | None:
    """The finished VAE with normalised latents; None if the session had to stop before."""
    config, device = session.config, session.worker.device
    with _same_start(config.seed):
        vae = build_vae(config.vae)
        vae.to(device)  # type: ignore[arg-type]
    if config.vae.start:
        copy_weights(load_vae(resolve_prior(config.vae.start)), vae, "vae.start: its VAE")
    averaged = _frozen_copy(vae)

    def show(step: int) -> None:
        _show_vae(averaged, step, sets, session)

    if not _train("vae", vae, averaged, lambda step: _vae_loss(vae, sets, session, step), show, session):
        return None
    normalise_latents(averaged, sets.train.batch(_LATENT_IMAGES, "latent statistics", 0, 0).images)
    return averaged


@contextmanager
def _same_start(seed: int) -> Iterator[None]:
    """Every worker, and every resumed one, builds the same first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _train_unet(vae: AutoencoderKL, sets: TrainSets, session: Session, given: PriorModels | None) -> bool:
    config, device = session.config, session.worker.device
    image_px = sets.train.pixels.shape[2]
    with _same_start(config.seed):
        models = build_models(config.unet, vae, image_px, sets.train.lexicon)
    if given is not None:
        copy_weights(given.unet, models.unet, "start: its unet")
        copy_weights(given.text_encoder, models.text_encoder, "start: its text_encoder")
    suit_attention(models.unet, device)
    parts = nn.ModuleDict({"unet": models.unet, "text_encoder": models.text_encoder}).to(device)
    averaged_parts = _frozen_copy(parts)
    unet, text_encoder = averaged_parts["unet"], averaged_parts["text_encoder"]
    assert isinstance(unet, UNet2DConditionModel)
    assert isinstance(text_encoder, CLIPTextModel)
    averaged = replace(models, unet=unet, text_encoder=text_encoder)

    def show(step: int) -> None:
        export_prior(averaged, session.out / PRIOR)
        generator = seeds.generator(config.seed, "grid", 0, 0)
        latents = sample_latents(
            averaged, grid_prompts(averaged), config.gate.cfg_scale, config.gate.sample_steps, generator
        )
        save_grid(averaged.decode(latents), session.out / SAMPLES / f"unet_{step:07d}.png", _GRID_COLUMNS)

    with prefetched(lambda step: _noised(models, sets, session, step)) as batch_of:
        done = _train(
            "unet", parts, averaged_parts, lambda step: _unet_loss(models, batch_of(step), session), show, session
        )
    if session.worker.team.rank == 0 and not done:
        export_prior(averaged, session.out / PRIOR)
    return done


def grid_prompts(models: PriorModels) -> list[str]:
    """Up to 40 prompts over the prior's nouns, with every colour and some pairs that were never trained."""
    lexicon = models.lexicon
    nouns = [lexicon.nouns[i * len(lexicon.nouns) // 20] for i in range(min(20, len(lexicon.nouns)))]
    plain = [f"a {noun}" for noun in nouns]
    coloured = [f"a {lexicon.colours[i % len(lexicon.colours)]} {noun}" for i, noun in enumerate(nouns)]
    return plain + coloured


def _train(
    name: Literal["vae", "unet"],
    module: nn.Module,
    averaged: nn.Module,
    loss: Callable[[int], Tensor],
    show: Callable[[int], None],
    session: Session,
) -> bool:
    """Trains a stage to its end (True) or until it must stop (False); ``averaged``, a copy of the module, has its
    running average then, and in rank 0 whenever it is shown.
    """
    config, team, path = session.config, session.worker.team, session.out / f"{name}.safetensors"

    def show_average(average: Mapping[str, Tensor]) -> None:
        set_parameters(averaged, average)
        show(learner.step)

    def log(row: MetricsRow) -> None:
        row = {"stage": name, **row, "lr": learner.rate}
        if team.rank == 0:
            _record(session.out, row)
        session.worker.report(row)

    settings = config.vae.stage if name == "vae" else config.unet.stage
    learner = checkpoint.begin(module, settings, team, path, lambda: loss(0))
    stage = Stage(
        loss=loss,
        save=lambda: checkpoint.save(learner, path),
        show=show_average,
        log=log,
        log_every_steps=config.log_every_steps,
        save_every=Every(seconds=config.save_every_s),
        show_every=Every(seconds=config.sample_every_s),
        shows_when_stopped=False,
    )
    done = train_stage(learner, stage, session.worker)
    set_parameters(averaged, learner.averaged())
    return done


def _frozen_copy(module: ModuleT) -> ModuleT:
    return copy.deepcopy(module).eval().requires_grad_(False)


def _record(out: Path, row: MetricsRow) -> None:
    with (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row)) + "\n")


def _vae_loss(vae: AutoencoderKL, sets: TrainSets, session: Session, step: int) -> Tensor:
    config, settings, rank = session.config, session.config.vae, session.worker.team.rank
    images = sets.train.batch(settings.stage.batch_size, "vae batch", rank, step).images
    noise = seeds.generator(config.seed, "vae noise", rank, step)
    with arithmetic(config.bfloat16, session.worker.device):
        posterior = vae.encode(images).latent_dist
        draw = torch.randn(posterior.mean.shape, generator=noise).to(images)
        answer = vae.decode(posterior.mean + posterior.std * draw).sample
    difference = answer.float() - images
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return difference.square().mean() + settings.l1_weight * difference.abs().mean() + settings.kl_weight * divergence


def _noised(models: PriorModels, sets: TrainSets, session: Session, step: int) -> NoisedBatch:
    config, rank = session.config, session.worker.team.rank
    size = config.unet.stage.batch_size
    batch = sets.train.batch(size, "unet batch", rank, step)
    generator = seeds.generator(config.seed, "unet noise", rank, step)
    t = stratified_timesteps(size, generator, config.unet.t_logit_mean, config.unet.t_logit_std)
    with arithmetic(config.bfloat16, session.worker.device):
        latents = models.encode_images(batch.images)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    wrong: dict[int, str] = {}
    if config.unet.contrast:
        draws = torch.rand(2, size, generator=seeds.generator(config.seed, "unet contrast", rank, step)).tolist()
        for index, caption in enumerate(batch.captions[: (size + 1) // 2]):
            other = with_other_word(caption, sets.train.lexicon, draws[0][index], draws[1][index])
            if other is not None:
                wrong[index] = other
    return NoisedBatch(latents, batch.captions, t.to(session.worker.device), noise, wrong)


def _unet_loss(models: PriorModels, batch: NoisedBatch, session: Session) -> Tensor:
    config = session.config
    chosen = [*range(len(batch.captions)), *batch.wrong]
    with arithmetic(config.bfloat16, session.worker.device):
        text = models.encode_text([*batch.captions, *batch.wrong.values()])
        losses = models.v_loss(batch.latents[chosen], text, batch.t[chosen], batch.noise[chosen])
    right, wrong = losses.split([len(batch.captions), len(batch.wrong)])
    contrast = contrast_loss(right[list(batch.wrong)], wrong).sum() / len(right)
    return right.mean() + config.unet.contrast * contrast


def contrast_loss(right: Float[Tensor, " view"], wrong: Float[Tensor, " view"]) -> Float[Tensor, " view"]:
    """How much better the losses of right captions should still become than those of wrong ones.

    A softplus that fades out once a wrong caption's loss is half as large again; in units of the loss itself, so that
    its gradient is at most that of the plain loss, for any timestep.
    """
    unit = _CONTRAST_MARGIN * right.detach()
    return unit * F.softplus((right - wrong) / unit)


def _show_vae(averaged: AutoencoderKL, step: int, sets: TrainSets, session: Session) -> None:
    """Held-out images above their reconstructions, and the PSNR in the metrics."""
    images = sets.held_out.batch(2 * _GRID_COLUMNS, "vae grid", 0, 0).images
    with torch.no_grad():
        answer = averaged.encode(images).latent_dist.mean
        answer = averaged.decode(answer).sample.clamp(-1, 1)
    psnr_db = float(-10 * torch.log10(F.mse_loss(answer / 2, images / 2)))
    _record(session.out, {"stage": "vae", "step": step, "held_out_psnr_db": round(psnr_db, 2)})
    pairs = torch.cat([part for rows in zip(images.split(_GRID_COLUMNS), answer.split(_GRID_COLUMNS)) for part in rows])
    save_grid(pairs, session.out / SAMPLES / f"vae_{step:07d}.png", _GRID_COLUMNS)


def _check_lexicon(lexicon: Lexicon, out: Path) -> None:
    """Writes the words, or makes sure that these views still give the same ones: tokens must keep their meaning."""
    path = out / LEXICON
    if path.is_file() and Lexicon.loads(path.read_text(encoding="utf-8")) != lexicon:
        raise ValueError(f"views: they give other words than those that {out} was begun with")
    path.write_text(lexicon.dumps() + "\n", encoding="utf-8")
