"""Views of assets against closed forms, an independent ray caster, and the torch twin of the shading kernel."""

import math

import numpy as np
import pytest
import torch
import trimesh
from asset_cases import MINIPACK

from raydream.assets.asset import WRAP_CLAMP, WRAP_MIRROR, WRAP_REPEAT, Asset, normalise_asset
from raydream.assets.load import load_asset
from raydream.assets.parts import Material, Part, build_asset, pack_textures
from raydream.assets.procedural import procedural_asset
from raydream.assets.raster import AssetViews, render_asset, sample_textures, shade, shade_samples
from raydream.assets.shade_cpu import shade_samples_numba
from raydream.backend import load_backend
from raydream.camera import camera_rays, clip_from_world, orbit_cameras
from raydream.types import Backend, Cameras, Rays


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


def cameras_at(azimuths_deg: list[float], elevation_deg: float, size_px: int, distance: float = 2.8) -> Cameras:
    azimuth = torch.tensor(azimuths_deg)
    ones = torch.ones_like(azimuth)
    return orbit_cameras(azimuth, elevation_deg * ones, distance * ones, 45 * ones, size_px, size_px)


def asset_of(mesh: trimesh.Trimesh, color: tuple[float, float, float] = (1.0, 1.0, 1.0), smooth: bool = False) -> Asset:
    normals = np.asarray(mesh.vertex_normals) if smooth else None
    part = Part(np.asarray(mesh.vertices), np.asarray(mesh.faces), Material(np.array([*color, 1.0])), normals)
    return build_asset("test", "", [part], [])


def quad(image: np.ndarray | None = None, **material: object) -> Asset:
    """The square [-1, 1]^2 at z = 0, image upright when seen from +z."""
    positions = np.array([[-1, 1, 0], [1, 1, 0], [1, -1, 0], [-1, -1, 0]], np.float64)
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64)
    return build_asset(
        "quad", "", [Part(positions, np.array([[0, 3, 2], [0, 2, 1]]), Material(image=image, **material), uv=uv)], []
    )


def rgba(rows: list[list[tuple[int, int, int]]]) -> np.ndarray:
    image = np.array(rows, np.uint8)
    return np.concatenate([image, np.full((*image.shape[:2], 1), 255, np.uint8)], axis=-1)


def view_axis_depth(points: torch.Tensor, cameras: Cameras) -> torch.Tensor:
    """Distance along the viewing axis of points ``[view, h, w, 3]``."""
    offset = points - cameras.c2w[:, None, None, :3, 3]
    return -(offset * cameras.c2w[:, None, None, :3, 2]).sum(-1, keepdim=True)


def test_sphere_agrees_with_its_closed_form(backend):
    asset = asset_of(trimesh.creation.icosphere(subdivisions=4), smooth=True)
    cameras = cameras_at([0.0, 75.0, -130.0], 25.0, 48)
    views = render_asset(asset, cameras, backend, supersample=1)
    rays = camera_rays(cameras)
    along = -(rays.origins * rays.directions).sum(-1, keepdim=True)
    foot = rays.origins + along * rays.directions
    missed = foot.norm(dim=-1, keepdim=True)
    points = rays.origins + (along - (1 - missed**2).clamp_min(0).sqrt()) * rays.directions
    shape = (3, 48, 48)
    missed, points = missed.view(*shape, 1), points.view(*shape, 3)
    assert torch.equal(views.alpha[missed < 0.995], torch.ones_like(views.alpha[missed < 0.995]))
    assert not views.alpha[missed > 1.001].any()
    sure = (missed < 0.9)[..., 0]
    # how far faces lie inside the sphere, seen at the slant of the outermost pixels
    sagitta = 1 - asset.vertices[asset.faces].mean(1).norm(dim=-1).min()
    tolerance = 1.05 * float(sagitta) / math.sqrt(1 - 0.9**2)
    assert tolerance < 3e-3
    assert (views.depth - view_axis_depth(points, cameras))[sure].abs().max() < tolerance
    assert (views.normal - points)[sure].abs().max() < 2 * tolerance
    assert (views.ccm - (points + 1) / 2)[sure].abs().max() < tolerance


