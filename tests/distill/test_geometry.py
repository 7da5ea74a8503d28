"""The branch of the aligned geometric prior: maps out of particles, its gradient, and a run that it pulls."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from small_runs import SMALL, Watch, assert_same_end, new_run, train
from small_scenes import nerf_of
from tiny_prior import make_tiny_prior
from torch import Tensor

from raydream import cli
from raydream.config import strict_json
from raydream.config.actors import particle_config, score_config
from raydream.config.branches import BranchConfig, GeometricPriorConfig
from raydream.config.presets import exhibit
from raydream.config.run import RunConfig
from raydream.coordinates import decode_ccm
from raydream.diffusion.prompts import bank_prompts
from raydream.diffusion.text import TextBank
from raydream.distill.branches import MAP_BOUND, Branch
from raydream.distill.particle import Particle, encode_maps, make_particle
from raydream.distill.score import Score, make_score
from raydream.priors import find
from raydream.priors.agp import AgpDenoiser, AgpFacts
from raydream.priors.exhibit import MixtureTexts
from raydream.priors.protocol import Texts
from raydream.schedule import Constant
from raydream.train.agp.samples import latents_of
from raydream.types import Condition, Render, Views

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BOX_OFTEN = "stages.0.branches.1.geometric_prior.box_every=2"
PRIOR = "stages.0.branches.1.geometric_prior.prior"


class PointDenoiser:
    """The exact noise predictor of a data set of one map."""

    def __init__(self, wanted: Float[Tensor, "4 h w"], abar: Float[Tensor, " t"]) -> None:
        self._wanted, self._abar = wanted, abar

    def eps(
        self, z_t: Float[Tensor, "view 4 h w"], t: Int[Tensor, " view"], cond: Condition
    ) -> Float[Tensor, "view 4 h w"]:
        abar = self._abar[t][:, None, None, None]
        return (z_t - abar.sqrt() * self._wanted) / (1 - abar).sqrt()


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny prior and an untrained AGP of it, for cameras as the exhibit's."""
    home = tmp_path_factory.mktemp("priors")
    prior = make_tiny_prior(home / "prior", "v_prediction")
    denoiser = AgpDenoiser.from_prior(prior, 2, 0, CPU)
    denoiser.facts = AgpFacts(2, denoiser.facts.prior_sha256, (2.6, 2.8), (40.0, 45.0))
    denoiser.save(home / "agp")
    return prior, home / "agp"


def make_run(priors: tuple[Path, Path], *overrides: str, steps: int = 6) -> RunConfig:
    prior, agp = priors
    config = exhibit(steps).with_geometric_prior(str(agp))
    return strict_json.apply_overrides(config, [*SMALL, BOX_OFTEN, f"{PRIOR}={prior}", *overrides])


def make_pair(config: RunConfig) -> tuple[Particle, Score]:
    return make_particle(particle_config(config, 0, 0)), make_score(score_config(config, 0, 0))


