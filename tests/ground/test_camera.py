"""Camera conventions, checked from outside: by projecting what a ray hits, and by known directions, bins and means."""

import math

import pytest
import torch

from raydream.camera import (
    camera_rays,
    clip_from_world,
    orbit_cameras,
    sample_elevations,
    select_views,
    stratified_azimuths,
    view_bins,
    wrap_degrees,
)
from raydream.types import Cameras

HEIGHT_PX, WIDTH_PX = 6, 10


def cameras_at(*azimuth_elevation_distance_fov: tuple[float, float, float, float]) -> Cameras:
    columns = torch.tensor(azimuth_elevation_distance_fov, dtype=torch.float64).T
    azimuth, elevation, distance, fov = columns
    return orbit_cameras(azimuth, elevation, distance, fov, HEIGHT_PX, WIDTH_PX)


@pytest.fixture
def cameras() -> Cameras:
    return cameras_at((0, 0, 2, 40), (35, 20, 1.5, 60), (-120, -10, 3, 25), (170, 85, 1, 70))


def test_a_projected_ray_hits_its_own_pixel_centre(cameras):
    rays = camera_rays(cameras)
    num_pixels = HEIGHT_PX * WIDTH_PX
    distance = torch.linspace(0.5, 4, len(rays.origins), dtype=torch.float64)[:, None]
    points = (rays.origins + distance * rays.directions).reshape(cameras.num_views, num_pixels, 3)
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    clip = torch.einsum("vij,vpj->vpi", clip_from_world(cameras), homogeneous)
    ndc = clip[..., :3] / clip[..., 3:]
    column = (ndc[..., 0] + 1) / 2 * WIDTH_PX
    row = (1 - ndc[..., 1]) / 2 * HEIGHT_PX
    wanted_row, wanted_column = torch.meshgrid(torch.arange(HEIGHT_PX), torch.arange(WIDTH_PX), indexing="ij")
    torch.testing.assert_close(column, (wanted_column + 0.5).reshape(1, -1).expand_as(column).double())
    torch.testing.assert_close(row, (wanted_row + 0.5).reshape(1, -1).expand_as(row).double())
    # Clip w is the distance along the viewing axis, and depths lie between the planes.
    forward = -cameras.c2w[:, None, :3, 2]
    along = ((points - cameras.c2w[:, None, :3, 3]) * forward).sum(-1)
    torch.testing.assert_close(clip[..., 3], along)
    assert (ndc[..., 2].abs() < 1).all()