def test_box_agrees_with_its_closed_form(backend):
    extents = torch.tensor([0.8, 1.2, 0.4])
    asset = asset_of(trimesh.creation.box(extents.numpy()))
    cameras = cameras_at([20.0, 200.0], 30.0, 40)
    views = render_asset(asset, cameras, backend, supersample=1)
    rays = camera_rays(cameras)
    slabs = torch.stack([(sign * extents / 2 - rays.origins) / rays.directions for sign in (-1, 1)])
    enter, axis = slabs.amin(0).max(-1)
    leave = slabs.amax(0).amin(-1)
    points = (rays.origins + enter[:, None] * rays.directions).view(2, 40, 40, 3)
    normals = torch.nn.functional.one_hot(axis, 3) * -torch.sign(rays.directions)
    inside = (leave - enter).view(2, 40, 40)
    assert views.alpha[inside > 1e-2].all()
    assert not views.alpha[inside < -1e-2].any()
    sure = inside > 5e-2
    assert sure.sum() > 300
    assert (views.depth - view_axis_depth(points, cameras))[sure].abs().max() < 1e-4
    assert (views.ccm - (points / extents + 0.5))[sure].abs().max() < 1e-4
    assert (views.normal - normals.view(2, 40, 40, 3))[sure].abs().max() < 1e-4


