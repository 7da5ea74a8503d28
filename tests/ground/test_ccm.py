"""The canonical coordinate map: its box, its axes, its latent."""

import pytest
import torch

from raydream.coordinates import (
    Box,
    canonical_coordinates,
    decode_ccm,
    encode_ccm,
    points_from_canonical,
    tight_box,
    unit_coordinates,
)


@pytest.fixture
def points(generator: torch.Generator) -> torch.Tensor:
    spread = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    offset = torch.tensor([3.0, -7.0, 0.1], dtype=torch.float64)
    return torch.rand(200, 3, generator=generator, dtype=torch.float64) * spread + offset


def test_each_axis_spans_zero_to_one_after_the_longest_side_was_normalised(points):
    box = tight_box(points)
    coordinates = canonical_coordinates(points, box)
    assert torch.equal(coordinates.amin(0), torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(coordinates.amax(0), torch.ones(3, dtype=torch.float64))
    unit = unit_coordinates(points, box)
    extents = unit.amax(0) - unit.amin(0)
    assert extents.max() == pytest.approx(1.0)
    assert torch.allclose(unit.amax(0) + unit.amin(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(extents / extents.max(), box.extents / box.extents.max())  # proportions kept
    assert torch.allclose(coordinates, unit / extents + 0.5)  # SweetDreamer's two steps


def test_coordinates_do_not_depend_on_place_or_size_but_on_axes(points):
    moved = points * 37.0 + torch.tensor([1e3, -5.0, 2.0])
    expected = canonical_coordinates(points, tight_box(points))
    assert torch.allclose(canonical_coordinates(moved, tight_box(moved)), expected, atol=1e-9)
    swapped = points[:, [1, 0, 2]]
    assert not torch.allclose(canonical_coordinates(swapped, tight_box(swapped)), expected, atol=0.1)


def test_inverse(points):
    box = tight_box(points)
    assert torch.allclose(points_from_canonical(canonical_coordinates(points, box), box), points)


def test_flat_object_gets_the_middle_of_the_side_it_lacks():
    points = torch.tensor([[0.0, 5.0, 0.0], [2.0, 5.0, 1.0]])
    coordinates = canonical_coordinates(points, tight_box(points))
    assert torch.equal(coordinates, torch.tensor([[0.0, 0.5, 0.0], [1.0, 0.5, 1.0]]))


def test_latent_of_solid_empty_and_half_covered_pixels():
    coordinate, opacity = torch.tensor([0.25, 0.5, 1.0]), torch.tensor([1.0, 0.0, 0.5])
    ccm = (opacity[:, None] * coordinate).view(1, 1, 3, 3)
    latents = encode_ccm(ccm, opacity.view(1, 1, 3, 1))
    assert latents.shape == (1, 4, 1, 3)
    assert torch.allclose(latents[0, :, 0, 0], torch.tensor([-0.5, 0.0, 1.0, 1.0]))
    assert torch.allclose(latents[0, :, 0, 1], torch.tensor([0.0, 0.0, 0.0, -1.0]))
    assert torch.allclose(latents[0, :, 0, 2], torch.tensor([-0.25, 0.0, 0.5, 0.0]))
    decoded, decoded_opacity = decode_ccm(latents)
    assert torch.allclose(decoded_opacity.flatten(), opacity)
    assert torch.allclose(decoded[0, 0, 0], coordinate)
    assert torch.allclose(decoded[0, 0, 1], torch.zeros(3))
    assert torch.allclose(decoded[0, 0, 2], coordinate)


def test_gradients(generator):
    points = torch.rand(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    box = Box(torch.tensor([-1.0, -2.0, 0.0]).double(), torch.tensor([1.0, 2.0, 5.0]).double())
    assert torch.autograd.gradcheck(lambda p: canonical_coordinates(p, box), points)
    ccm = torch.rand(1, 2, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    opacity = torch.rand(1, 2, 2, 1, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(encode_ccm, (ccm, opacity))
