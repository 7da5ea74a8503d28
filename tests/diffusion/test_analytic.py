"""The exact score of a Gaussian mixture, in float64, against its log-density, quadrature and closed forms."""

from collections.abc import Sequence

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor
from toy_mixture import eps_by_autograd

from raydream.diffusion.analytic import MixtureDenoiser
from raydream.types import Condition

NUM_MODES, NUM_VIEWS, SHAPE = 3, 4, (4, 2, 3)
STD = 0.3
ABAR = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.0], dtype=torch.float64)  # by t = 0..4
ZERO_SNR = 4


class CameraModes:
    """Means that are any function of the camera; remembers which modes it was asked for."""

    def __init__(self, means: Float[Tensor, "mode 4 h w"]) -> None:
        self._means = means
        self.asked: list[int] = []

    def means(
        self,
        c2w: Float[Tensor, "view 4 4"],
        fov_y_deg: Float[Tensor, " view"],
        used: Int[Tensor, " used"],
        size_px: int,
    ) -> Float[Tensor, "view used 4 h w"]:
        assert size_px == self._means.shape[-1]
        self.asked = used.tolist()
        factor = (1 + c2w[:, 0, 3]) * fov_y_deg / 45
        return factor[:, None, None, None, None] * self._means[used]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def condition(probabilities: Sequence[Sequence[float]], generator: torch.Generator) -> Condition:
    num_views = len(probabilities)
    text = torch.tensor(probabilities, dtype=torch.float64)[:, None]
    fov = 45 + 5 * torch.rand(num_views, generator=generator, dtype=torch.float64)
    return Condition(text, 0.3 * normal(generator, num_views, 4, 4), fov, torch.ones(num_views, dtype=torch.float64))


def test_one_gaussian_in_closed_form(generator: torch.Generator) -> None:
    """z_t ~ N(alpha mu, alpha^2 s^2 + sigma^2), so eps is linear in z_t; at s = 1, mu = 0 it is sigma z_t."""
    mean, z_t, t = normal(generator, 1, *SHAPE), normal(generator, NUM_VIEWS, *SHAPE), torch.arange(NUM_VIEWS)
    cond = condition([[1.0]] * NUM_VIEWS, generator)
    factor = ((1 + cond.c2w[:, 0, 3]) * cond.fov_y_deg / 45)[:, None, None, None]
    abar = ABAR[t][:, None, None, None]
    expected = (1 - abar).sqrt() * (z_t - abar.sqrt() * factor * mean) / (abar * STD**2 + 1 - abar)
    torch.testing.assert_close(MixtureDenoiser(CameraModes(mean), ABAR, STD).eps(z_t, t, cond), expected)
    white = MixtureDenoiser(CameraModes(torch.zeros_like(mean)), ABAR, 1.0)
    torch.testing.assert_close(white.eps(z_t, t, cond), (1 - abar).sqrt() * z_t)


