"""Inputs on which backends are compared: random, but with every special case that the kernels have to decide."""

from dataclasses import fields, replace

import torch
from torch import Tensor

from raydream.backend.edges import find_edges
from raydream.backend.layout import make_hash_grid_layout
from raydream.backend.reference import ReferenceBackend
from raydream.types import Backend, HashGridLayout, Rays, RaySamples

# Dense and hashed levels, and a width that is no power of two.
LAYOUT = make_hash_grid_layout(5, 2, 10, 4, 40)
SMOOTH = replace(LAYOUT, interpolation="smoothstep")


def random_points(generator: torch.Generator, num: int, dtype: torch.dtype) -> Tensor:
    """Points inside the unit cube, with some on its faces and outside it at the front."""
    points = torch.rand(num, 3, generator=generator, dtype=dtype)
    points[:4] = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0.5, 0], [0.25, 1, 0.75]], dtype=dtype)
    points[4:7] = torch.tensor([[-0.1, 0.3, 0.6], [0.2, 1.2, 0.4], [3, -2, 0.5]], dtype=dtype)
    return points


def random_rays(generator: torch.Generator, num: int, dtype: torch.dtype) -> Rays:
    """Rays from outside, from inside and along the axes; some miss, some run in a face of the box [-1, 1]^3."""
    origins = torch.randn(num, 3, generator=generator, dtype=dtype) * 1.5
    directions = torch.randn(num, 3, generator=generator, dtype=dtype)
    directions[: num // 2] = -origins[: num // 2] + directions[: num // 2] * 0.3
    for i in range(12):  # parallel to one axis, forwards and backwards, or to a plane
        directions[i, i % 3] = 0
        if i >= 6:
            directions[i, (i + 1) % 3] = 0
    origins[:2] = torch.tensor([[-1, 0.2, 3], [0.3, 1, -4]], dtype=dtype)
    directions[:2] = torch.tensor([[0, 0, -1], [0, 0, 1]], dtype=dtype)
    return Rays(origins, directions / directions.norm(dim=1, keepdim=True))


def random_samples(generator: torch.Generator, counts: list[int], dtype: torch.dtype) -> RaySamples:
    """Packed intervals of unequal length and with gaps; a count of 0 is a ray without samples."""
    number = torch.tensor(counts)
    ray_index = torch.repeat_interleave(torch.arange(len(counts)), number)
    start = torch.arange(len(ray_index), dtype=dtype) + 0.5 * torch.rand(
        len(ray_index), generator=generator, dtype=dtype
    )
    end = start + 0.05 + 0.4 * torch.rand(len(ray_index), generator=generator, dtype=dtype)
    return RaySamples(ray_index, start, end, number.cumsum(0) - number, number)


def random_triangles(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Clip coordinates of two views and faces: large, small, degenerate, doubled, behind the camera, out of sight."""
    clip = torch.randn(2, 60, 4, generator=generator, dtype=dtype)
    clip[..., 3] = 0.2 + 2 * torch.rand(2, 60, generator=generator, dtype=dtype)
    clip[:, :3, 3] = torch.tensor([0, -1, 0.5], dtype=dtype)
    faces = torch.randint(0, 60, (200, 3), generator=generator)
    faces[10] = faces[11]  # the same face twice: the lower index wins
    faces[12, 0] = faces[12, 1]  # no area
    # A square of two triangles whose edges run through pixel centres, nearer than all else.
    clip[0, 56:, :2] = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]], dtype=dtype) * 0.1
    clip[0, 56:, 3] = 0.1
    faces[20:22] = torch.tensor([[56, 57, 58], [56, 58, 59]])
    return clip, faces


def mesh_results(backend: Backend, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Image, depth and all gradients of two bent sheets, one before the other, from two sides."""
    generator, side = torch.Generator().manual_seed(4), torch.arange(13)
    row, column = (part.flatten() for part in torch.meshgrid(side, side, indexing="ij"))
    bumps = 0.1 * torch.rand(2, 169, generator=generator, dtype=torch.float64)
    sheets = [torch.stack((column / 8 - 0.9 + k / 3, row / 9 - 0.8 + k / 5, bumps[k] + k), dim=1) for k in range(2)]
    corner = row * 13 + column
    (inner,) = ((row < 12) & (column < 12)).nonzero(as_tuple=True)
    first = torch.stack((corner[inner], corner[inner] + 1, corner[inner] + 13), dim=1)
    second = torch.stack((corner[inner] + 14, corner[inner] + 13, corner[inner] + 1), dim=1)
    faces = torch.cat((first, second, first + 169, second + 169)).to(device)
    x, y, z = torch.cat(sheets).unbind(1)
    views = [torch.stack((x + z * turn, y, z, 2 + 0.3 * z - 0.2 * turn * x), dim=1) for turn in (-0.4, 0.5)]
    clip = torch.stack(views).to(device, dtype).requires_grad_()
    colors = torch.rand(338, 3, generator=generator).to(device, dtype).requires_grad_()
    fragments = backend.rasterize(clip, faces, 37, 45)
    image = torch.cat((backend.interpolate(colors, faces, fragments), fragments.depth[..., None]), dim=-1)
    image = backend.antialias(image, clip, find_edges(faces), fragments)
    weight = torch.randn(image.shape, generator=generator).to(device, dtype)
    return [image.detach(), *torch.autograd.grad((image * weight).sum(), (clip, colors))]


def hash_grid(backend: Backend, points: Tensor, table: Tensor, layout: HashGridLayout) -> Tensor:
    """The features ``[sample, width]``, by a network that passes them on: ``relu(f) - relu(-f)``."""
    eye = torch.eye(layout.num_features).to(table)
    return backend.field(points, table, layout, torch.cat([eye, -eye]), torch.cat([eye, -eye], dim=1))


def hash_grid_jacobian(
    backend: Backend, points: Tensor, table: Tensor, layout: HashGridLayout
) -> tuple[Tensor, Tensor]:
    """The same, and their derivatives ``[sample, 3, width]`` by the point: one after the other is made output 0."""
    eye = torch.eye(layout.num_features).to(table)
    hidden, slopes = torch.cat([eye, -eye]), []
    for i in range(layout.num_features):
        head = torch.cat([eye, -eye], dim=1).roll(-i, dims=0)
        output, slope = backend.field_gradient(points, table, layout, hidden, head)
        slopes.append(slope)
    return output.roll(layout.num_features - 1, dims=1), torch.stack(slopes, dim=-1)


def summed_kernels(backend: Backend, dtype: torch.dtype, device: str, layout: HashGridLayout = LAYOUT) -> list[Tensor]:
    """Values and gradients of hash grid, field and compositing, all of size about 1, from fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    counts = [3, 0, 40, 1] * 12
    samples = random_samples(generator, counts, dtype)
    samples = RaySamples(*(getattr(samples, part.name).to(device) for part in fields(samples)))
    points = random_points(generator, 300, dtype).to(device)
    table, values = (
        torch.randn(layout.num_entries, 2, generator=generator),
        torch.randn(sum(counts), 5, generator=generator),
    )
    density = 3 * torch.rand(sum(counts), generator=generator)
    table, values, density = (x.to(device, dtype).requires_grad_() for x in (table, values, density))
    hidden = (torch.randn(8, layout.num_features, generator=generator) / 4).to(device, dtype).requires_grad_()
    head = (torch.randn(4, 8, generator=generator) / 4).to(device, dtype).requires_grad_()

    def weighted(*outputs: Tensor) -> Tensor:
        shapes = (output.shape for output in outputs)
        parts = [(torch.randn(s, generator=generator).to(o) * o).sum() for s, o in zip(shapes, outputs)]
        return sum(parts[1:], parts[0])

    encoded = hash_grid(backend, points, table, layout)
    both = hash_grid_jacobian(backend, points, table, layout)
    field = backend.field_gradient(points, table, layout, hidden, head)
    composited = backend.composite(density, values, samples)
    return [
        encoded,
        *torch.autograd.grad(weighted(encoded), table),
        both[0],
        both[1] / layout.resolutions[-1],
        *(grad / 1000 for grad in torch.autograd.grad(weighted(*both), table)),
        field[0],
        field[1] / layout.resolutions[-1],
        *(grad / 1000 for grad in torch.autograd.grad(weighted(*field), (table, hidden, head))),
        *composited,
        *torch.autograd.grad(weighted(*composited), (density, values)),
    ]


def worst_difference(backend: Backend, dtype: torch.dtype, device: str, layout: HashGridLayout = LAYOUT) -> float:
    """Between a backend's ``summed_kernels`` and the reference's."""
    found, expected = (summed_kernels(kernels, dtype, device, layout) for kernels in (backend, ReferenceBackend()))
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected))
