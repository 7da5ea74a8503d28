"""Meshes that are optimised: interpolation, outlines and gradients of places, against closed forms and differences."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
import trimesh
from backend_cases import mesh_results, random_triangles
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import pad

from raydream.backend import load_backend
from raydream.backend.edges import find_edges
from raydream.camera import camera_rays, clip_from_world, orbit_cameras
from raydream.types import Backend, Cameras

REFERENCE = load_backend("reference", "cpu")
NUMBA = load_backend("numba", "cpu")


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


def look(image_px: int) -> Cameras:
    azimuth, elevation, distance, fov = torch.tensor([[30.0], [20.0], [3.0], [45.0]], dtype=torch.float64)
    return orbit_cameras(azimuth, elevation, distance, fov, image_px, image_px)


def to_clip(vertices: Tensor, cameras: Cameras) -> Tensor:
    return pad(vertices, (0, 1), value=1.0) @ clip_from_world(cameras).transpose(1, 2)


def tensors(mesh: trimesh.Trimesh) -> tuple[Tensor, Tensor]:
    return torch.tensor(np.asarray(mesh.vertices), dtype=torch.float64), torch.tensor(np.asarray(mesh.faces)).long()


def covered(backend: Backend, clip: Tensor, faces: Tensor, size: int) -> Tensor:
    """The antialiased image ``[view, h, w, 1]`` of what is covered."""
    fragments = backend.rasterize(clip, faces, size, size)
    solid = (fragments.face >= 0)[..., None].to(clip.dtype)
    return backend.antialias(solid, clip, find_edges(faces), fragments)


# --- barycentrics, depth and interpolation


def test_fragments_are_where_rays_meet_faces(backend: Backend) -> None:
    """Moeller and Trumbore's intersection, with the distance along the axis for depth."""
    vertices, faces = tensors(trimesh.creation.torus(0.6, 0.25, major_sections=9, minor_sections=7))
    cameras = look(40)
    fragments = backend.rasterize(to_clip(vertices, cameras), faces, 40, 40)
    hit = (fragments.face >= 0).flatten()
    assert 300 < hit.sum() < 1200
    rays = camera_rays(cameras)
    a, b, c = vertices[faces[fragments.face.flatten()[hit]]].unbind(1)
    direction, offset = rays.directions[hit], rays.origins[hit] - a
    across = torch.linalg.cross(direction, c - a)
    determinant = ((b - a) * across).sum(1)
    turned = torch.linalg.cross(offset, b - a)
    v, w = (offset * across).sum(1) / determinant, (direction * turned).sum(1) / determinant
    distance = ((c - a) * turned).sum(1) / determinant
    depth = distance * (direction @ -cameras.c2w[0, :3, 2])
    expected = torch.stack((1 - v - w, v, w), dim=1)
    torch.testing.assert_close(fragments.barycentric.view(-1, 3)[hit], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(fragments.depth.flatten()[hit], depth, rtol=1e-11, atol=0)
    image = backend.interpolate(vertices, faces, fragments).view(-1, 3)
    torch.testing.assert_close(image[hit], rays.origins[hit] + distance[:, None] * direction, rtol=0, atol=1e-10)
    assert (image[~hit] == 0).all()


def test_gradients_of_places_and_values(backend: Backend, generator: torch.Generator) -> None:
    """Through barycentrics and depth; of the faces that stay in view, at places that change no pixel's face."""
    vertices, faces = tensors(trimesh.creation.icosphere(subdivisions=1, radius=0.7))
    clip = to_clip(vertices, look(12))
    colors = torch.randn(len(vertices), 2, generator=generator, dtype=torch.float64)

    def shown(clip: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
        fragments = backend.rasterize(clip, faces, 12, 12)
        return backend.interpolate(colors, faces, fragments), fragments.depth

    assert gradcheck(shown, (clip.requires_grad_(), colors.requires_grad_()), fast_mode=True)


def test_gradients_of_outlines(backend: Backend, generator: torch.Generator) -> None:
    """By the image and by places, of two shapes, one of which is partly before the other."""
    parts = [trimesh.creation.icosphere(subdivisions=1, radius=0.5), trimesh.creation.box(extents=(0.6, 0.6, 0.6))]
    parts[1].apply_translation((0.37, 0.21, 0.4))
    vertices, faces = tensors(trimesh.util.concatenate(parts))
    clip, edges = to_clip(vertices, look(14)), find_edges(faces)
    fragments = backend.rasterize(clip, faces, 14, 14)
    image = torch.randn(1, 14, 14, 2, generator=generator, dtype=torch.float64)
    assert (backend.antialias(image, clip, edges, fragments) != image).any(-1).sum() > 15

    def blended(image: Tensor, clip: Tensor) -> Tensor:
        return backend.antialias(image, clip, edges, fragments)

    assert gradcheck(blended, (image.requires_grad_(), clip.requires_grad_()), fast_mode=True)


# --- outlines against pictures of many samples a pixel


def shapes() -> dict[str, tuple[Tensor, Tensor]]:
    triangle = torch.tensor([[-0.7, -0.5, 0.1], [0.8, -0.3, 0.2], [0.1, 0.75, -0.3]], dtype=torch.float64)
    quad = torch.tensor([[-0.6, -0.5, 0], [0.7, -0.4, 0], [0.6, 0.7, 0], [-0.5, 0.6, 0]], dtype=torch.float64)
    made: dict[str, tuple[Tensor, Tensor]] = {
        "triangle": (triangle, torch.tensor([[0, 1, 2]])),
        "quad": (quad, torch.tensor([[0, 1, 2], [0, 2, 3]])),
    }
    for subdivisions in (1, 3, 4):  # faces of 17, 4 and 2 pixels along a side, and of less at the outline
        made[f"sphere {subdivisions}"] = tensors(trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.7))
    return made


def moved(vertices: Tensor, how: str, amount: Tensor) -> Tensor:
    if how == "scale":
        return vertices * (1 + amount)
    if how == "move":
        return vertices + amount * torch.tensor([0.8, 0.5, 0.1], dtype=torch.float64)
    cosine, sine, zero, one = amount.cos(), amount.sin(), amount * 0, amount * 0 + 1
    turn = torch.stack((cosine, -sine, zero, sine, cosine, zero, zero, zero, one)).view(3, 3)
    return vertices @ turn.T + amount * 0


@pytest.mark.parametrize("how", ["move", "scale", "rotate"])
@pytest.mark.parametrize("shape", list(shapes()))
def test_an_outline_moves_as_the_picture_of_many_samples_does(shape: str, how: str) -> None:
    """The derivative of the picture's product with a slope, which every part of the outline enters; to 2 % of what the
    outline of the scaled shape sweeps, for of a moved one most cancels out. Measured up to 1.5 %. An antialiasing that
    follows the faces seen at pixels finds a sixtieth on fine spheres.
    """
    vertices, faces = shapes()[shape]
    amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
    image = weighted(covered(NUMBA, to_clip(moved(vertices, how, amount), look(SIZE_PX)), faces, SIZE_PX))
    (slope,) = torch.autograd.grad(image, amount)
    assert abs(slope - sampled_slope(shape, how)) < 0.02 * abs(sampled_slope(shape, "scale"))


SIZE_PX, SAMPLES = 96, 6


@lru_cache
def sampled_slope(shape: str, how: str) -> float:
    vertices, faces = shapes()[shape]
    large, small, ends = SIZE_PX * SAMPLES, 0.01, []
    for end in (small, -small):
        clip = to_clip(moved(vertices, how, torch.tensor(end, dtype=torch.float64)), look(large))
        ends.append(weighted((NUMBA.rasterize(clip, faces, large, large).face >= 0)[..., None].double()))
    return float((ends[0] - ends[1]) / (2 * small))


def weighted(image: Tensor) -> Tensor:
    """The product with a slope, in pixels of ``SIZE_PX``."""
    size = image.shape[1]
    slope = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    weight = 1 + slope[:, None] * 2 - slope[None, :] ** 2
    return (image[0, :, :, 0] * weight).sum() * (SIZE_PX / size) ** 2


def test_an_outline_is_as_smooth_as_many_samples_make_it() -> None:
    """The image itself: half of the error of the picture without it, at least, and no bias of the area."""
    vertices, faces = shapes()["sphere 4"]
    clip = to_clip(vertices, look(48))
    fine = (NUMBA.rasterize(clip, faces, 480, 480).face >= 0).double().view(48, 10, 48, 10).mean((1, 3))
    solid = (NUMBA.rasterize(clip, faces, 48, 48).face[0] >= 0).double()
    smooth = covered(NUMBA, clip, faces, 48)[0, :, :, 0]
    assert (smooth - fine).norm() < 0.3 * (solid - fine).norm()  # measured 0.2
    assert abs(smooth.sum() - fine.sum()) < 2e-3 * fine.sum()
    assert (smooth != solid).sum() > 60
    assert smooth.min() >= 0
    assert smooth.max() <= 1


# --- shared edges


def test_two_triangles_are_their_square(backend: Backend) -> None:
    """Each pixel once, whichever way the diagonal runs; and nothing is blended along it."""
    x, y = [-0.613, 0.587, 0.587, -0.613], [-0.511, -0.511, 0.533, 0.533]
    corners = torch.stack((torch.tensor(x), torch.tensor(y), torch.zeros(4), torch.ones(4)), 1)[None].double()
    both = torch.tensor([[0, 1, 2], [0, 2, 3]])
    whole = backend.rasterize(corners, both, 50, 50).face >= 0
    parts = [backend.rasterize(corners, both[k : k + 1], 50, 50).face >= 0 for k in range(2)]
    assert torch.equal(whole, parts[0] | parts[1])
    assert not (parts[0] & parts[1]).any()  # no centre lies on the diagonal
    turned = torch.tensor([[1, 2, 3], [1, 3, 0]])
    assert torch.equal(whole, backend.rasterize(corners, turned, 50, 50).face >= 0)
    smooth = covered(backend, corners, both, 50)
    torch.testing.assert_close(smooth, covered(backend, corners, turned, 50), rtol=0, atol=1e-12)
    # 1.2 x 1.044 of the image's 2 x 2, less what its four corners cut of pixels
    assert abs(smooth.sum() - 1.2 * 1.044 / 4 * 2500) < 0.3


def test_edges_are_found_once() -> None:
    box = tensors(trimesh.creation.box())[1]
    edges = find_edges(box)
    assert len(edges.counts) == 18
    assert (edges.counts == 2).all()
    assert len(edges.vertices.unique(dim=0)) == 18
    fan = find_edges(torch.tensor([[0, 1, 2], [1, 0, 3], [0, 1, 4]]))
    assert edges.starts.tolist() == list(range(0, 36, 2))
    assert fan.vertices[fan.counts == 3].tolist() == [[0, 1]]
    assert fan.opposite[:3].tolist() == [2, 3, 4]
    none = find_edges(torch.zeros(0, 3, dtype=torch.long))
    assert none.vertices.shape == (0, 2)


# --- what cannot be drawn


def test_what_is_not_drawn_has_no_gradient(backend: Backend) -> None:
    """Behind the camera, across its plane, not finite, without area, or not there at all; beside a face that is."""
    good = [[-0.5, -0.5, 0.0, 1.0], [0.6, -0.4, 0.0, 1.0], [0.1, 0.7, 0.0, 1.0]]
    odd = [[0.0, 0.0, 0.0, -1.0], [0.3, 0.1, 0.0, 0.0], [math.nan, 0.0, 0.0, 1.0], [math.inf, 0.0, 0.0, 1.0]]
    odd += [[0.0, 1.0, 0.0, math.nan], [0.9, 0.0, 0.0, 1e-320]]
    clip = torch.tensor([good + odd], dtype=torch.float64)
    faces = torch.tensor([[k, 1, 2] for k in range(3, 9)] + [[1, 1, 2], [0, 0, 0], [0, 1, 2]])
    colors = torch.rand(9, 2, dtype=torch.float64)

    def shown(faces: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        clip, values = clip.clone().requires_grad_(), colors.clone().requires_grad_()
        fragments = backend.rasterize(clip, faces, 16, 16)
        image = backend.interpolate(values, faces, fragments)
        image = torch.cat((image, fragments.depth[..., None]), dim=-1)
        image = backend.antialias(image, clip, find_edges(faces), fragments)
        grads = torch.autograd.grad((image**2).sum(), (clip, values))
        return image.detach(), torch.cat((grads[0].flatten(), grads[1].flatten()))

    image, grads = shown(faces, clip)
    assert grads.isfinite().all()
    assert (image[0, :, :, 2] > 0).sum() > 30
    alone, expected = shown(faces[-1:], clip)
    torch.testing.assert_close(image, alone)
    torch.testing.assert_close(grads, expected)
    assert (grads[:12] != 0).sum() == 9  # x, y and w of the face's corners
    for nothing in (faces[:-1], faces[:0]):
        image, grads = shown(nothing, clip)
        assert (image == 0).all()
        assert (grads == 0).all()


# --- numba against the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numba_is_the_reference(dtype: torch.dtype) -> None:
    for found, expected in zip(mesh_results(NUMBA, dtype, "cpu"), mesh_results(REFERENCE, dtype, "cpu"), strict=True):
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < (2e-5 if dtype == torch.float32 else 1e-12)


def test_equal_meshes_give_equal_bits() -> None:
    for first, second in zip(*(mesh_results(NUMBA, torch.float32, "cpu") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_random_triangles_are_blended_as_the_reference_does(generator: torch.Generator) -> None:
    """Crossing each other in all ways, in several views: the same pairs of pixels by the same edges."""
    clip, faces = random_triangles(generator, torch.float64)
    image = torch.rand(2, 30, 40, 2, generator=generator, dtype=torch.float64)
    fragments = REFERENCE.rasterize(clip, faces, 30, 40)
    results = []
    for backend in (REFERENCE, NUMBA):
        at = clip.clone().requires_grad_()
        blended = backend.antialias(image, at, find_edges(faces), fragments)
        results.append((blended.detach(), *torch.autograd.grad((blended**3).sum(), at)))
    assert (results[0][0] != image).any(-1).sum() > 100
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
