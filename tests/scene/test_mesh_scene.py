"""``MeshScene`` against closed forms, finite differences and the NeRF that it starts from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from jaxtyping import Float
from small_scenes import CPU, NO_LOSSES, SHADING, SMALL, make_cameras, make_scene
from torch import Tensor

from raydream.backend import load_backend
from raydream.camera import camera_rays
from raydream.config.cluster import OutputConfig
from raydream.config.scene import LossConfig, MeshConfig, ShadingConfig
from raydream.coordinates import Box
from raydream.scene.mesh import MeshScene
from raydream.scene.mesh_geometry import laplacian, normal_consistency, smooth_normals
from raydream.scene.nerf import NerfScene, plain_look
from raydream.scene.protocol import EmptyMeshError
from raydream.schedule import Constant
from raydream.types import Mesh

MESH = MeshConfig(
    resolution=20,
    radii=(0.6, 0.4, 0.5),
    grid=SMALL.grid,
    hidden_width=16,
    bfloat16="off",
    random_background_probability=0.0,
)
OUTPUT = OutputConfig(texture_px=64, mesh_max_faces=2000)


def make_mesh(
    config: MeshConfig = MESH, losses: LossConfig = NO_LOSSES, shading: ShadingConfig = SHADING, backend: str = "numba"
) -> MeshScene:
    generator = torch.Generator().manual_seed(3)
    return MeshScene(config, shading, losses, load_backend(backend, "cpu"), CPU, lambda *_: generator).double()


def seen_by(scene: MeshScene, image_px: int = 48) -> Float[Tensor, "view h w 3"]:
    """Where the ellipsoid is along the rays of the cameras, by the quadratic formula; NaN beside it."""
    rays, radii = camera_rays(make_cameras([30.0, 130.0], image_px)), torch.tensor(scene.config.radii)
    origin, direction = rays.origins / radii, rays.directions / radii
    a, b, c = (direction**2).sum(-1), (origin * direction).sum(-1), (origin**2).sum(-1) - 1
    distance = (-b - (b * b - a * c).sqrt()) / a
    return (rays.origins + distance[:, None] * rays.directions).view(2, image_px, image_px, 3)


def test_an_ellipsoid_is_seen_where_it_is() -> None:
    scene = make_mesh(replace(MESH, resolution=48))
    cameras, box = make_cameras([30.0, 130.0], 48), Box(torch.full((3,), -0.7), torch.full((3,), 0.7))
    render, points = scene.views(cameras, plain_look(2), box), seen_by(scene)
    there = points.isfinite().all(-1)
    assert ((render.opacity[..., 0] > 0.5) != there).sum() < 0.01 * there.sum()
    sure = there & torch.nn.functional.max_pool2d((~there).double(), 5, 1, 2).eq(0)
    assert sure.sum() > 200
    eye = cameras.c2w[:, None, None, :3, 3]
    torch.testing.assert_close(render.depth[sure][:, 0], (points - eye).norm(dim=-1)[sure], rtol=0, atol=0.005)
    normal = torch.nn.functional.normalize(points / torch.tensor(scene.config.radii) ** 2, dim=-1)
    assert render.normal is not None
    assert (render.normal * normal).sum(-1)[sure].min() > 0.995
    assert render.ccm is not None
    torch.testing.assert_close(render.ccm[sure], points[sure] / 1.4 + 0.5, rtol=0, atol=0.005)
    albedo = scene.field.albedo(points[sure])
    torch.testing.assert_close(render.foreground[sure], albedo, rtol=0, atol=0.02)
    empty = render.opacity[..., 0] == 0
    assert torch.equal(render.rgb[empty], torch.full_like(render.rgb[empty], 0.5))
    measured = scene.box()
    assert measured is not None
    torch.testing.assert_close(measured.maximum, torch.tensor(scene.config.radii).double(), rtol=0, atol=0.01)


def test_silhouettes_pull_as_the_area_that_is_seen_changes() -> None:
    """Opacity by the size of the grid, against the closed form: its sum grows as the square of the size, and a little
    more, as the near side comes nearer.
    """
    scene, cameras = make_mesh(replace(MESH, resolution=40)), make_cameras([30.0, 130.0], 96)
    size = torch.ones((), dtype=torch.float64, requires_grad=True)
    extent = scene.extent.clone()

    def area(size: Tensor) -> Tensor:
        scene.extent = extent * size
        return scene.views(cameras, plain_look(2)).opacity.sum()

    (slope,) = torch.autograd.grad(area(size), size)
    step = torch.tensor(0.02)
    with torch.no_grad():
        expected = (area(1 + step) - area(1 - step)) / (2 * step)
    assert float(slope) == pytest.approx(float(expected), rel=0.03)


def test_a_ball_is_recovered_from_its_silhouettes() -> None:
    scene = make_mesh(replace(MESH, radii=(0.6, 0.4, 0.5), lr_values=0.05, lr_deformation=0.05))
    cameras = make_cameras([0.0, 90.0, 180.0, 270.0], 32)
    with torch.no_grad():
        target = make_mesh(replace(MESH, radii=(0.5, 0.5, 0.5))).views(cameras, plain_look(4)).opacity
    optimizer, errors = torch.optim.Adam(scene.param_groups()), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (scene.views(cameras, plain_look(4)).opacity - target).square().mean()
        errors.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert errors[-1] < 0.05 * errors[0]


def test_light_falls_from_where_it_stands() -> None:
    """Textureless: white times ambient and diffuse light, by the cosine between normal and light."""
    scene = make_mesh(shading=ShadingConfig(albedo_steps=0, shaded_probability=1.0, textureless_probability=1.0))
    render = scene.render(make_cameras([30.0, 130.0], 32), 0)
    solid = render.opacity[..., 0] > 0.999
    color = render.foreground[solid]
    assert color.amin() >= 0.1 - 1e-9
    assert color.amax() > 0.7
    assert (color.amax(-1) == color.amin(-1)).all()


def closed_mesh(noise: float, generator: torch.Generator) -> Mesh:
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.5)
    vertices = torch.tensor(np.asarray(ball.vertices))
    moved = vertices + noise * torch.randn(vertices.shape, generator=generator, dtype=torch.float64)
    return Mesh(moved, torch.tensor(np.asarray(ball.faces)))


def test_regularisers_against_closed_forms_and_finite_differences(generator: torch.Generator) -> None:
    box = trimesh.creation.box(extents=(1, 1, 1))
    cube = Mesh(torch.tensor(np.asarray(box.vertices)), torch.tensor(np.asarray(box.faces)))
    assert float(normal_consistency(cube)) == pytest.approx(12 / 18)  # 12 edges of 90 degrees, 6 flat diagonals
    octahedron = Mesh(
        torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]).double(),
        torch.tensor([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]),
    )
    assert float(laplacian(octahedron)) == pytest.approx(1.0)  # all neighbours' means are the origin
    rough = closed_mesh(0.02, generator)
    for measure in (normal_consistency, laplacian):
        assert measure(rough) > 2 * measure(closed_mesh(0.0, generator))
        vertices = rough.vertices.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v, m=measure: m(Mesh(v, rough.faces)), vertices, fast_mode=True)
    smooth = closed_mesh(0.0, generator)
    outward = torch.nn.functional.normalize(smooth.vertices, dim=-1)
    assert (smooth_normals(smooth) * outward).sum(-1).min() > 0.999


def test_regularisers_smooth_a_rough_surface(generator: torch.Generator) -> None:
    weights = LossConfig(normal_consistency=Constant(1.0), laplacian=Constant(10.0), sparsity=Constant(0.5))
    scene = make_mesh(replace(MESH, radii=(0.5, 0.5, 0.5), lr_values=0.02, lr_deformation=0.02), weights)
    with torch.no_grad():
        scene.values += 0.3 * torch.randn(scene.values.shape, generator=generator, dtype=torch.float64)
    before = float(normal_consistency(scene.mesh()).detach())
    optimizer = torch.optim.Adam(scene.param_groups())
    for step in range(30):
        optimizer.zero_grad()
        parts = scene.regularizers(scene.render(make_cameras([30.0], 8), step), step)
        assert set(parts) == {"normal_consistency", "laplacian", "sparsity"}
        sum(parts.values(), torch.zeros(())).backward()
        optimizer.step()
    assert float(normal_consistency(scene.mesh()).detach()) < 0.5 * before


def grey_ball(radius: float = 0.5) -> NerfScene:
    """A NeRF that is a solid ball: dense within a radius by its start alone."""
    nerf = make_scene("numba", replace(SMALL, initial_density_lambda=400.0, initial_density_radius=radius))
    with torch.no_grad():
        nerf.field.head[0] = 0
    return nerf


def test_a_mesh_starts_where_export_finds_a_nerf() -> None:
    nerf, scene = grey_ball(), make_mesh(replace(MESH, resolution=40))
    scene.start_from_nerf(nerf)
    radius = scene.mesh().vertices.detach().norm(dim=-1)
    exported = nerf.surface(replace(OUTPUT, mesh_resolution=64)).vertices.norm(dim=-1)
    assert float(radius.mean()) == pytest.approx(float(exported.mean()), abs=0.01)
    assert float(radius.std()) < 0.01
    assert scene.values.abs().max() <= 1
    assert all(torch.equal(value, nerf.field.state_dict()[name]) for name, value in scene.field.state_dict().items())
    with pytest.raises(ValueError, match=r"scene\.grid and scene\.hidden_width of a mesh must be those of the NeRF"):
        make_mesh(replace(MESH, hidden_width=32)).start_from_nerf(nerf)


def test_a_frozen_surface_stays_and_its_colours_learn() -> None:
    scene = make_mesh(replace(MESH, lr_values=0.0, lr_deformation=0.0))
    assert [group["lr"] for group in scene.param_groups()] == [MESH.lr_grid, MESH.lr_network]
    render = scene.render(make_cameras([30.0], 16), 0)
    assert scene.mesh() is render.mesh, "it is made once"
    render.rgb.sum().backward()
    assert scene.values.grad is None
    assert scene.field.head.grad is not None
    moved = {name: value + 0.1 if name == "values" else value for name, value in scene.state().items()}
    scene.load_state(moved)
    assert scene.mesh() is not render.mesh


def test_the_surface_is_closed_textured_and_without_specks() -> None:
    scene = make_mesh()
    with torch.no_grad():
        scene.values[2, 2, 2] = 1.0
    mesh = scene.surface(OUTPUT)
    assert mesh.texture is not None
    assert mesh.texture.shape == (64, 64, 3)
    points = np.unique(mesh.vertices.numpy(), axis=0, return_inverse=True)
    solid = trimesh.Trimesh(points[0], points[1].reshape(-1)[mesh.faces.numpy()], process=False)
    assert solid.is_watertight
    assert solid.body_count == 1
    assert solid.volume == pytest.approx(4 / 3 * np.pi * 0.6 * 0.4 * 0.5, rel=0.05)


def test_a_vanished_surface_has_no_box_and_cannot_be_rendered() -> None:
    scene = make_mesh()
    with torch.no_grad():
        scene.values.fill_(-1.0)
    assert scene.box() is None
    with pytest.raises(EmptyMeshError, match="vanished"):
        scene.render(make_cameras([0.0]), 0)


def test_the_state_is_all_that_a_scene_is() -> None:
    scene, other = make_mesh(), make_mesh(replace(MESH, radii=(0.3, 0.3, 0.3)))
    other.load_state(scene.state())
    cameras = make_cameras([0.0, 90.0])
    assert torch.equal(scene.preview(cameras).rgb, other.preview(cameras).rgb)
    for state in (grey_ball().state(), make_mesh(replace(MESH, resolution=21)).state()):
        with pytest.raises(ValueError, match="a scene of other sizes cannot go on in this one"):
            other.load_state(state)