def test_eps_is_the_slope_of_the_log_density(generator: torch.Generator) -> None:
    """Every view has a camera, a noise level and a prompt of its own; near a mode, between modes, far from all."""
    source = CameraModes(normal(generator, NUM_MODES, *SHAPE))
    denoiser = MixtureDenoiser(source, ABAR, STD)
    probabilities = [[0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0], [0.1, 0.1, 0.8]]
    cond = condition(probabilities, generator)
    means = source.means(cond.c2w, cond.fov_y_deg, torch.arange(NUM_MODES), SHAPE[-1])
    for t in torch.cartesian_prod(*[torch.arange(len(ABAR))] * 2):
        t = t.repeat(NUM_VIEWS // 2)
        signal = ABAR[t].sqrt()[:, None, None, None]
        for z_t in (signal * means[:, 0], signal * means[:, :2].mean(1), 10 * normal(generator, NUM_VIEWS, *SHAPE)):
            eps = denoiser.eps(z_t, t, cond)
            for view in range(NUM_VIEWS):
                expected = eps_by_autograd(z_t[view], float(ABAR[t[view]]), means[view], probabilities[view], STD)
                torch.testing.assert_close(eps[view], expected, rtol=1e-9, atol=1e-10)


def test_the_clean_latent_that_eps_implies_is_the_posterior_mean(generator: torch.Generator) -> None:
    """Tweedie: (z_t - sigma eps) / alpha is E[z_0 | z_t]; here by quadrature, which knows no products of Gaussians.

    The modes differ in one coordinate only, so that the integral is over one number.
    """
    means, coordinate = torch.zeros(NUM_MODES, 4, 1, 1, dtype=torch.float64), (0, 1, 0, 0)
    means[:, 1, 0, 0] = torch.tensor([-1.0, 0.2, 1.3])
    probabilities, t, num_points = [0.5, 0.2, 0.3], torch.tensor([2]), 20_001
    abar = ABAR[2]
    x = torch.linspace(-6, 6, num_points, dtype=torch.float64)
    density = sum(p * torch.exp(-((x - mean) ** 2) / (2 * STD**2)) for p, mean in zip(probabilities, means[:, 1, 0, 0]))
    cond = condition([probabilities], generator)
    cond = Condition(cond.text, torch.zeros_like(cond.c2w), torch.full_like(cond.fov_y_deg, 45.0), cond.camera_weight)
    for value in (-1.5, -0.2, 0.0, 0.4, 2.0):
        z_t = normal(generator, 1, 4, 1, 1)
        z_t[coordinate] = value
        eps = MixtureDenoiser(CameraModes(means), ABAR, STD).eps(z_t, t, cond)
        weight = density * torch.exp(-((value - abar.sqrt() * x) ** 2) / (2 * (1 - abar)))
        clean = (z_t - (1 - abar).sqrt() * eps) / abar.sqrt()
        torch.testing.assert_close(clean[coordinate], (weight * x).sum() / weight.sum(), rtol=1e-9, atol=1e-9)


def test_responsibilities_by_hand(generator: torch.Generator) -> None:
    """Halfway between two modes the prompt decides; on a mode at little noise only that mode counts."""
    means = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE), 50 * torch.ones(SHAPE)]).double()
    denoiser = MixtureDenoiser(CameraModes(means), ABAR, STD)
    cond = condition([[0.3, 0.7, 0.0]], generator)
    cond = Condition(cond.text, torch.zeros_like(cond.c2w), torch.full_like(cond.fov_y_deg, 45.0), cond.camera_weight)
    t = torch.tensor([1])
    halfway = 0.5 * ABAR[1].sqrt() * torch.ones(1, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(denoiser.posterior_mode_mean(halfway, t, cond)[0], 0.7 * means[1])
    torch.testing.assert_close(denoiser.posterior_mode_mean(2 * halfway, t, cond)[0], means[1], rtol=1e-6, atol=0)


def test_without_signal_the_noise_is_all_there_is(generator: torch.Generator) -> None:
    """At abar = 0 eps is z_t, and the modes are as probable as the prompt says."""
    means, z_t = normal(generator, NUM_MODES, *SHAPE), normal(generator, 2, *SHAPE)
    probabilities, t = [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], torch.full((2,), ZERO_SNR)
    source, cond = CameraModes(means), condition(probabilities, generator)
    denoiser = MixtureDenoiser(source, ABAR, STD)
    assert torch.equal(denoiser.eps(z_t, t, cond), z_t)
    each = source.means(cond.c2w, cond.fov_y_deg, torch.arange(NUM_MODES), SHAPE[-1])
    expected = (cond.text[:, 0, :, None, None, None] * each).sum(1)
    torch.testing.assert_close(denoiser.posterior_mode_mean(z_t, t, cond), expected)


def test_modes_of_probability_zero_are_not_there(generator: torch.Generator) -> None:
    """Not rendered where no view needs them, without weight where only other views do, even right on top of them."""
    means = normal(generator, NUM_MODES, *SHAPE)
    source, smaller = CameraModes(means), CameraModes(means[::2])
    cond = condition([[0.4, 0.0, 0.6], [0.0, 0.0, 1.0]], generator)
    t = torch.tensor([0, 3])
    z_t = (ABAR[t].sqrt() * (1 + cond.c2w[:, 0, 3]) * cond.fov_y_deg / 45)[:, None, None, None] * means[1]
    eps = MixtureDenoiser(source, ABAR, STD).eps(z_t, t, cond)
    assert source.asked == [0, 2]
    without = Condition(cond.text[:, :, ::2], cond.c2w, cond.fov_y_deg, cond.camera_weight)
    assert torch.equal(eps, MixtureDenoiser(smaller, ABAR, STD).eps(z_t, t, without))
    assert eps.isfinite().all()


@pytest.mark.parametrize("t", range(len(ABAR)))
def test_single_precision_is_enough_at_the_exhibits_size(t: int, generator: torch.Generator) -> None:
    """4 x 64 x 64 numbers: squared distances of 1e4 over variances of 4e-3 must not drown what tells modes apart."""
    std, shape = 0.05, (4, 64, 64)
    means = normal(generator, NUM_MODES, *shape).clamp(-1, 1)
    means[1] = means[0] + 0.01 * means[2]  # two that are nearly alike
    source, cond = CameraModes(means), condition([[0.3, 0.3, 0.4]] * 2, generator)
    each = source.means(cond.c2w, cond.fov_y_deg, torch.arange(NUM_MODES), shape[-1])
    abar = ABAR[t]
    z_t = abar.sqrt() * each[:, :2].mean(1) + (1 - abar + abar * std**2).sqrt() * normal(generator, 2, *shape)
    half = Condition(cond.text.float(), cond.c2w.float(), cond.fov_y_deg.float(), cond.camera_weight.float())
    timesteps = torch.full((2,), t)
    exact = MixtureDenoiser(source, ABAR, std).eps(z_t, timesteps, cond)
    single = MixtureDenoiser(CameraModes(means.float()), ABAR.float(), std).eps(z_t.float(), timesteps, half)
    error = (single - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2e-5, f"relative error {error:.1e}"  # 3e-6 at most was seen; 0.1 with the distances in float32
