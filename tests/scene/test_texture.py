"""What a mesh is painted with: the colours that renders of its scene show, not those of single points of the field."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import trimesh
from small_scenes import make_cameras, make_scene
from torch import Tensor, nn

from raydream.assets.raster import render_asset
from raydream.backend import load_backend
from raydream.scene.film import mesh_asset
from raydream.scene.isosurface import extract_mesh
from raydream.scene.nerf import NerfScene, plain_look
from raydream.scene.texture import bake_texture
from raydream.scene.uv_checks import check_uv
from raydream.types import Mesh

GREEN, LILAC = (0.1, 0.6, 0.2), (0.8, 0.6, 0.9)
RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)
NONE = (0.0, 0.0, 0.0)


class KnownField(nn.Module):
    """A field given by two functions of the place."""

    def __init__(self, density: Callable[[Tensor], Tensor], albedo: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.density, self.albedo = density, albedo

    def forward(self, points: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.density(points), self.albedo(points)


def either(first: Tensor, color: tuple[float, ...], other: tuple[float, ...]) -> Tensor:
    """``[sample, 3]``: one colour where ``first``, else another."""
    return torch.where(first[:, None], torch.tensor(color).to(first.device), torch.tensor(other).to(first.device))


def scene_of(density: Callable[[Tensor], Tensor], albedo: Callable[[Tensor], Tensor], backend: str) -> NerfScene:
    scene = make_scene(backend).float()
    scene.field = KnownField(density, albedo)  # type: ignore[assignment]
    return scene


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_mesh_shows_what_renders_show(backend: str) -> None:
    """A green ball in thin lilac haze: the surface lies in the haze, but what one sees is green."""

    def density(points: Tensor) -> Tensor:
        radius = points.norm(dim=-1)
        return torch.where(radius < 0.5, 300.0, torch.where(radius < 0.56, 3.0, 0.0))

    def albedo(points: Tensor) -> Tensor:
        return either(points.norm(dim=-1) < 0.5, GREEN, LILAC)

    scene = scene_of(density, albedo, backend)
    mesh = extract_mesh(density, 48, 2.0, 1.0, 2000)
    cameras = make_cameras([0.0, 120.0], 24)
    cameras = dataclasses.replace(cameras, c2w=cameras.c2w.float(), fov_y_deg=cameras.fov_y_deg.float())
    render = scene.volume(cameras, plain_look(2, NONE))
    inside = render.opacity[..., 0] > 0.99
    seen = (render.foreground / render.opacity.clamp(min=1e-4))[inside]

    def difference(color_fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        baked = bake_texture(mesh, color_fn, 128)
        views = render_asset(mesh_asset(baked), cameras, load_backend("numba", "cpu"), 2)
        return ((views.rgb / views.alpha.clamp(min=1e-4))[inside] - seen).abs()

    assert inside.sum() > 60
    painted, plain = difference(scene.surface_color), difference(lambda points, normals: albedo(points))
    assert painted.mean() < 0.06  # measured 0.043
    assert plain.mean() > 0.3  # the albedo at the surface itself is of the haze


def test_both_sides_of_a_thin_plate_keep_their_colours(backend: str) -> None:
    scene = scene_of(
        lambda points: torch.where(points[:, 2].abs() < 0.2, 500.0, 0.0),
        lambda points: either(points[:, 2] > 0, RED, BLUE),
        backend,
    )
    place = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    for side, color in ((1.0, RED), (-1.0, BLUE)):
        points = torch.cat([place, torch.full((40, 1), side * 0.2)], dim=-1)
        normals = torch.tensor([0.0, 0.0, side]).expand(40, 3)
        torch.testing.assert_close(scene.surface_color(points, normals), torch.tensor(color).expand(40, 3))


def test_surface_colour_in_closed_form(backend: str) -> None:
    """A fog whose colour follows the height: what is seen is the mean height under the ray's own weights."""
    rate = 4.0
    scene = scene_of(
        lambda points: torch.full((len(points),), rate),
        lambda points: (points[:, 1:2] + 1).expand(-1, 3) / 2,
        backend,
    )
    step = scene.step_size
    seen = scene.surface_color(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.0]]))
    # samples begin half a step from the origin of the ray, which lies two steps outside, and the last one within ten
    depth = torch.arange(1, 11) * step
    weight = torch.exp(-rate * (depth - step)) * (1 - math.exp(-rate * step))
    straight, tilted = 2 * step - depth, (2 * step - depth) * math.cos(math.radians(45))
    height = (weight * (straight + 4 * tilted)).sum() / (5 * weight.sum())
    torch.testing.assert_close(seen, ((height + 1) / 2).expand(1, 3), rtol=0, atol=1e-4)


def test_where_nothing_is_seen_the_albedo_remains(backend: str) -> None:
    scene = scene_of(lambda points: points[:, 0] * 0, lambda points: points.abs(), backend)
    points = torch.rand(30, 3, generator=torch.Generator().manual_seed(0))
    normals = nn.functional.normalize(points, dim=-1)
    torch.testing.assert_close(scene.surface_color(points, normals), points)
    scene.occupancy.values.zero_()
    torch.testing.assert_close(scene.surface_color(points, normals), points)


def test_normals_are_those_of_the_surface() -> None:
    """A baker hands the outward unit normal of each point."""

    def density(points: Tensor) -> Tensor:
        return 400 * (0.6 - points.norm(dim=-1)).clamp(-0.2, 0.2)

    mesh, seen = extract_mesh(density, 48, 2.0, 1.0, 4000), []

    def color_fn(points: Tensor, normals: Tensor) -> Tensor:
        seen.append((points, normals))
        return points

    bake_texture(mesh, color_fn, 64)
    points, normals = (torch.cat(parts) for parts in zip(*seen))
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(len(normals)))
    assert ((points / points.norm(dim=-1, keepdim=True)) * normals).sum(-1).min() > 0.95  # 64 texels a side are coarse


def test_a_large_mesh_is_unwrapped_in_parts() -> None:
    """More faces than xatlas bears at once, in their own order, each with the colour of its place."""
    ball = trimesh.creation.icosphere(subdivisions=6)
    mesh = Mesh(torch.from_numpy(ball.vertices).float(), torch.from_numpy(ball.faces).long())

    def color(points: Tensor, _normals: Tensor) -> Tensor:
        return 0.5 + 0.4 * points

    baked = bake_texture(mesh, color, 1024)
    assert baked.uv is not None
    assert baked.texture is not None
    assert torch.equal(baked.vertices[baked.faces], mesh.vertices[mesh.faces])
    middle, uv = mesh.vertices[mesh.faces].mean(1), baked.uv[baked.faces].mean(1)
    column, row = (uv[:, 0] * 1024).long(), ((1 - uv[:, 1]) * 1024).long()
    assert (baked.texture[row, column] - color(middle, middle)).abs().max() < 0.02
    checks = check_uv(mesh_asset(baked), load_backend("auto", "cpu"))
    assert checks is not None
    assert checks.stretch is not None
    assert (checks.overlap, checks.flat_faces) == (0, 0)
    assert checks.stretch < 1.05
