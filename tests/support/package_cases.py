"""How far a backend is from the reference where it computes in other precision or on other borders."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from backend_cases import LAYOUT, random_points, random_rays, random_triangles
from torch import Tensor

from raydream.backend.reference import ReferenceBackend, hash_grid
from raydream.types import Backend, HashGridLayout, Rays

if TYPE_CHECKING:
    from raydream.backend.with_tinycudann import WithTinyCudaNn

REFERENCE = ReferenceBackend()


def features_difference(backend: "WithTinyCudaNn", device: str, layout: HashGridLayout = LAYOUT) -> float:
    """Of the features of points and of their gradient by the table, each relative to the reference's largest."""
    generator = torch.Generator().manual_seed(6)
    points = random_points(generator, 500, torch.float32).to(device)
    drawn = torch.randn(layout.num_entries, layout.features_per_level, generator=generator).to(device)
    weight = torch.randn(500, layout.num_features, generator=generator).to(device)

    def everything(encode: Callable[[Tensor, Tensor, HashGridLayout], Tensor]) -> list[Tensor]:
        table = drawn.clone().requires_grad_()
        features = encode(points, table, layout)
        return [features.detach(), *torch.autograd.grad((features * weight).sum(), table)]

    return relative(everything(backend.features), everything(hash_grid))


def field_difference(backend: Backend, device: str, hidden_width: int = 64) -> float:
    """Of ``field`` and its gradients, each relative to the largest value of the reference's."""
    generator = torch.Generator().manual_seed(7)
    points = random_points(generator, 500, torch.float32).to(device)
    shapes = (LAYOUT.num_entries, 2), (hidden_width, LAYOUT.num_features), (4, hidden_width)
    drawn = [torch.randn(shape, generator=generator).to(device) / 4 for shape in shapes]
    weight = torch.randn(500, 4, generator=generator).to(device)

    def everything(kernels: Backend) -> list[Tensor]:
        table, hidden, head = (tensor.clone().requires_grad_() for tensor in drawn)
        output = kernels.field(points, table, LAYOUT, hidden, head)
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), (table, hidden, head))]

    return relative(everything(backend), everything(REFERENCE))


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def march_difference(backend: Backend, device: str, num_rays: int) -> tuple[float, float]:
    """The part of the rays that have other numbers of samples, and how far the others' samples lie apart."""
    generator = torch.Generator().manual_seed(8)
    rays = random_rays(generator, num_rays, torch.float32)
    rays = Rays(rays.origins.to(device), rays.directions.to(device))
    occupancy = (torch.rand(9, 8, 7, generator=generator) < 0.4).to(device)
    jitter = torch.rand(num_rays, generator=generator).to(device)
    found, expected = (kernels.march(rays, occupancy, 1.0, 0.06, jitter) for kernels in (backend, REFERENCE))
    same = found.counts == expected.counts
    assert torch.equal(found.starts, found.counts.cumsum(0) - found.counts)
    assert torch.equal(found.ray_index, torch.repeat_interleave(torch.arange(num_rays, device=device), found.counts))
    assert 0 in expected.counts
    ends = [torch.stack((s.t_start, s.t_end))[:, same[s.ray_index]] for s in (found, expected)]
    return float((~same).float().mean()), float((ends[0] - ends[1]).abs().max())


def raster_difference(backend: Backend, device: str) -> tuple[float, float]:
    """The part of the pixels with another face, and how far barycentrics and depths of the others lie apart."""
    clip, faces = (tensor.to(device) for tensor in random_triangles(torch.Generator().manual_seed(0), torch.float32))
    found, expected = (kernels.rasterize(clip, faces[:24], 40, 52) for kernels in (backend, REFERENCE))
    same = found.face == expected.face
    assert 0 < int((expected.face < 0).sum()) < expected.face.numel()
    depth = (found.depth - expected.depth).abs() / expected.depth.clamp(min=1)
    apart = torch.maximum(depth, (found.barycentric - expected.barycentric).abs().amax(-1))
    return float((~same).float().mean()), float(apart[same].max())