def nearest_hits(asset: Asset, rays: Rays) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance (inf where there is none) and face of the first hit of each ray: Moeller and Trumbore, all pairs."""
    corners = asset.vertices.double()[asset.faces]
    start, edge1, edge2 = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    distances = []
    for origin, direction in zip(rays.origins.double(), rays.directions.double(), strict=True):
        p = torch.linalg.cross(direction.expand_as(edge2), edge2)
        determinant = (edge1 * p).sum(-1)
        offset = origin - start
        u = (offset * p).sum(-1) / determinant
        q = torch.linalg.cross(offset, edge1)
        v = (q * direction).sum(-1) / determinant
        distance = (edge2 * q).sum(-1) / determinant
        hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (distance > 0)
        distances.append(torch.where(hit, distance, math.inf))
    nearest = torch.stack(distances).min(dim=1)
    return nearest.values, nearest.indices


def real_asset() -> Asset:
    files = sorted((MINIPACK / "hf-objaverse-v1" / "glbs" / "000-003").glob("*.glb"))
    return normalise_asset(load_asset(files[0]) if files else procedural_asset("car", 2))


def test_real_asset_agrees_with_a_ray_caster(backend):
    asset = real_asset()
    cameras = cameras_at([35.0], 20.0, 32)
    views = render_asset(asset, cameras, backend, supersample=1)
    rays = camera_rays(cameras)
    distance, face = nearest_hits(asset, rays)
    hit = torch.isfinite(distance)
    alpha = views.alpha.flatten() > 0
    # the two may only disagree where a ray grazes an edge
    assert (alpha != hit).sum() <= 3
    both = alpha & hit
    assert both.sum() > 100
    points = (rays.origins + torch.where(hit, distance, 0.0)[:, None].float() * rays.directions).view(1, 32, 32, 3)
    error = (views.depth - view_axis_depth(points, cameras)).flatten()[both].abs()
    assert (error > 1e-3).float().mean() < 0.01
    box_low, box_high = asset.vertices.aminmax(dim=0)
    ccm_error = (views.ccm - (points - box_low) / (box_high - box_low)).flatten(0, 2)[both].abs().amax(-1)
    assert (ccm_error > 1e-2).float().mean() < 0.01
    corners = asset.vertices[asset.faces[face]]
    geometric = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    towards = views.normal.flatten(0, 2) * geometric * torch.sign(-(geometric * rays.directions).sum(-1, keepdim=True))
    assert (towards.sum(-1)[both] >= -1e-6).float().mean() > 0.99  # normals face the camera


def test_azimuth_zero_sees_plus_z_and_azimuth_ninety_plus_x(backend):
    parts = []
    for axis, color in ((2, (1.0, 0.0, 0.0)), (0, (0.0, 1.0, 0.0)), (1, (0.0, 0.0, 1.0))):
        for side in (-1, 1):
            mesh = trimesh.creation.box([0.9, 0.9, 0.9])
            positions = np.asarray(mesh.vertices) * (0.1 if side < 0 else 1.0)
            positions[:, axis] = positions[:, axis] * 0.05 + side * 0.5
            factor = np.array([*(np.array(color) * (1.0 if side > 0 else 0.25)), 1.0])
            parts.append(Part(positions, np.asarray(mesh.faces), Material(factor)))
    asset = build_asset("axes", "", parts, [])
    middle = [
        render_asset(asset, cameras_at([azimuth], elevation, 9), backend, 1).rgb[0, 4, 4]
        for azimuth, elevation in ((0.0, 0.0), (90.0, 0.0), (0.0, 89.0))
    ]
    assert torch.allclose(torch.stack(middle), torch.eye(3), atol=1e-3)


def test_texture_is_upright_and_not_mirrored(backend):
    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    asset = quad(rgba([[red, green], [blue, white]]), smooth=False)
    views = render_asset(asset, cameras_at([0.0], 0.0, 32), backend, 1)
    assert torch.equal(views.rgb[0, 9, 9], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(views.rgb[0, 9, 22], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(views.rgb[0, 22, 9], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(views.rgb[0, 22, 22], torch.ones(3))


def test_both_sides_of_a_face_are_drawn_and_normals_face_the_camera(backend):
    views = render_asset(quad(), cameras_at([0.0, 180.0], 0.0, 16), backend, 1)
    assert torch.equal(views.alpha[0], views.alpha[1])
    assert torch.allclose(views.normal[:, 8, 8], torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]))
    assert torch.allclose(views.ccm[:, 8, 8, 2], torch.tensor(0.5))  # a side of no length


def test_a_shrunk_texture_is_averaged_not_aliased(backend):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    image = np.stack([board, board, board, np.full_like(board, 255)], axis=-1)
    views = render_asset(quad(image), cameras_at([0.0], 0.0, 32), backend, 1)
    inside = views.rgb[0, 10:22, 10:22]
    assert (inside - 0.5).abs().max() < 0.02


def test_supersampling_gives_coverage_and_premultiplied_colour(backend):
    asset = asset_of(trimesh.creation.icosphere(subdivisions=4), color=(1.0, 0.0, 0.0))
    views = render_asset(asset, cameras_at([10.0], 0.0, 32), backend, supersample=4)
    partial = (views.alpha > 0) & (views.alpha < 1)
    assert partial.sum() > 20
    assert torch.allclose(views.rgb[..., :1], views.alpha)
    assert not views.rgb[..., 1:].any()
    # a unit sphere at distance d covers the disc of radius 1 / sqrt(d^2 - 1) / tan(fov / 2) of the image's half height
    radius_px = 16 / math.sqrt(2.8**2 - 1) / math.tan(math.radians(22.5))
    assert views.alpha.sum() == pytest.approx(math.pi * radius_px**2, rel=0.005)


@pytest.mark.parametrize("supersample", [1, 2, 3])
def test_kernel_is_its_torch_twin(supersample, generator):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    noise[..., 3] = 255
    uv = np.random.default_rng(1).uniform(-2, 3, (42, 2))
    mesh = trimesh.creation.icosphere(subdivisions=1)
    nearest = Material(np.array([0.5, 1.0, 0.7, 1.0]), noise, (WRAP_CLAMP, WRAP_REPEAT), smooth=False)
    looks = [
        (0.4, Material(np.array([0.2, 0.5, 0.9, 1.0]))),
        (np.array([1.0, 0.3, 0.5]), Material(image=noise, wrap=(WRAP_REPEAT, WRAP_MIRROR))),
        (np.array([0.3, 1.0, 0.4]), nearest),
    ]
    faces, normals = np.asarray(mesh.faces), np.asarray(mesh.vertices)
    parts = [Part(normals * scale, faces, material, normals, uv) for scale, material in looks]
    asset = build_asset("noise", "", parts, [])
    cameras = cameras_at([0.0, 100.0], 15.0, 24 * supersample)
    clip = torch.nn.functional.pad(asset.vertices, (0, 1), value=1.0) @ clip_from_world(cameras).transpose(1, 2)
    fragments = load_backend("reference", "cpu").rasterize(clip, asset.faces, 24 * supersample, 24 * supersample)
    eyes = cameras.c2w[:, :3, 3]
    expected = shade_samples(asset, fragments, clip, eyes, supersample)
    assert expected[..., 3].mean() > 0.15
    # float32 sums of up to nine terms; uv of up to 3 x 53 texels carry 1e-5 of a texel, times a contrast of 1
    difference = (shade_samples_numba(asset, fragments, clip, eyes, supersample) - expected).abs()
    assert difference.max() < 2e-4


def test_wrap_modes_and_filters_of_a_row_of_texels():
    row = rgba([[(0, 0, 0), (100, 0, 0), (200, 0, 0)]])
    modes = [(WRAP_REPEAT, 0), (WRAP_MIRROR, 0), (WRAP_CLAMP, 0)]
    textures = pack_textures([Material(image=row, wrap=mode, smooth=False) for mode in modes])
    u = torch.tensor([-0.5, 0.5, 1.2, 1.5, 2.1]) / 1.0
    uv = torch.stack([u, torch.full_like(u, 0.5)], dim=-1)
    red = [
        sample_textures(textures, torch.full((5,), index), uv, torch.full((5,), -1.0))[:, 0] * 255 for index in range(3)
    ]
    assert torch.allclose(red[0], torch.tensor([100.0, 100.0, 0.0, 100.0, 0.0]))
    assert torch.allclose(red[1], torch.tensor([100.0, 100.0, 200.0, 100.0, 0.0]))
    assert torch.allclose(red[2], torch.tensor([0.0, 100.0, 200.0, 200.0, 200.0]))
    smooth = pack_textures([Material(image=row)])
    between = sample_textures(smooth, torch.zeros(1).long(), torch.tensor([[1 / 3, 0.5]]), torch.zeros(1))
    assert between[0, 0] * 255 == pytest.approx(50.0)


def test_normalised_asset_fills_the_radius_wherever_it_was():
    mesh = trimesh.creation.box([1.0, 2.0, 3.0])
    mesh.apply_scale(250.3)
    mesh.apply_translation([123456.7, -34567.89, 7.1])
    normal = normalise_asset(asset_of(mesh), 0.8)
    low, high = normal.vertices.aminmax(dim=0)
    assert torch.allclose(low + high, torch.zeros(3), atol=1e-6)  # float32 would be off by 1e-5
    assert normal.vertices.norm(dim=-1).max() == pytest.approx(0.8, abs=1e-5)
    assert torch.allclose((high - low) / (high - low).max(), torch.tensor([1 / 3, 2 / 3, 1.0]), atol=1e-3)


def test_light_makes_a_sphere_brighter_towards_the_lamp_and_never_brighter_than_its_albedo(backend):
    asset = asset_of(trimesh.creation.icosphere(subdivisions=3), color=(0.5, 0.5, 0.5), smooth=True)
    cameras = cameras_at([0.0], 0.0, 32)
    views: AssetViews = render_asset(asset, cameras, backend)
    lit = views.rgb * shade(views, cameras)
    assert (lit <= views.rgb + 1e-6).all()
    assert lit[0, 11, 18, 0] > 1.2 * lit[0, 22, 9, 0] > 0
