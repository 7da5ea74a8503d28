"""Surface extraction against bodies whose surface, volume and genus are known."""

import math

import numpy as np
import pytest
import torch
import trimesh

from raydream.scene.isosurface import extract_mesh, silhouette_threshold
from raydream.scene.protocol import EmptyMeshError
from raydream.types import Mesh

RESOLUTION = 48
DENSITY = 200.0


def solid(distance_fn, sharpness=None):
    """Density 200 inside of a body, given its signed distance; a step, or linear over ``200 / sharpness``."""
    if sharpness is None:
        return lambda points: DENSITY * (distance_fn(points) < 0)
    return lambda points: (DENSITY / 2 - sharpness * distance_fn(points)).clamp(0, DENSITY)


def ball(radius, center=(0.0, 0.0, 0.0)):
    return lambda points: (points - torch.tensor(center)).norm(dim=-1) - radius


def box(half_extent, center=(0.0, 0.0, 0.0)):
    return lambda points: ((points - torch.tensor(center)).abs() - torch.tensor(half_extent)).amax(-1)


def torus(points):
    return torch.stack([points[:, [0, 2]].norm(dim=-1) - 0.6, points[:, 1]], dim=-1).norm(dim=-1) - 0.25


def union(*distance_fns):
    return lambda points: torch.stack([distance(points) for distance in distance_fns]).amin(0)


def as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


# The box of a ball of radius 0.6, with its margins, is less than 1.6 wide.
HALF_VOXEL = 1.6 / (RESOLUTION - 1) / 2


@pytest.mark.parametrize("center", [(0.0, 0.0, 0.0), (0.21, -0.13, 0.3)])
def test_every_vertex_of_a_ball_lies_within_half_a_voxel(center):
    mesh = extract_mesh(solid(ball(0.6, center), sharpness=1000.0), RESOLUTION, DENSITY / 2, max_faces=10**6)
    assert ball(0.6, center)(mesh.vertices).abs().max() < HALF_VOXEL / 2
    assert np.abs(as_trimesh(mesh).center_mass - center).max() < 0.01 * HALF_VOXEL


def test_a_step_in_density_is_found_as_well_as_the_grid_can_tell():
    """The field only says on which side a grid point lies; some cells need one more vertex in the middle (Lewiner)."""
    mesh = extract_mesh(solid(ball(0.6)), RESOLUTION, max_faces=10**6)
    error = ball(0.6)(mesh.vertices)
    assert error.abs().max() < 3**0.5 * HALF_VOXEL
    assert error.abs().mean() < 0.5 * HALF_VOXEL
    assert error.mean().abs() < 0.1 * HALF_VOXEL  # neither swollen nor shrunk


@pytest.mark.parametrize(
    ("distance_fn", "volume", "euler_number"),
    [
        (ball(0.6), 4 / 3 * math.pi * 0.6**3, 2),
        (box((0.7, 0.3, 0.5), center=(0.1, 0.2, -0.3)), 8 * 0.7 * 0.3 * 0.5, 2),
        (torus, 2 * math.pi**2 * 0.6 * 0.25**2, 0),
    ],
)
@pytest.mark.parametrize("max_faces", [10**6, 3000])
def test_bodies_are_closed_and_face_outwards(distance_fn, volume, euler_number, max_faces):
    body = as_trimesh(extract_mesh(solid(distance_fn, sharpness=2000.0), RESOLUTION, DENSITY / 2, max_faces=max_faces))
    assert body.is_watertight
    assert body.is_winding_consistent
    assert body.euler_number == euler_number
    assert body.volume == pytest.approx(volume, rel=0.03)  # positive: counter-clockwise from outside
    assert len(body.faces) <= max_faces
    assert (body.area_faces > 0).all()


def test_bounds_of_a_box_axis_by_axis():
    mesh = extract_mesh(solid(box((0.7, 0.3, 0.5), center=(0.1, 0.2, -0.3)), sharpness=4000.0), 64, DENSITY / 2)
    voxel = 2.0 / 63
    assert mesh.vertices.amin(0).tolist() == pytest.approx([-0.6, -0.1, -0.8], abs=voxel / 2)
    assert mesh.vertices.amax(0).tolist() == pytest.approx([0.8, 0.5, 0.2], abs=voxel / 2)


def test_what_touches_the_cube_is_closed_there():
    body = as_trimesh(extract_mesh(solid(box((3.0, 0.3, 0.3)), sharpness=2000.0), RESOLUTION, DENSITY / 2, radius=1.5))
    assert body.is_watertight
    assert np.abs(body.vertices[:, 0]).max() == pytest.approx(1.5, abs=3.0 / (RESOLUTION - 1))
    assert body.volume == pytest.approx(3.0 * 0.6 * 0.6, rel=0.1)


