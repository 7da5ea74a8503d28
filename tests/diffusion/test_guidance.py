"""The distillation mathematics against closed forms, against diffusers' own schedulers, and against known mistakes."""
# mypy: disable-error-code="attr-defined"
# diffusers stands in for each of its classes by one without attributes where torch is missing; mypy sees that one

import math
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from raydream.diffusion import guidance
from raydream.types import Condition

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 4, 5, 6)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exact_eps(z_t: Tensor, abar_t: Tensor, mean: float, std: float) -> Tensor:
    """The noise predictor of data distributed as N(mean, std^2) in every element."""
    abar = abar_t[:, None, None, None]
    return (1 - abar).sqrt() * (z_t - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)


class Echo:
    """A denoiser whose answer depends on everything it is told about a view, and on nothing of its neighbours."""

    def eps(self, z_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        text, camera = cond.text.sum(dim=(1, 2)), (cond.c2w.sum(dim=(1, 2)) + cond.fov_y_deg) * cond.camera_weight
        factor = torch.sin(text + 0.01 * t + camera)[:, None, None, None]
        return torch.tanh(factor * z_t + text[:, None, None, None] * z_t.roll(1, dims=-1))


def condition(generator: torch.Generator, num_views: int) -> Condition:
    weight = torch.arange(num_views, dtype=torch.float64) % 2
    text, c2w = normal(generator, num_views, 2, 3), normal(generator, num_views, 4, 4)
    return Condition(text, c2w, 40 + normal(generator, num_views), weight)


@pytest.mark.parametrize(
    "config",
    [
        SD,
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {**SD, "rescale_betas_zero_snr": True},
        {"trained_betas": [1e-4 * (1 + i / 100) for i in range(1000)]},
    ],
)
def test_alphas_cumprod_are_those_of_diffusers(config: dict) -> None:
    ours = guidance.alphas_cumprod(DDIMScheduler(**config).config)
    torch.testing.assert_close(ours.float(), DDIMScheduler(**config).alphas_cumprod, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(guidance.alphas_cumprod(config), ours, rtol=0, atol=0)  # absent keys are defaults
    assert (ours.diff() < 0).all()


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    abar = guidance.alphas_cumprod({**SD, "rescale_betas_zero_snr": True})
    assert abar[-1] == 0
    torch.testing.assert_close(abar[0], guidance.alphas_cumprod(SD)[0])


def test_unknown_betas_are_an_error_about_the_prior() -> None:
    with pytest.raises(ValueError, match=r"^prior: .*sigmoid"):
        guidance.alphas_cumprod({"beta_schedule": "sigmoid"})


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_noise_and_velocity_are_those_of_diffusers(kind: type, generator: torch.Generator) -> None:
    scheduler = kind(**SD)
    z_0, noise = normal(generator, *SHAPE), normal(generator, *SHAPE)
    t = torch.tensor([0, 500, 999])
    abar_t = scheduler.alphas_cumprod[t].double()
    z_t, v = guidance.add_noise(z_0, noise, abar_t), guidance.v_target(z_0, noise, abar_t)
    torch.testing.assert_close(z_t, scheduler.add_noise(z_0, noise, t), rtol=1e-6, atol=1e-6)  # its sqrt is in float32
    torch.testing.assert_close(v, scheduler.get_velocity(z_0, noise, t), rtol=1e-6, atol=1e-6)
    assert z_t.dtype == v.dtype == torch.float64


def test_v_and_eps_say_the_same(generator: torch.Generator) -> None:
    z_0, noise = normal(generator, *SHAPE), normal(generator, *SHAPE)
    abar_t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    z_t, v = guidance.add_noise(z_0, noise, abar_t), guidance.v_target(z_0, noise, abar_t)
    torch.testing.assert_close(guidance.eps_from_v(v, z_t, abar_t), noise, rtol=0, atol=1e-15)
    assert guidance.lora_target("epsilon", z_0, noise, abar_t) is noise
    assert torch.equal(guidance.lora_target("v_prediction", z_0, noise, abar_t), v)


def test_guidance_scale_one_is_the_plain_conditional_model(generator: torch.Generator) -> None:
    negative, positive = normal(generator, *SHAPE), normal(generator, *SHAPE)
    torch.testing.assert_close(guidance.classifier_free(negative, positive, 1.0), positive, rtol=0, atol=1e-15)
    assert torch.equal(guidance.classifier_free(negative, positive, 0.0), negative)
    # DreamFusion's own form, positive + s (positive - negative), has one more unit of guidance at the same number
    trap = positive + 7.5 * (positive - negative)
    torch.testing.assert_close(guidance.classifier_free(negative, positive, 8.5), trap)
    assert (guidance.classifier_free(negative, positive, 7.5) - trap).abs().max() > 0.1
    ones = torch.ones(SHAPE)
    assert torch.equal(guidance.classifier_free(ones, 3 * ones, 7.5), 16 * ones)  # negative first, then positive


def test_several_texts_in_one_batch_equal_one_view_at_a_time(generator: torch.Generator) -> None:
    num_views, num_texts = 2, 4
    z_t, t = normal(generator, num_views, 4, 5, 6), torch.tensor([20, 700])
    cond, texts = condition(generator, num_views), normal(generator, num_texts, num_views, 2, 3)
    together = guidance.eps_for_texts(Echo().eps, z_t, t, cond, texts)
    weights = -normal(generator, 2, num_views).abs()
    guided = guidance.perp_neg(together[0], together[1], together[2:], weights)
    for view in range(num_views):
        one = slice(view, view + 1)
        alone = [
            Echo().eps(
                z_t[one], t[one], Condition(text[one], cond.c2w[one], cond.fov_y_deg[one], cond.camera_weight[one])
            )
            for text in texts
        ]
        for index in range(num_texts):
            torch.testing.assert_close(together[index, one], alone[index])
        direction, expected = alone[1] - alone[0], alone[1]
        for negative, weight in zip(alone[2:], weights[:, view]):
            away = negative - alone[0]
            expected = expected + weight * (away - (away * direction).sum() / (direction * direction).sum() * direction)
        torch.testing.assert_close(guided[one], expected)


def test_perp_neg_moves_only_across_the_positive_direction(generator: torch.Generator) -> None:
    uncond, positive = normal(generator, *SHAPE), normal(generator, *SHAPE)
    negatives, weights = normal(generator, 2, *SHAPE), -normal(generator, 2, 3).abs()
    moved = guidance.perp_neg(uncond, positive, negatives, weights) - positive
    assert moved.abs().amax(dim=(1, 2, 3)).min() > 0.1
    across = (moved * (positive - uncond)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(across, torch.zeros_like(across), rtol=0, atol=1e-12)
    parallel = torch.stack([3 * positive - 2 * uncond, 2 * uncond - positive])
    torch.testing.assert_close(guidance.perp_neg(uncond, positive, parallel, weights), positive)
    assert torch.equal(guidance.perp_neg(uncond, positive, negatives, torch.zeros_like(weights)), positive)
    assert guidance.perp_neg(uncond, uncond, negatives, weights).isfinite().all()


def test_weights_by_hand() -> None:
    abar_t = torch.tensor([0.0, 0.36, 1.0], dtype=torch.float64)
    expected = {
        "one_minus_abar": [1, 0.64, 0],
        "uniform": [1, 1, 1],
        "sqrt_abar_one_minus_abar": [0, 0.48, 0],
        "fantasia3d": [0, 0.6 * 0.64, 0],
    }
    assert set(expected) == set(get_args(guidance.Weighting))
    for kind, values in expected.items():
        torch.testing.assert_close(guidance.weight(kind, abar_t), torch.tensor(values, dtype=torch.float64))


def test_sds_of_a_gaussian_prior_in_closed_form(generator: torch.Generator) -> None:
    """The mean over antithetic noise is w(t) sqrt(abar (1 - abar)) / (abar s^2 + 1 - abar) (z_0 - mean): downhill."""
    mean, std = 0.7, 0.4
    z_0, noise = normal(generator, *SHAPE), normal(generator, *SHAPE)
    abar_t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    w_t = guidance.weight("one_minus_abar", abar_t)
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for drawn in (noise, -noise):
        eps = exact_eps(guidance.add_noise(z_0, drawn, abar_t), abar_t, mean, std)
        total += guidance.distillation_gradient(eps, drawn, w_t) / 2
    slope = (1 - abar_t) * (abar_t * (1 - abar_t)).sqrt() / (abar_t * std**2 + 1 - abar_t)
    torch.testing.assert_close(total, slope[:, None, None, None] * (z_0 - mean))


def test_vsd_is_still_where_the_renders_have_the_priors_distribution(generator: torch.Generator) -> None:
    """With references N(mean', s^2) the gradient is the same for every sample and vanishes exactly at mean' = mean."""
    z_t, abar_t = normal(generator, *SHAPE), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    w_t = guidance.weight("one_minus_abar", abar_t)
    prior = exact_eps(z_t, abar_t, 0.7, 0.4)
    assert guidance.distillation_gradient(prior, exact_eps(z_t, abar_t, 0.7, 0.4), w_t).abs().max() == 0
    pull = guidance.distillation_gradient(prior, exact_eps(z_t, abar_t, 0.2, 0.4), w_t)
    slope = w_t * (abar_t * (1 - abar_t)).sqrt() / (abar_t * 0.16 + 1 - abar_t)
    torch.testing.assert_close(pull, (slope * (0.2 - 0.7))[:, None, None, None].expand(SHAPE))


def test_denoising_is_that_of_diffusers(generator: torch.Generator) -> None:
    """Every view on its own way from its own t: 750, 500, 250 is what DDIM takes of four steps."""
    scheduler = DDIMScheduler(**SD, clip_sample=True, clip_sample_range=0.8, set_alpha_to_one=False)
    scheduler.set_timesteps(4)
    alphas = scheduler.alphas_cumprod.double()
    z_t = normal(generator, *SHAPE)

    def eps(z: Tensor, t: Tensor) -> Tensor:
        return exact_eps(z, alphas[t], 0.7, 0.4)

    found = guidance.denoised(eps, z_t, torch.tensor([750, 300, 90]), alphas, 3, 0.8)
    z = z_t[:1]
    for t in scheduler.timesteps[:3]:
        step = scheduler.step(eps(z, t[None]), t, z, use_clipped_model_output=True)
        z = step.prev_sample
    torch.testing.assert_close(found[:1], step.pred_original_sample.double(), rtol=1e-5, atol=1e-5)
    for view, t in enumerate((750, 300, 90)):
        alone = guidance.denoised(eps, z_t[view : view + 1], torch.tensor([t]), alphas, 3, 0.8)
        torch.testing.assert_close(found[view : view + 1], alone)


def test_one_step_wants_the_mean_of_two_modes_and_many_steps_one_of_them(generator: torch.Generator) -> None:
    alphas = guidance.alphas_cumprod(SD)
    z_t, t = normal(generator, 1, 4, 8, 8), torch.tensor([900])

    def eps(z: Tensor, t: Tensor) -> Tensor:
        """Of data that are -0.5 or 0.5 in each element."""
        abar = alphas[t][:, None, None, None]
        return (z - abar.sqrt() * 0.5 * torch.tanh(z * abar.sqrt() * 0.5 / (1 - abar))) / (1 - abar).sqrt()

    one, many = (guidance.denoised(eps, z_t, t, alphas, steps, 1.0).abs() for steps in (1, 40))
    assert one.mean() < 0.1
    assert ((many - 0.5).abs() < 0.05).double().mean() > 0.9


def test_implied_noise_is_what_was_added(generator: torch.Generator) -> None:
    z_0, noise = normal(generator, *SHAPE), normal(generator, *SHAPE)
    abar_t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(guidance.implied_noise(guidance.add_noise(z_0, noise, abar_t), z_0, abar_t), noise)


def test_sjc_is_sds_with_uniform_weight_and_the_same_input(generator: torch.Generator) -> None:
    z_0, noise = normal(generator, *SHAPE), normal(generator, *SHAPE)
    abar_t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    sigma = ((1 - abar_t) / abar_t).sqrt()[:, None, None, None]
    z_t = guidance.add_noise(z_0, noise, abar_t)
    torch.testing.assert_close((z_0 + sigma * noise) / (1 + sigma**2).sqrt(), z_t)
    eps = exact_eps(z_t, abar_t, 0.7, 0.4)
    sds = guidance.distillation_gradient(eps, noise, guidance.weight("uniform", abar_t))
    torch.testing.assert_close(guidance.sjc_gradient(eps, z_0, noise, abar_t), sds)
    # minus sigma times the score of N(mean, s^2 + sigma^2) at the perturbed latent, but for the noise, whose mean is 0
    score = -(z_0 + sigma * noise - 0.7) / (0.16 + sigma**2)
    torch.testing.assert_close(guidance.sjc_gradient(eps, z_0, noise, abar_t) + noise, -sigma * score)


def test_clipping_bounds_elements(generator: torch.Generator) -> None:
    gradient = normal(generator, *SHAPE)
    assert torch.equal(guidance.clip_gradient(gradient, 0.0), gradient)
    assert torch.equal(guidance.clip_gradient(gradient, max_abs=0.5), gradient.clamp(-0.5, 0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_does_not_pass_as_a_small_one(bad: float) -> None:
    gradient = torch.zeros(SHAPE)
    gradient[1, 0, 0, 0] = bad
    clipped = guidance.clip_gradient(gradient, max_abs=1.0).isfinite().flatten(1)
    assert [bool(view.all()) for view in clipped] == [True, False, True]


def test_timesteps_are_drawn_for_each_view_with_both_ends(generator: torch.Generator) -> None:
    t = guidance.draw_timesteps(3000, 20, 30, generator)
    assert t.dtype == torch.int64
    assert t.unique().tolist() == list(range(20, 31))
    counts = torch.bincount(t - 20)
    assert ((counts - 3000 / 11).abs() < 5 * math.sqrt(3000 / 11)).all()
    first, again = (guidance.draw_timesteps(8, 0, 999, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.unique()) > 1


@pytest.mark.parametrize(("t_min", "t_max"), [(-1, 5), (0, 1000), (6, 5)])
def test_timesteps_outside_the_model_are_an_error(t_min: int, t_max: int, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"^t_min, t_max: "):
        guidance.draw_timesteps(1, t_min, t_max, generator)