def map_branch(abar: Tensor, wanted: Tensor, texts: Texts, loud: float = 0.0, steps: int = 1) -> Branch:
    settings = GeometricPriorConfig(text_noise=loud, denoise_steps=Constant(float(steps)))
    return Branch(
        BranchConfig("ccm", "sds", scale=7.5, geometric_prior=settings), PointDenoiser(wanted, abar), texts, abar
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_gradient_points_from_the_map_to_the_one_that_is_wanted(steps: int) -> None:
    """For one exact mode it is ``w sqrt(abar / (1 - abar)) (map - wanted)``, whatever the noise and the way there. A
    schedule may end without any signal.
    """
    generator = torch.Generator().manual_seed(0)
    abar = torch.linspace(0.99, 0.0, 1000)
    wanted, here = torch.randn(4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    wanted = wanted if steps == 1 else wanted.clamp(-MAP_BOUND, MAP_BOUND)
    branch = map_branch(abar, wanted, MixtureTexts(2, CPU), steps=steps)
    c2w, zeros = torch.eye(4).expand(3, 4, 4), torch.zeros(3)
    t = torch.tensor([100, 500, 999])
    noise = torch.randn(here.shape, generator=generator)
    views = Views(here, c2w, zeros, zeros, zeros)
    gradient = branch.gradient(0, views, branch.text(views, 0, [0, 1, 2], [1, 1, 1]), t, noise)
    kept = abar[t if steps == 1 else t.clamp(max=998)][:, None, None, None]
    assert torch.allclose(gradient, (1 - kept) * (kept / (1 - kept)).sqrt() * (here - wanted), atol=1e-5)


def test_every_particle_but_the_first_reads_the_prompt_in_its_own_way() -> None:
    """The same at each step, whoever is asked for; in all of a particle's views; as loud as the setting says."""
    draws = torch.Generator().manual_seed(0)
    embeddings = {words: 3 * torch.randn(24, 192, generator=draws) for words in bank_prompts("a chair", "")}
    texts = TextBank(embeddings, "a chair", "", BranchConfig(view_dependent_prompts=False))
    abar = torch.linspace(0.99, 0.01, 1000)
    plain, branch = (map_branch(abar, torch.zeros(4, 8, 8), texts, loud) for loud in (0.0, 0.5))

    def read(branch: Branch, seed: int, particles: list[int], size: int) -> Tensor:
        view = size * len(particles)
        zeros = torch.zeros(view)
        views = Views(torch.zeros(view, 4, 8, 8), torch.eye(4).expand(view, 4, 4), zeros, zeros, zeros)
        return branch.text(views, seed, particles, [size] * len(particles))

    heard = read(branch, 7, [0, 1, 2], 2)
    assert torch.equal(heard[:2], texts.prompt_embeddings(2))
    assert torch.equal(heard[2], heard[3])
    assert not torch.equal(heard[3], heard[4])
    assert torch.equal(read(branch, 7, [2, 1], 1), heard[[4, 2]])
    assert torch.allclose((heard[2] - embeddings["a chair"])[1:].std(), torch.tensor(1.5), atol=0.05)
    assert torch.equal(heard[2, 0], embeddings["a chair"][0]), "the start token says nothing that could be misheard"
    assert torch.equal(read(plain, 7, [1], 1), texts.prompt_embeddings(1))
    assert not torch.equal(read(branch, 8, [1], 1), heard[2:3])


def test_joined_pixels_are_weighted_by_opacity_as_in_the_training() -> None:
    """A solid pixel beside empty ones keeps its coordinates: only the opacity is the mean."""
    alpha = (torch.rand(2, 8, 8, 1, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    coordinates = torch.tensor([0.25, 0.5, 1.0]).expand(2, 8, 8, 3)
    empty = torch.zeros(2, 8, 8, 3)
    maps = encode_maps(Render(empty, empty, alpha, alpha, None, coordinates * alpha), 4)
    assert torch.allclose(maps, latents_of(coordinates * (alpha > 0), alpha, 4), atol=1e-6)
    seen, opacity = decode_ccm(maps)
    covered = opacity[..., 0] > 0
    assert torch.allclose(seen[covered], coordinates[0, 0, 0].expand(int(covered.sum()), 3), atol=1e-5)


def test_both_branches_move_the_particle_by_their_weights(priors: tuple[Path, Path]) -> None:
    """Without an appearance weight only the density moves: maps have no colours."""
    overrides = ("stages.0.branches.0.weight=0", "cluster.kernels=reference", "stages.0.scene.bfloat16=off")
    particle, _ = make_pair(make_run(priors, *overrides))
    views = particle.render(0)
    assert views["latents/ccm"].shape == (1, 4, 16, 16)
    assert 0 < ((views["latents/ccm"][:, 3] + 1) / 2).mean() < 1
    wish = np.zeros_like(views["latents/ccm"])
    wish[:, 3] = -1.0  # more opacity everywhere
    before = nerf_of(particle).field.density(torch.zeros(1, 3)).item()
    head = nerf_of(particle).field.head.detach().clone()
    stats = particle.apply(0, np.ones_like(views["latents/rgb"]), wish)
    assert stats["loss/ccm"] > 0
    assert nerf_of(particle).field.density(torch.zeros(1, 3)).item() > before
    changed = (nerf_of(particle).field.head != head).any(dim=1)
    assert changed.tolist() == [True, False, False, False]


def test_maps_a_few_at_a_time_are_answered_like_all(priors: tuple[Path, Path]) -> None:
    """Through every step of their denoising, and in each particle's own reading of the prompt."""
    config = make_run(
        priors, "n=2", "stages.0.camera.views_per_particle=2", "stages.0.branches.1.geometric_prior.text_noise=1",
        "stages.0.branches.1.geometric_prior.denoise_steps=3",
    )  # fmt: skip
    particles = [make_particle(particle_config(config, 0, index)) for index in range(2)]
    messages = [particle.render(0) for particle in particles]
    whole, parts = (
        make_score(score_config(replace(config, cluster=replace(config.cluster, views_at_once=size)), 0, 0))
        for size in (0, 3)
    )
    for score in (whole, parts):
        score.branches["ccm"].denoiser.unet.double()  # type: ignore[attr-defined]  # rounding is float32's alone
    *expected, _ = whole.guide(0, "ccm", [0, 1], *messages)
    *found, _ = parts.guide(0, "ccm", [0, 1], *messages)
    assert len(found) == 2
    for one, other in zip(found, expected):
        assert np.abs(other).max() > 0.01
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(np.abs(other).max()))


def test_the_box_is_measured_on_schedule_and_survives_a_restart(priors: tuple[Path, Path]) -> None:
    particle, score = make_pair(make_run(priors))
    for step in range(3):
        views = particle.render(step)
        gradient, _ = score.guide(step, "rgb", [0], views)
        pull, _ = score.guide(step, "ccm", [0], views)
        particle.apply(step, gradient, pull)
        score.fit(step, [0], views)
    snapshot = particle.snapshot()
    # the starting ball is smaller than the scene and about its middle
    assert np.abs(snapshot["box"]).max() < 0.9
    assert np.allclose(snapshot["box"].sum(0), 0, atol=0.1)
    other, _ = make_pair(make_run(priors))
    other.restore(snapshot)
    one, two = particle.render(3), other.render(3)  # between two measurements
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_run_under_an_agp_resumes_to_the_bit(priors: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_run(priors, "cluster.score_replicas=2")
    whole, parts = new_run(tmp_path / "whole", config), new_run(tmp_path / "parts", config)
    train(whole, config)
    train(parts, config, watch=Watch(stop_after=2))
    assert train(parts, config) == 6
    assert all(row["loss/ccm"] > 0 for row in whole.read_metrics())
    assert_same_end(parts, whole)


def test_what_cannot_be_an_agp_is_refused(priors: tuple[Path, Path], tmp_path: Path) -> None:
    _, agp = priors
    with pytest.raises(ValueError, match=r"^agp: '.*' is not the folder of .*no agp.json and no agp.safetensors"):
        find.resolve_agp(str(tmp_path))
    find.check_agp_cameras(agp, (2.6, 2.6), (42.0, 42.0))
    with pytest.raises(ValueError, match=r"^distance: .* 2.6 to 2.8, the run has 1.4 to 1.6; set stages.0"):
        find.check_agp_cameras(agp, (1.4, 1.6), (42.0, 42.0))
    other = make_tiny_prior(tmp_path / "other", "v_prediction", seed=1)
    with pytest.raises(ValueError, match="another prior"):
        make_pair(make_run((other, agp)))
    assert json.loads((agp / "agp.json").read_text())["rank"] == 2
    request = cli.parse("", ["--agp", str(agp), "--dry-run"])
    assert request.config.stages[0].geometric_prior == str(agp)
