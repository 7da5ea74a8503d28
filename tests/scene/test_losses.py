"""Regularisers against closed forms, finite differences and the behaviour that each one is there for."""

import math

import pytest
import torch

from raydream.scene.losses import opaqueness, orientation, sparsity, z_variance
from raydream.types import RaySamples

COUNTS = (3, 0, 2, 4)


def packed(counts=COUNTS, dtype=torch.float64) -> RaySamples:
    """Intervals of length 0.5 from distance 1 on, the k-th of a ray at ``1 + k / 2``."""
    counts = torch.tensor(counts)
    starts = counts.cumsum(0) - counts
    ray_index = torch.repeat_interleave(torch.arange(len(counts)), counts)
    t_start = 1 + (torch.arange(len(ray_index)) - starts[ray_index]).to(dtype) / 2
    return RaySamples(ray_index, t_start, t_start + 0.5, starts, counts)


def random_inputs():
    generator = torch.Generator().manual_seed(0)
    normals = torch.nn.functional.normalize(torch.randn(9, 3, generator=generator, dtype=torch.float64), dim=-1)
    directions = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator, dtype=torch.float64), dim=-1)
    weights = torch.tensor([0.1, 0.5, 0.3, 0.2, 0.1, 0.1, 0.2, 0.3, 0.3], dtype=torch.float64)
    return weights, normals, directions


def test_sparsity_of_empty_full_and_image_shaped_opacity():
    assert sparsity(torch.zeros(5)).item() == pytest.approx(0.1)
    assert sparsity(torch.ones(2, 3, 4, 1)).item() == pytest.approx(math.sqrt(1.01))
    assert sparsity(torch.tensor([0.0, 1.0])).item() == pytest.approx((0.1 + math.sqrt(1.01)) / 2)


def test_opaqueness_is_the_binary_entropy_and_finite_at_both_ends():
    assert opaqueness(torch.full((7,), 0.5)).item() == pytest.approx(math.log(2))
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert opaqueness(torch.tensor([0.25, 0.75])).item() == pytest.approx(quarter)
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = opaqueness(ends)
    loss.backward()
    assert loss.item() == pytest.approx(-0.001 * math.log(0.001) - 0.999 * math.log(0.999), rel=1e-4)
    assert ends.grad.tolist() == [0.0, 0.0]


def test_opaqueness_drives_rays_apart():
    opacity = torch.tensor([0.3, 0.7], requires_grad=True)
    opaqueness(opacity).backward()
    assert opacity.grad[0] > 0 > opacity.grad[1]  # descent: the thin ray fades, the thick one fills


def test_orientation_counts_only_what_looks_away_per_ray_that_hits():
    samples = packed((2, 1, 1))
    directions = torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    slope = math.sqrt(0.5)
    normals = torch.tensor([[0, 0, 1.0], [0, slope, -slope], [1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    weights = torch.tensor([0.6, 0.4, 0.3, 0.0], dtype=torch.float64)
    # Towards the camera: 0. At 45 degrees away: 0.4 / 2. Straight away: 0.3. The third ray sees nothing: not counted.
    assert orientation(weights, normals, directions, samples).item() == pytest.approx((0.4 / 2 + 0.3) / 2)
    assert orientation(0 * weights, normals, directions, samples).item() == 0.0


def test_orientation_leaves_the_density_alone():
    weights, normals, directions = random_inputs()
    weights.requires_grad_()
    normals.requires_grad_()
    orientation(weights, normals, directions, packed()).backward()
    assert weights.grad is None
    assert normals.grad.abs().sum() > 0


def test_z_variance_of_two_point_masses_and_of_one():
    samples = packed((3, 3))
    split = torch.tensor([0.3, 0.0, 0.6, 0.0, 0.9, 0.0], dtype=torch.float64)
    # Shares 1/3 and 2/3, one unit apart: variance 2/9. The other ray ends in one place: 0.
    assert z_variance(split, samples).item() == pytest.approx((2 / 9 + 0) / 2)


def test_z_variance_skips_rays_that_are_not_solid():
    samples = packed((3, 3))
    weights = torch.tensor([0.3, 0.0, 0.6, 0.2, 0.0, 0.2], dtype=torch.float64)
    assert z_variance(weights, samples).item() == pytest.approx(2 / 9)
    thin = (0.2 * weights).requires_grad_()
    loss = z_variance(thin, samples)
    loss.backward()
    assert loss.item() == 0.0
    assert (thin.grad == 0).all()


def test_z_variance_does_not_shrink_the_object():
    """Fading a ray must not lower the loss. Without normalisation it does, which is how objects used to shrink."""
    samples = packed((3,))
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    weights = scale * torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
    (slope,) = torch.autograd.grad(z_variance(weights, samples), scale, retain_graph=True)
    assert abs(slope.item()) < 1e-12
    distance = (samples.t_start + samples.t_end) / 2
    mean = (weights * distance).sum()
    (wrong_slope,) = torch.autograd.grad((weights * (distance - mean).square()).sum(), scale)
    assert abs(wrong_slope.item()) > 0.1


def test_z_variance_pulls_weight_together():
    weights = torch.tensor([0.2, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    z_variance(weights, packed((3,))).backward()
    assert weights.grad[1] < 0 < weights.grad[0]
    assert weights.grad[2] > 0


def test_gradients_agree_with_finite_differences():
    weights, normals, directions = random_inputs()
    samples = packed()
    opacity = torch.tensor([0.05, 0.4, 0.8, 0.95], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsity, (opacity,))
    assert torch.autograd.gradcheck(opaqueness, (opacity,))
    normals.requires_grad_()
    assert torch.autograd.gradcheck(lambda n: orientation(weights, n, directions, samples), (normals,))
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: z_variance(w, samples), (weights,))


def test_no_samples_at_all():
    samples = packed((0, 0), torch.float32)
    nothing = torch.zeros(0)
    assert z_variance(nothing, samples).item() == 0.0
    assert orientation(nothing, torch.zeros(0, 3), torch.zeros(2, 3), samples).item() == 0.0
