"""What the actors of a run take, reckoned from its settings and its prior's config: no weights, no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from raydream.backend import load_backend
from raydream.config.actors import ParticleConfig, ScoreConfig, particle_config, score_config
from raydream.config.run import RunConfig
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.lora import LoraDenoiser
from raydream.diffusion.prompts import bank_prompts
from raydream.diffusion.tally import Tally, tally
from raydream.diffusion.text import TextBank
from raydream.diffusion.vae import VaeCodec
from raydream.distill.branches import Branch, condition
from raydream.distill.particle import step_cameras
from raydream.priors.kinds import prior_kind
from raydream.scene.field import FEATURES_PER_LEVEL
from raydream.scene.kinds import make_scene
from raydream.schedule import highest
from raydream.seeds import generator
from raydream.types import Latents, Render, Views

_META = torch.device("meta")
_ADAM = 4  # a parameter, its gradient and two moments
_TOKENS = 77


@dataclass(frozen=True)
class Cost:
    """``held_bytes`` stay from step to step, ``peak_bytes`` are held beside them at the worst moment of a step."""

    held_bytes: int
    peak_bytes: int
    step_flops: float

    @property
    def total_bytes(self) -> int:
        """The most at any moment."""
        return self.held_bytes + self.peak_bytes


def run_costs(run: RunConfig) -> tuple[Cost, Cost] | None:
    """Of a particle and of a replica of the score model, in the stage that takes the most of each; None for a run
    whose prior is an exact score, which takes next to nothing. ``ValueError`` about ``prior`` where its folder is away.
    """
    if run.prior.mixture is not None:
        return None
    stages = range(len(run.stages))
    particles = [particle_cost(particle_config(run, stage, 0)) for stage in stages]
    scores = [score_cost(score_config(run, stage, 0), _num_views(run, stage)) for stage in stages]
    return max(particles, key=lambda cost: cost.total_bytes), max(scores, key=lambda cost: cost.total_bytes)


def particle_cost(config: ParticleConfig) -> Cost:
    """Of one particle as it starts, at the largest renders of its stage: what its scene fills later, nobody knows."""
    stage, cpu = config.stage, torch.device("cpu")

    def draws(purpose: str, step: int) -> torch.Generator:
        return generator(config.seed, purpose, config.index, step)

    scene = make_scene(stage, load_backend("auto", "cpu"), cpu, draws)
    cameras = step_cameras(config, config.first_step)
    small = scene.render(cameras, 0)
    pixels, view = cameras.height_px * cameras.width_px, cameras.num_views
    seen = 0 if small.volume is None else len(small.volume.weights)
    num_samples = seen * highest(stage.camera.image_px) ** 2 / pixels
    num_parameters = sum(value.numel() for value in scene.state().values() if value.is_floating_point())
    grid, width = stage.scene.grid, stage.scene.hidden_width
    encoded = grid.num_levels * FEATURES_PER_LEVEL
    # place, encoding, hidden layers of two networks, what is composed
    sample_bytes = 4 * (3 + encoded + 2 * width + 16)
    tile = min(stage.scene.tile_samples or num_samples, num_samples)  # of the rest only places and answers are kept
    kept = tile * sample_bytes + (num_samples - tile) * 4 * (3 + 16)
    sample_flops = 3 * 2 * (2 * encoded * width + 4 * width)  # forward, and twice that backward
    codec = _encoding(config, view)
    return Cost(
        held_bytes=4 * _ADAM * num_parameters + codec.held_bytes,
        peak_bytes=int(kept) + codec.peak_bytes,
        step_flops=num_samples * sample_flops + codec.step_flops,
    )


def score_cost(config: ScoreConfig, num_views: int) -> Cost:
    """Of one replica that answers so many views in one batch and learns from them in one."""
    branch = next(branch for branch in config.branches if branch.render == "rgb")
    kind = prior_kind(config.prior)
    denoiser, alphas = kind.denoiser(config.prompt, config.backend, _META)
    assert isinstance(denoiser, DiffusersDenoiser)
    frozen = [*denoiser.unet.parameters(), *denoiser.unet.buffers()]
    learner = kind.learner(denoiser, config.learner, torch.Generator()) if branch.learns else None
    learned = list(learner.trainable().values()) if learner is not None else []
    if isinstance(learner, LoraDenoiser) and learner.frozen is not denoiser:
        own = {id(parameter) for parameter in learned}
        frozen += [parameter for parameter in learner.frozen.unet.parameters() if id(parameter) not in own]
    shape = (num_views, denoiser.unet.config["in_channels"], *[int(denoiser.unet.config["sample_size"])] * 2)
    views, t = _views(shape), torch.empty(num_views, dtype=torch.long, device=_META)
    embedding = torch.empty(_TOKENS, int(denoiser.unet.config["cross_attention_dim"]), device=_META)
    prompts = config.prompt, config.negative_prompt
    texts = TextBank(dict.fromkeys(bank_prompts(*prompts), embedding), *prompts, branch)
    told = condition(views, texts.prompt_embeddings(num_views))

    def learned_eps(z_t: Latents, at: Int[Tensor, " view"]) -> Latents:
        assert learner is not None
        return learner.eps(z_t, at, told)

    def guide() -> None:
        pull = Branch(branch, denoiser, texts, alphas).gradient
        pull(0, views, told.text, t, views.latents, learned_eps if learner is not None else None)

    def fit() -> None:
        assert learner is not None
        answer = learner.predict(views.latents, t, told)
        torch.autograd.grad(answer.square().mean(), learned, allow_unused=True)

    before = [*frozen, *learned, views.latents, embedding]
    guided = tally(guide, before)
    fitted = tally(fit, before) if learner is not None else Tally(0, 0.0)
    return Cost(
        held_bytes=_num_bytes(frozen) + _ADAM * _num_bytes(learned),
        peak_bytes=max(guided.peak_bytes, fitted.peak_bytes),
        step_flops=guided.flops + config.learner.fits_per_step * config.learner.timesteps_per_view * fitted.flops,
    )


def _encoding(config: ParticleConfig, num_views: int) -> Cost:
    """Of the way from pixels to latents and back; nothing of what stays is learned."""
    codec = prior_kind(config.prior).codec(_META)
    assert isinstance(codec, VaeCodec)
    side = int(highest(config.stage.camera.image_px))
    pixels = torch.empty(num_views, side, side, 3, device=_META, requires_grad=True)
    flat = torch.empty(num_views, side, side, 1, device=_META)
    render = Render(pixels, pixels, flat, flat, None, None, None)

    def encode() -> None:
        torch.autograd.grad(codec.encode(render, torch.Generator()).sum(), pixels)

    weights = list(codec.vae.encoder.parameters())
    found = tally(encode, [*weights, pixels, flat])
    return Cost(_num_bytes(weights), found.peak_bytes, found.flops)


def _views(shape: tuple[int, ...]) -> Views:
    each = torch.zeros(shape[0])  # angles are looked at
    return Views(torch.empty(shape, device=_META), torch.empty(shape[0], 4, 4, device=_META), each, each, each)


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _num_views(run: RunConfig, stage: int) -> int:
    """Of the particles that one replica answers."""
    members = -(-run.n // run.cluster.score_replicas)
    return members * run.stages[stage].camera.views_per_particle


def cost_lines(run: RunConfig) -> list[str]:
    """For the person who asks before starting; empty for an exact score."""
    costs = run_costs(run)
    if costs is None:
        return []

    def line(who: str, cost: Cost) -> str:
        held, peak, work = cost.held_bytes / 2**20, cost.peak_bytes / 2**20, cost.step_flops / 1e9
        return f"{who}: {held:,.0f} MiB held, {peak:,.0f} MiB more at most, {work:,.1f} GFLOP a step"

    replicas = run.cluster.score_replicas
    who = "the score model" if replicas == 1 else f"each of {replicas} replicas of the score model"
    return [line(f"each of {run.n} particles, as it starts", costs[0]), line(who, costs[1])]
