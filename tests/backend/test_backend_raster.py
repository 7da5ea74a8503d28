"""The z-buffers against closed forms, and the numba one against its plain torch twin."""

import math

import numpy as np
import pytest
import torch
import trimesh
from backend_cases import random_triangles

from raydream.backend import load_backend, reference
from raydream.camera import clip_from_world, orbit_cameras
from raydream.types import Backend, Cameras, Fragments


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


def test_sphere_and_box_are_where_they_should_be(backend: Backend) -> None:
    degrees = torch.tensor([30.0])
    cameras = orbit_cameras(degrees, degrees, torch.tensor([3.0]), torch.tensor([45.0]), 48, 64)
    sphere = trimesh.creation.icosphere(subdivisions=5, radius=0.8)
    fragments = rasterize_mesh(backend, sphere, cameras)
    # A ray at angle a to the axis meets the sphere at 3 cos a - sqrt(0.64 - 9 sin^2 a); depth is that times cos a.
    tangent = math.tan(math.radians(22.5))
    row, column = torch.meshgrid(
        (torch.arange(48) + 0.5) / 24 - 1, (torch.arange(64) + 0.5) / 24 - 64 / 48, indexing="ij"
    )
    cosine = 1 / (1 + tangent**2 * (row**2 + column**2)).sqrt()
    inside = 0.64 - 9 * (1 - cosine**2)
    depth = cosine * (3 * cosine - inside.clamp(min=0).sqrt())
    seen = fragments.face[0] >= 0
    assert (seen == (inside > 0))[(inside.abs() > 0.01)].all()
    sure = inside > 0.01
    # The facets cut a little off the ball, seen under a cosine of at least sqrt(0.01) / 0.8 = 1 / 8.
    cut = 0.8 - np.linalg.norm(sphere.triangles_center, axis=1).min()
    assert cut < 3e-4
    assert (fragments.depth[0] - depth)[sure].abs().max() < 8 * cut

    box = trimesh.creation.box(extents=(1, 1, 1))
    straight = orbit_cameras(torch.zeros(1), torch.zeros(1), torch.tensor([3.0]), torch.tensor([45.0]), 64, 64)
    fragments = rasterize_mesh(backend, box, straight)
    covered = fragments.face[0] >= 0
    assert (fragments.depth[0][covered] - 2.5).abs().max() < 1e-6
    half_width_px = 0.5 / 2.5 / tangent * 32
    assert covered.sum() == (2 * round(half_width_px)) ** 2
    assert torch.equal(covered, covered.flip(0))
    assert torch.equal(covered, covered.flip(1))


def rasterize_mesh(backend: Backend, mesh: trimesh.Trimesh, cameras: Cameras) -> Fragments:
    vertices = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32)
    clip = torch.nn.functional.pad(vertices, (0, 1), value=1.0) @ clip_from_world(cameras).transpose(1, 2)
    faces = torch.tensor(np.asarray(mesh.faces))
    return backend.rasterize(clip, faces, cameras.height_px, cameras.width_px)


def test_row_0_is_the_top_and_the_nearer_and_then_the_lower_face_wins(backend: Backend) -> None:
    def triangle(w: float) -> list[list[float]]:  # covers the upper left half of the image
        return [[-3 * w, 3 * w, 0, w], [1 * w, 1 * w, 0, w], [-1 * w, -1 * w, 0, w]]

    clip = torch.tensor([triangle(2.0) + triangle(1.0) + triangle(-1.0)])
    far, near, behind = [0, 1, 2], [3, 4, 5], [6, 7, 8]
    fragments = backend.rasterize(clip, torch.tensor([far, near, near[::-1], behind]), 4, 4)
    upper_left = torch.ones(4, 4, dtype=torch.bool).triu().flip(1)  # centres on the diagonal edge belong to the face
    assert torch.equal(fragments.face[0] == 1, upper_left)
    assert torch.equal(fragments.face[0] == -1, ~upper_left)
    assert torch.equal(fragments.depth[0], upper_left.float())
    assert (fragments.barycentric[0][~upper_left] == 0).all()


@pytest.mark.slow
def test_barycentrics_are_perspective_correct(backend: Backend, generator: torch.Generator) -> None:
    """Interpolating the clip coordinates themselves must give back the pixel's centre and the depth."""
    clip, faces = random_triangles(generator, torch.float64)
    fragments = backend.rasterize(clip, faces, 20, 30)
    view, row, column = torch.nonzero(fragments.face >= 0, as_tuple=True)
    corners = clip[view[:, None], faces[fragments.face[view, row, column]]]
    x, y, _, w = (fragments.barycentric[view, row, column][..., None] * corners).sum(1).unbind(-1)
    torch.testing.assert_close((x / w + 1) * 15, column + 0.5, rtol=0, atol=1e-9, check_dtype=False)
    torch.testing.assert_close((1 - y / w) * 10, row + 0.5, rtol=0, atol=1e-9, check_dtype=False)
    torch.testing.assert_close(w, fragments.depth[view, row, column], rtol=1e-10, atol=0)


def test_a_closed_mesh_has_no_holes(backend: Backend, generator: torch.Generator) -> None:
    """A square of many thin random triangles covers each of its pixels: neighbours leave no gap on their edges."""
    x = torch.rand(40, generator=generator).sort().values * 0.8 - 0.4
    x[0], x[-1] = -0.4, 0.4
    top, bottom = torch.stack([x, x * 0 + 0.4], -1), torch.stack([x[torch.randperm(40).sort().values], x * 0 - 0.4], -1)
    clip = torch.cat([torch.cat([top, bottom]), torch.tensor([[0.0, 1.0]]).expand(80, 2)], dim=1)[None]
    k = torch.arange(39)
    faces = torch.cat([torch.stack([k, k + 1, k + 40], -1), torch.stack([k + 1, k + 41, k + 40], -1)])
    assert (backend.rasterize(clip, faces, 100, 100).face[0] >= 0).sum() == 40 * 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("height", "width", "thinness"), [(33, 47, 1.0), (90, 130, 0.01), (20, 700, 1e-4)])
def test_numba_rasterizer_is_the_reference_bit_by_bit(
    seed: int, dtype: torch.dtype, height: int, width: int, thinness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of plain triangles and of slivers along any direction, some far larger than the image."""
    monkeypatch.setattr(reference, "RASTERIZE_CHUNK", 3000)  # several chunks
    clip, faces = random_triangles(torch.Generator().manual_seed(seed), dtype)
    corners = clip[:, faces.flatten()].unflatten(1, (-1, 3))
    corners[:, :, 2, :2] = corners[:, :, 1, :2] + thinness * (corners[:, :, 2, :2] - corners[:, :, 1, :2])
    corners[:, ::7, :, :2] *= 1000
    clip, faces = corners.flatten(1, 2), torch.arange(3 * len(faces)).view(-1, 3)
    expected, found = (
        b.rasterize(clip, faces, height, width) for b in map(load_backend, ("reference", "numba"), ("cpu", "cpu"))
    )
    assert (expected.face >= 0).any()
    for name in ("face", "depth", "barycentric"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_an_empty_mesh_is_an_empty_image(backend: Backend) -> None:
    fragments = backend.rasterize(torch.zeros(2, 0, 4), torch.zeros(0, 3, dtype=torch.long), 3, 5)
    assert (fragments.face == -1).all()
    assert fragments.barycentric.shape == (2, 3, 5, 3)