def test_specks_go_and_parts_stay():
    largest, part, speck = ball(0.4, (-0.4, 0.0, 0.0)), ball(0.15, (0.5, 0.0, 0.0)), ball(0.035, (0.5, 0.5, 0.5))
    mesh = extract_mesh(solid(union(largest, part, speck)), 64)
    assert as_trimesh(mesh).body_count == 2
    assert (speck(mesh.vertices) > 0.2).all()
    assert (part(mesh.vertices).abs() < 0.05).any()
    assert as_trimesh(extract_mesh(solid(speck), 64)).body_count == 1  # alone, it is the largest


def test_a_cavity_is_not_part_of_the_surface():
    shell = as_trimesh(extract_mesh(solid(lambda points: (points.norm(dim=-1) - 0.5).abs() - 0.12), RESOLUTION))
    assert np.linalg.norm(shell.vertices, axis=-1).min() > 0.55
    assert shell.body_count == 1


@pytest.mark.parametrize(("peak", "sigma"), [(8.0, 0.3), (40.0, 0.2), (400.0, 0.2)])
def test_automatic_threshold_gives_the_rendered_silhouette(peak, sigma):
    """A ray that misses the centre of a Gaussian by b has depth sqrt(2 pi) sigma peak exp(-b^2 / 2 sigma^2)."""
    silhouette = sigma * math.sqrt(2 * math.log(math.sqrt(2 * math.pi) * sigma * peak / math.log(2)))
    mesh = extract_mesh(lambda points: peak * (-points.square().sum(-1) / (2 * sigma**2)).exp(), 64)
    assert mesh.vertices.norm(dim=-1).mean().item() == pytest.approx(silhouette, abs=1.6 / 63 / 2)


def test_automatic_threshold_ignores_thin_fog_and_the_density_deep_inside():
    core = solid(ball(0.2))
    plain = extract_mesh(solid(ball(0.6), sharpness=2000.0), RESOLUTION)
    dressed = extract_mesh(lambda p: solid(ball(0.6), sharpness=2000.0)(p) + 100 * core(p) + 0.2, RESOLUTION)
    assert as_trimesh(dressed).volume == pytest.approx(as_trimesh(plain).volume, rel=0.02)


def test_silhouette_threshold_separates_what_is_seen_from_what_is_not():
    density = np.zeros((4, 4, 4), dtype=np.float32)
    assert silhouette_threshold(density, 0.5) is None
    density[1, 2, 3] = 1.0  # optical depth 0.5 < ln 2: not seen along any axis
    assert silhouette_threshold(density, 0.5) is None
    density[2, 1, 0] = 16.0  # seen along all three; anything between 1 and 16 is right, 4 in the middle
    assert silhouette_threshold(density, 0.5) == pytest.approx(4.0, rel=0.05)


def test_automatic_threshold_stays_clear_of_noise_inside_a_solid():
    """Many thresholds fit a sharp object; the highest of them would cut holes into its uneven inside."""
    noise = torch.rand(32, 32, 32, generator=torch.Generator().manual_seed(0))

    def density_fn(points):
        x, y, z = ((points + 1) * 15.9).long().T
        return (ball(0.6)(points) < 0) * (100 + 100 * noise[x, y, z])

    body = as_trimesh(extract_mesh(density_fn, RESOLUTION, max_faces=10**6))
    assert body.euler_number == 2
    assert body.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.03)


@pytest.mark.parametrize(("threshold", "reported"), [(None, "no ray"), (25.0, "the threshold is 25")])
def test_an_empty_field_is_a_clear_error(threshold, reported):
    with pytest.raises(EmptyMeshError, match=rf"density 0\.25, {reported}.*; output\.mesh_threshold sets"):
        extract_mesh(lambda points: torch.full((len(points),), 0.25), 16, threshold)


def test_a_diverged_field_is_a_clear_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        extract_mesh(lambda points: points[:, 0] / 0 * 0, 16)


def test_only_occupied_points_are_asked_for_in_small_chunks():
    distance_fn, num_points = ball(0.25, (0.5, -0.2, 0.1)), []

    def density_fn(points):
        assert len(points) <= 65_536
        assert points.abs().max() <= 1.5
        num_points.append(len(points))
        return solid(distance_fn)(points)

    plain = extract_mesh(density_fn, 64, radius=1.5)
    num_all, num_points = sum(num_points), []
    centers = (torch.arange(32) + 0.5) / 16 * 1.5 - 1.5
    cells = torch.stack(torch.meshgrid(centers, centers, centers, indexing="ij"), dim=-1).reshape(-1, 3)
    occupied = (distance_fn(cells) < 0.1).reshape(32, 32, 32)
    pruned = extract_mesh(density_fn, 64, radius=1.5, occupied=occupied)
    assert sum(num_points) < 0.5 * num_all
    assert torch.equal(plain.vertices, pruned.vertices)
    assert torch.equal(plain.faces, pruned.faces)