def test_clip_depth_runs_from_near_to_far():
    camera = cameras_at((0, 0, 2, 40))
    points = torch.tensor([[0, 0, 2 - 0.1, 1], [0, 0, 2 - 5.0, 1]], dtype=torch.float64)
    clip = points @ clip_from_world(camera, near=0.1, far=5.0)[0].T
    torch.testing.assert_close(clip[:, 2] / clip[:, 3], torch.tensor([-1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("azimuth", "elevation", "position", "right"),
    [
        (0, 0, (0, 0, 2), (1, 0, 0)),  # the front: on +z, looking along -z
        (90, 0, (2, 0, 0), (0, 0, -1)),
        (180, 0, (0, 0, -2), (-1, 0, 0)),
        (0, 90, (0, 2, 0), (1, 0, 0)),  # straight above: no degenerate frame
        (0, -90, (0, -2, 0), (1, 0, 0)),
    ],
)
def test_known_poses(azimuth, elevation, position, right):
    c2w = cameras_at((azimuth, elevation, 2, 50)).c2w[0]
    as_list = pytest.approx
    assert c2w[:3, 3].tolist() == as_list(position, abs=1e-12)
    assert c2w[:3, 0].tolist() == as_list(right, abs=1e-12)
    assert (-c2w[:3, 2] * 2).tolist() == as_list([-value for value in position], abs=1e-12)
    assert c2w[3].tolist() == [0, 0, 0, 1]


def test_frames_are_right_handed_and_upright(cameras):
    rotation = cameras.c2w[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand_as(rotation))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(4, dtype=torch.float64))
    assert (rotation[:, 1, 1] > 0).all()  # the image's up is the world's
    assert (rotation[:, 1, 0] == 0).all()  # no roll


def test_rays_span_the_field_of_view(cameras):
    directions = camera_rays(cameras).directions.reshape(cameras.num_views, HEIGHT_PX, WIDTH_PX, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones_like(directions[..., 0]))
    local = torch.einsum("vji,vhwj->vhwi", cameras.c2w[:, :3, :3], directions)
    slope_y, slope_x = local[..., 1] / -local[..., 2], local[..., 0] / -local[..., 2]
    edge = torch.tan(torch.deg2rad(cameras.fov_y_deg) / 2)
    torch.testing.assert_close(slope_y[:, 0, 0], edge * (HEIGHT_PX - 1) / HEIGHT_PX)  # row 0 is the top
    torch.testing.assert_close(slope_x[:, 0, -1], edge * (WIDTH_PX - 1) / HEIGHT_PX)  # pixels are square


def test_elevations_are_uniform_on_the_band():
    """Uniform by area on [0, 30] degrees has the mean (cos 30 + 30 rad sin 30 - 1) / sin 30, and fills the whole band.

    The wrong inverse transform of an older sampler covered only 0 to 19.47 degrees.
    """
    generator = torch.Generator().manual_seed(0)
    elevation = sample_elevations((200_000,), (0.0, 30.0), 1.0, generator)
    top = math.radians(30)
    mean = math.degrees((math.cos(top) + top * math.sin(top) - 1) / math.sin(top))
    # The standard error of the mean is 8.6 / sqrt(200000) = 0.02 degrees.
    assert elevation.mean().item() == pytest.approx(mean, abs=0.1)
    assert elevation.min() < 0.01
    assert elevation.max() > 29.99
    share_above = (elevation > 19.47).double().mean().item()
    assert share_above == pytest.approx(1 - math.sin(math.radians(19.47)) / 0.5, abs=0.01)


def test_elevations_uniform_in_degrees_and_mixed():
    generator = torch.Generator().manual_seed(0)
    by_degrees = sample_elevations((100_000,), (-10.0, 80.0), 0.0, generator)
    assert by_degrees.mean().item() == pytest.approx(35.0, abs=0.5)
    low, high = math.radians(-10), math.radians(80)
    mean_area = (math.cos(high) - math.cos(low) + high * math.sin(high) - low * math.sin(low)) / (
        math.sin(high) - math.sin(low)
    )
    mixed = sample_elevations((100_000,), (-10.0, 80.0), 0.25, generator)
    assert mixed.mean().item() == pytest.approx(0.75 * 35.0 + 0.25 * math.degrees(mean_area), abs=0.5)
    assert sample_elevations((3, 2), (5.0, 5.0), 0.5, generator).flatten().tolist() == pytest.approx(
        [5.0] * 6, abs=1e-4
    )


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [
        (0, 0, "front"),
        (-44, 0, "front"),
        (316, 0, "front"),
        (361, 0, "front"),
        (-720, 0, "front"),
        (46, 0, "side"),
        (-90, 0, "side"),
        (270, 0, "side"),
        (180, 0, "back"),
        (-180, 0, "back"),
        (-136, 0, "back"),
        (224, 0, "back"),
        (226, 0, "side"),
        (0, 61, "overhead"),
        (180, 89, "overhead"),
        (0, 59, "front"),
    ],
)
def test_view_bins_wrap_around(azimuth, elevation, word):
    assert view_bins(torch.tensor([float(azimuth)]), torch.tensor([float(elevation)])) == [word]


def test_view_bins_take_other_limits():
    azimuth, elevation = torch.tensor([40.0, 140.0, 0.0]), torch.tensor([0.0, 0.0, 50.0])
    assert view_bins(azimuth, elevation, front_deg=30.0, back_deg=30.0, overhead_deg=45.0) == [
        "side",
        "side",
        "overhead",
    ]


def test_wrapped_degrees_are_the_same_angle():
    angle = torch.tensor([-540.0, -180.0, -1.0, 0.0, 179.0, 180.0, 359.0, 725.0])
    assert wrap_degrees(angle).tolist() == [-180.0, -180.0, -1.0, 0.0, 179.0, -180.0, -1.0, 5.0]


@pytest.mark.parametrize(("num_particles", "num_views"), [(8, 1), (3, 4), (1, 1)])
def test_azimuths_are_stratified_over_all_particles(num_particles, num_views):
    generator = torch.Generator().manual_seed(0)
    offsets = []
    for _ in range(20):
        azimuth = stratified_azimuths(num_particles, num_views, generator)
        assert azimuth.shape == (num_particles, num_views)
        assert ((azimuth >= -180) & (azimuth < 180)).all()
        count = num_particles * num_views
        turned = azimuth.flatten().sort().values
        gaps = torch.diff(turned, append=turned[:1] + 360)
        assert gaps.max() < 2 * 360 / count + 1e-3  # one in each sector: no gap spans two
        offsets.append(azimuth[0, 0].item())
        if num_views > 1:
            own = azimuth.sort(dim=1).values
            assert torch.diff(own, append=own[:, :1] + 360, dim=1).max() < 2 * 360 / num_views + 1e-3
    assert max(offsets) - min(offsets) > 180  # a particle is not bound to one side


def test_selected_views_keep_their_cameras(cameras):
    part = select_views(cameras, slice(1, 3))
    torch.testing.assert_close(part.c2w, cameras.c2w[1:3])
    assert part.azimuth_deg.tolist() == [35, -120]
    assert (part.num_views, part.height_px, part.width_px) == (2, HEIGHT_PX, WIDTH_PX)
