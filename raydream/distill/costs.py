"""What the actors of a run take, reckoned from its settings and its prior's config: no weights, no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from raydream.backend import load_backend
from raydream.config.actors import ParticleConfig, ScoreConfig, particle_config, score_config
from raydream.config.branches import BranchConfig
from raydream.config.cluster import Budget
from raydream.config.run import RunConfig, StageConfig
from raydream.config.scene import NerfConfig
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.lora import LoraDenoiser
from raydream.diffusion.prompts import bank_prompts
from raydream.diffusion.tally import Tally, tally
from raydream.diffusion.text import TextBank
from raydream.diffusion.vae import VaeCodec
from raydream.distill.branches import Branch, condition
from raydream.distill.particle import step_cameras
from raydream.priors.find import resolve_agp_prior
from raydream.priors.kinds import prior_kind
from raydream.scene.field import FEATURES_PER_LEVEL
from raydream.scene.kinds import make_scene
from raydream.schedule import Constant, highest
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


def run_costs(run: RunConfig) -> dict[Budget, tuple[Cost, Cost]]:
    """Of a particle and of a replica of the score model, in the stage that takes the most of each, under every budget
    that the settings leave open; nothing for a run whose prior is an exact score, which takes next to nothing.
    ``ValueError`` about ``prior`` where its folder is away.
    """
    if run.prior.mixture is not None:
        return {}
    # each kind of stage once: only what an actor is like counts, not when and for how long
    stages = {_timeless(stage): index for index, stage in enumerate(run.stages)}
    particles = [particle_cost(particle_config(run, index, 0)) for index in stages.values()]
    most_views = (_num_views(run, index) * run.stages[index].learner.timesteps_per_view for index in stages.values())
    budgets = run.cluster.budgets(max(most_views))
    sizes = [budget.views_at_once for budget in budgets]
    scores = [score_costs(score_config(run, index, 0), _num_views(run, index), sizes) for index in stages.values()]
    particle, costs = max(particles, key=lambda cost: cost.total_bytes), {}
    for budget in budgets:
        score = max((of[budget.views_at_once] for of in scores), key=lambda cost: cost.total_bytes)
        # a step is three passes through the scene, forward and twice that backward
        work = particle.step_flops * (4 / 3 if budget.renders_again else 1)
        costs[budget] = replace(particle, step_flops=work), score
    return costs


def particle_cost(config: ParticleConfig) -> Cost:
    """Of one particle as it starts, at the largest renders of its stage: what its scene fills later, nobody knows."""
    stage, cpu = config.stage, torch.device("cpu")

    def draws(purpose: str, step: int) -> torch.Generator:
        return generator(config.seed, purpose, config.index, step)

    scene = make_scene(stage, load_backend("auto", "cpu"), cpu, draws)
    cameras = step_cameras(config, config.first_step)
    small = scene.render(cameras, 0)
    pixels, view = cameras.height_px * cameras.width_px, cameras.num_views
    seen = int((small.opacity > 0).sum()) if small.volume is None else len(small.volume.weights)
    num_samples = seen * highest(stage.camera.image_px) ** 2 / pixels
    num_parameters = sum(value.numel() for value in scene.state().values() if value.is_floating_point())
    grid, width = stage.scene.grid, stage.scene.hidden_width
    encoded = grid.num_levels * FEATURES_PER_LEVEL
    # place, encoding, hidden layers of two networks, what is composed
    sample_bytes = 4 * (3 + encoded + 2 * width + 16)
    tile_samples = stage.scene.tile_samples if isinstance(stage.scene, NerfConfig) else 0
    tile = min(tile_samples or num_samples, num_samples)  # of the rest only places and answers are kept
    kept = tile * sample_bytes + (num_samples - tile) * 4 * (3 + 16)
    sample_flops = 3 * 2 * (2 * encoded * width + 4 * width)  # forward, and twice that backward
    codec = _encoding(config, view) if stage.branch("rgb") or stage.branch("normal") else Cost(0, 0, 0.0)
    return Cost(
        held_bytes=4 * _ADAM * num_parameters + codec.held_bytes,
        peak_bytes=int(kept) + codec.peak_bytes,
        step_flops=num_samples * sample_flops + codec.step_flops,
    )


def score_costs(config: ScoreConfig, num_views: int, sizes: Sequence[int]) -> dict[int, Cost]:
    """Of one replica that is asked about so many views, for each number of them at a time; 0 is all of them.

    What a call takes grows by the same with each view that is asked at once, so that one and two are looked at.
    """
    held, learned_bytes, guides, fits = 0, 0, [0, 0], [0, 0]
    work = 0.0
    for branch in config.branches:
        frozen, learned, looks = _look(config, branch, (1, 2))
        held, learned_bytes = held + frozen + _ADAM * learned, learned_bytes + learned
        guides = [max(pair) for pair in zip(guides, (guided.peak_bytes for guided, _ in looks))]
        fits = [max(pair) for pair in zip(fits, (fitted.peak_bytes for _, fitted in looks))]
        learns = config.learner.fits_per_step * config.learner.timesteps_per_view
        work += looks[0][0].flops + learns * looks[0][1].flops
    asked, taught = num_views, num_views * config.learner.timesteps_per_view

    def peak(size: int) -> int:
        at_once, learned_at_once = min(size or asked, asked), min(size or taught, taught)
        summed = learned_bytes if learned_at_once < taught else 0  # of the views before
        guide = guides[0] + (at_once - 1) * (guides[1] - guides[0])
        return max(guide, fits[0] + (learned_at_once - 1) * (fits[1] - fits[0]) + summed)

    return {size: Cost(held, peak(size), num_views * work) for size in sizes}


def _look(
    config: ScoreConfig, branch: BranchConfig, sizes: Sequence[int]
) -> tuple[int, int, list[tuple[Tally, Tally]]]:
    """Bytes of what is frozen and of what is learned of a branch, and for each number of views what guiding and
    learning take. A geometric prior is a UNet like that of the prior it was made from.
    """
    if branch.render == "ccm":
        folder = resolve_agp_prior(branch.geometric_prior.prior, config.prior.source)
        config = replace(config, prior=replace(config.prior, source=str(folder)))
    kind = prior_kind(config.prior)
    denoiser, alphas = kind.denoiser(config.prompt, config.backend, _META)
    assert isinstance(denoiser, DiffusersDenoiser)
    frozen = [*denoiser.unet.parameters(), *denoiser.unet.buffers()]
    learner = kind.learner(denoiser, config.learner, torch.Generator()) if branch.learns else None
    learned = list(learner.trainable().values()) if learner is not None else []
    if isinstance(learner, LoraDenoiser) and learner.frozen is not denoiser:
        own = {id(parameter) for parameter in learned}
        frozen += [parameter for parameter in learner.frozen.unet.parameters() if id(parameter) not in own]
    embedding = torch.empty(_TOKENS, int(denoiser.unet.config["cross_attention_dim"]), device=_META)
    prompts = config.prompt, config.negative_prompt
    texts = TextBank(dict.fromkeys(bank_prompts(*prompts), embedding), *prompts, branch)

    def look(num_views: int) -> tuple[Tally, Tally]:
        shape = (num_views, denoiser.unet.config["in_channels"], *[int(denoiser.unet.config["sample_size"])] * 2)
        views, t = _views(shape), torch.empty(num_views, dtype=torch.long, device=_META)
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
        return tally(guide, before), tally(fit, before) if learner is not None else Tally(0, 0.0)

    return _num_bytes(frozen), _num_bytes(learned), [look(size) for size in sizes]


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

    weights = list(codec.vae.parameters())  # the decoder is for round trips, and is there
    found = tally(encode, [*weights, pixels, flat])
    return Cost(_num_bytes(weights), found.peak_bytes, found.flops)


def _views(shape: tuple[int, ...]) -> Views:
    each = torch.zeros(shape[0])  # angles are looked at
    return Views(torch.empty(shape, device=_META), torch.empty(shape[0], 4, 4, device=_META), each, each, each)


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _timeless(stage: StageConfig) -> StageConfig:
    """What a stage's actors are like, without when it comes and how it goes on."""
    return replace(stage, name="", num_steps=1, start="", lr_scale=Constant(1.0))


def _num_views(run: RunConfig, stage: int) -> int:
    """Of the particles that one replica answers."""
    members = -(-run.n // run.cluster.score_replicas)
    return members * run.stages[stage].camera.views_per_particle


def cost_lines(run: RunConfig) -> list[str]:
    """For the person who asks before starting; empty for an exact score."""
    costs = list(run_costs(run).items())
    if not costs:
        return []
    budget, (particle, score) = costs[0]

    def line(who: str, cost: Cost) -> str:
        held, peak, work = cost.held_bytes / 2**20, cost.peak_bytes / 2**20, cost.step_flops / 1e9
        return f"{who}: {held:,.0f} MiB held, {peak:,.0f} MiB more at most, {work:,.1f} GFLOP a step"

    replicas = run.cluster.score_replicas
    at_once = f", {budget}" if budget.views_at_once else ""
    who = "the score model" if replicas == 1 else f"each of {replicas} replicas of the score model"
    return [line(f"each of {run.n} particles, as it starts", particle), line(f"{who}{at_once}", score)]
