"""Numbers that are not finite: left out, counted, told, and the end of a run only where they stay."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_prior import make_tiny_prior
from tiny_score import LEARNER, SEED, new_score, views_of
from torch import Tensor

from raydream.config.actors import particle_config
from raydream.config.cluster import ClusterConfig
from raydream.config.presets import make_preset
from raydream.config.strict_json import apply_overrides
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.lora import LoraDenoiser
from raydream.distill.finite import MOST_IN_A_ROW
from raydream.distill.loop import _row
from raydream.distill.particle import Particle, make_particle
from raydream.distill.recovery import Failure, GiveUp, decide
from raydream.distill.score import HALF_LOSS_SCALE
from raydream.types import Condition


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("priors") / "epsilon")


def poisoned(answer: Callable[..., Tensor], view: int) -> Callable[..., Tensor]:
    def eps(*args: object) -> Tensor:
        found = answer(*args)
        factor = torch.ones_like(found)
        factor[view, 0, 0, 0] = math.inf
        return found * factor

    return eps


def test_a_view_is_left_out_and_the_others_are_what_they_were(prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = new_score(prior)
    *before, _ = score.guide(0, "rgb", range(3), *views_of(0))
    assert score.learner is not None
    monkeypatch.setattr(score.learner, "eps", poisoned(score.learner.eps, 3))
    *after, figures = score.guide(0, "rgb", range(3), *views_of(0))
    assert isinstance(figures, dict)
    assert figures["non_finite/views"] == 1
    for index, (one, other) in enumerate(zip(before, after)):
        one, other = np.asarray(one), np.asarray(other)
        if index == 1:
            assert np.array_equal(one[0], other[0])
            assert not other[1].any()
        else:
            assert np.array_equal(one, other)
    for _ in range(MOST_IN_A_ROW - 2):
        score.guide(0, "rgb", range(3), *views_of(0))
    with pytest.raises(FloatingPointError, match=f"gradient of particle 1 was not finite in {MOST_IN_A_ROW} steps"):
        score.guide(0, "rgb", range(3), *views_of(0))


def test_a_fit_is_left_out_and_its_loss_scaled_by_half(prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = new_score(prior)
    assert score.learner is not None
    before = {name: value.detach().clone() for name, value in score.learned.items()}
    with monkeypatch.context() as patch:
        patch.setattr(score.learner, "predict", poisoned(score.learner.predict, 0))
        assert score.fit(0, range(3), *views_of(0))["non_finite/fits"] == 1
    assert all(torch.equal(before[name], value) for name, value in score.learned.items())
    assert (score.step, score.loss_scale) == (1, 0.5)
    assert "non_finite/fits" not in score.fit(1, range(3), *views_of(1))
    other = new_score(prior)
    other.restore(score.snapshot())
    assert other.loss_scale == 0.5


def small_particle() -> Particle:
    small = ["n=1", "stages.0.camera.image_px=16", "stages.0.scene.samples_per_diagonal=32"]
    return make_particle(particle_config(apply_overrides(make_preset("exhibit", 50), small), 0, 0))


def test_a_particle_stays_where_its_gradient_is_not_finite() -> None:
    particle = small_particle()
    shape = (2, 4, 64, 64)
    start = particle.snapshot()
    particle.render(0)
    figures = particle.apply(0, np.full(shape, np.nan, dtype=np.float32))
    assert figures["non_finite/particles"] == 1
    after = particle.snapshot()
    assert (int(after["step"]), float(after["gradient_scale"])) == (1, 0.5)
    assert all(np.array_equal(start[name], after[name]) for name in start if name.startswith("scene/"))
    assert not any(value.any() for name, value in after.items() if name.startswith("adam/")), "not even a step counted"
    particle.render(1)
    assert "non_finite/particles" not in particle.apply(1, np.ones(shape, dtype=np.float32))
    moved = particle.snapshot()
    assert any(not np.array_equal(start[name], moved[name]) for name in start if name.startswith("scene/"))
    last = 1 + MOST_IN_A_ROW
    for step in range(2, last):
        particle.render(step)
        particle.apply(step, np.full(shape, np.inf, dtype=np.float32))
    particle.render(last)
    with pytest.raises(FloatingPointError, match="the gradient of particle 0 was not finite in 10 steps in a row"):
        particle.apply(last, np.full(shape, np.inf, dtype=np.float32))


def test_a_scale_changes_no_step() -> None:
    """A power of two is exact in float32."""
    plain, scaled = small_particle(), small_particle()
    scaled.gradient_scale = 2.0**-3
    for particle in (plain, scaled):
        particle.render(0)
        particle.apply(0, np.ones((2, 4, 64, 64), dtype=np.float32))
    one, other = plain.snapshot(), scaled.snapshot()
    assert all(np.array_equal(one[name], other[name]) for name in one if name != "gradient_scale")


def test_what_was_left_out_is_counted_over_all_actors() -> None:
    rows = [{"non_finite/views": 2.0, "guide/t": 1.0}, {"non_finite/views": 1.0, "guide/t": 2.0}]
    assert _row(list(rows)) == {"non_finite/views": 3.0, "guide/t": 1.5}


def test_what_stays_not_finite_ends_the_run() -> None:
    failure = Failure("application_error", "score", 0, 40, "FloatingPointError", "ten in a row")
    assert isinstance(decide(ClusterConfig(), [], failure), GiveUp)


def test_gradients_through_float16_are_those_of_float32_once_scaled(prior: Path) -> None:
    """Without a scale a LoRA's gradients fall below float16's smallest numbers; powers of two are exact, so the scale
    is harmless where it is not needed.
    """
    draws = torch.Generator().manual_seed(1)
    z, t, text = (
        torch.randn(2, 4, 16, 16, generator=draws),
        torch.tensor([500, 50]),
        torch.randn(2, 8, 32, generator=draws),
    )
    cond = Condition(text, torch.eye(4).expand(2, 4, 4), torch.full((2,), 45.0), torch.ones(2))

    def gradients(dtype: torch.dtype, scale: float) -> Tensor:
        learner = LoraDenoiser(DiffusersDenoiser.load(prior, dtype, torch.device("cpu")), LEARNER.rank, SEED)
        own = torch.Generator().manual_seed(2)
        named = learner.trainable()
        with torch.no_grad():
            for name, value in named.items():
                if ".lora_B." in name:
                    value.copy_(0.01 * torch.randn(value.shape, generator=own))
        loss = learner.predict(z, t, cond).square().flatten(1).mean(1).sum() / 4096
        found = torch.autograd.grad(loss * scale, [v for name, v in named.items() if "lora" in name])
        return torch.cat([(each / scale).flatten() for each in found])

    exact, plain, scaled = (
        gradients(dtype, scale)
        for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, HALF_LOSS_SCALE))
    )
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(exact, scaled, dim=0) > 0.999
    assert (plain == 0).float().mean() > 10 * (scaled == 0).float().mean()
    assert cosine(exact, plain, dim=0) < cosine(exact, scaled, dim=0)


def test_a_learner_in_float16_has_its_loss_scaled(prior: Path) -> None:
    whole, half = new_score(prior), new_score(prior, dtype="float16")
    assert (whole.loss_scale, half.loss_scale) == (1, HALF_LOSS_SCALE)
    assert whole.optimizer is not None
    assert half.optimizer is not None
    assert (whole.optimizer.defaults["eps"], half.optimizer.defaults["eps"]) == (1e-8, 1e-15)
