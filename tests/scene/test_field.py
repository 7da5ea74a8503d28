"""The radiance field and its normals against other people's derivatives, and the occupancy grid beside it."""

import dataclasses

import pytest
import torch
from small_scenes import CPU, GRID, SCENE_MODE, SMALL, make_scene
from torch import Tensor
from torch.nn import functional as F

from raydream.config.scene import NerfConfig
from raydream.scene import field as field_module
from raydream.scene.field import RadianceField
from raydream.scene.occupancy import DensityFunction, OccupancyGrid


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


# --- the field ------------------------------------------------------------------------------------------------------


def density_of_dense_grid(field: RadianceField, config: NerfConfig, points: Tensor) -> Tensor:
    """The field once more from torch's own ``grid_sample``, differentiable by the points; dense levels only."""
    features = []
    for level, cells in enumerate(field.layout.resolutions):
        rows = field.table[field.layout.offsets[level] : field.layout.offsets[level + 1]]
        volume = rows.T.reshape(1, -1, cells + 1, cells + 1, cells + 1)  # x is the fastest: grid_sample's width
        place = (points / config.radius).reshape(1, 1, 1, -1, 3)
        features.append(F.grid_sample(volume, place, align_corners=True)[0, :, 0, 0].T)
    output = F.linear(F.relu(F.linear(torch.cat(features, dim=-1), field.hidden)), field.head)[:, 0]
    distance = points.square().sum(-1).sqrt()
    return F.softplus(output + config.initial_density_lambda * (1 - distance / config.initial_density_radius))


@pytest.mark.parametrize("config", [SMALL, SCENE_MODE], ids=["object", "scene"])
def test_normals_are_those_of_autograd(backend: str, config: NerfConfig, generator: torch.Generator) -> None:
    dense = dataclasses.replace(config, radius=1.5, grid=dataclasses.replace(GRID, log2_table_size=13))
    scene = make_scene(backend, dense)
    points = (torch.rand(200, 3, generator=generator, dtype=torch.float64) * 2 - 1).mul(1.5).requires_grad_()
    expected = density_of_dense_grid(scene.field, dense, points)
    (slope,) = torch.autograd.grad(expected.sum(), points)
    density, albedo, normal = scene.field.with_normals(points.detach())
    torch.testing.assert_close(density, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(normal, -slope / slope.norm(dim=-1, keepdim=True), rtol=0, atol=1e-9)
    assert torch.allclose(albedo, scene.field(points.detach())[1], rtol=0, atol=1e-12)


def test_normals_are_those_of_finite_differences(backend: str, generator: torch.Generator) -> None:
    """With hashed levels too; a point whose neighbours lie in another cell has no derivative and is left out."""
    scene, h = make_scene(backend), 1e-6
    points = torch.rand(100, 3, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    offsets = h * torch.eye(3, dtype=torch.float64)
    sides = [[scene.field.density(points + sign * offset) for offset in offsets] for sign in (1, -1)]
    slope = torch.stack([a - b for a, b in zip(*sides)], dim=-1) / (2 * h)
    cells = torch.tensor(scene.field.layout.resolutions)[:, None, None] * (points / 2 + 0.5)
    inside = ((cells - cells.round()).abs() > 1e-3).all(0).all(-1)
    assert inside.sum() > 80
    normal = scene.field.with_normals(points)[2]
    worst = (normal + F.normalize(slope, dim=-1)).abs()[inside].amax()
    assert worst < 1e-7, worst  # measured 1e-10


def test_an_object_starts_as_a_ball_and_a_scene_as_a_shell(backend: str) -> None:
    """Before it learns anything: Magic3D's blob has softplus(10) in its middle and ln 2 at its radius of 0.5; a
    scene is empty around the camera and ln 2 at 2.5.
    """
    where = torch.tensor([[0, 0, 0], [0.3, 0.4, 0], [0, -0.9, 0]], dtype=torch.float64)
    for config, half, sign in ((SMALL, 0.5, 1), (SCENE_MODE, 2.5, -1)):
        scene = make_scene(backend, config)
        with torch.no_grad():
            scene.field.head.zero_()
        density, _, normal = scene.field.with_normals(where)
        raw = config.initial_density_lambda * (1 - where.norm(dim=-1) / half)
        torch.testing.assert_close(density, torch.log1p(torch.exp(raw)), rtol=1e-12, atol=0)
        torch.testing.assert_close(normal[1:], sign * F.normalize(where[1:], dim=-1), rtol=0, atol=1e-12)
        assert normal[0].isfinite().all()
        on_sphere = torch.tensor([[0, half, 0]], dtype=torch.float64)
        assert scene.field.initial_density(on_sphere).item() == pytest.approx(0, abs=1e-15)


def test_density_noise_is_added_before_the_activation(backend: str, generator: torch.Generator) -> None:
    scene = make_scene(backend)
    points = torch.rand(20, 3, generator=generator, dtype=torch.float64) - 0.5
    noise = torch.randn(20, generator=generator, dtype=torch.float64)
    raw = torch.expm1(scene.field.density(points)).log()
    for density in (scene.field(points, noise)[0], scene.field.with_normals(points, noise)[0]):
        torch.testing.assert_close(density, F.softplus(raw + noise), rtol=1e-9, atol=1e-12)


def test_many_points_without_a_graph_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, points = make_scene("numba"), torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(20, 3)
    whole = scene.field(points)
    monkeypatch.setattr(field_module, "CHUNK_SIZE", 7)
    with torch.no_grad():
        parts = scene.field(points)
    for part, all_of_it in zip(parts, whole):
        torch.testing.assert_close(part, all_of_it, rtol=1e-12, atol=0)


# --- occupancy ------------------------------------------------------------------------------------------------------


def make_grid() -> OccupancyGrid:
    return OccupancyGrid(4, 2.0, CPU)


def test_occupancy_samples_each_cell_within_its_borders(generator: torch.Generator) -> None:
    """A density that names the cell of its point comes back in that cell."""

    def cell_number(points: Tensor) -> Tensor:
        x, y, z = ((points / 2 + 1) * 2).floor().unbind(-1)  # [-2, 2] to 0..4
        return 16 * x + 4 * y + z

    grid = make_grid()
    grid.update(cell_number, 0.25, generator)
    torch.testing.assert_close(grid.values, torch.arange(64.0).reshape(4, 4, 4) * 0.25)


def test_occupancy_keeps_a_decaying_maximum_and_forgets(generator: torch.Generator) -> None:
    grid = make_grid()
    solid = torch.zeros(4, 4, 4)
    solid[1, 2, 3] = 1.0

    def field(values: Tensor) -> DensityFunction:
        return lambda points: values.flatten()

    grid.update(field(solid), 0.1, generator)
    assert grid.mask.nonzero().tolist() == [[1, 2, 3]]
    history = [grid.values[1, 2, 3].item()]
    for _ in range(200):
        grid.update(field(torch.full((4, 4, 4), 1e-3) * (1 - solid)), 0.1, generator)
        history.append(grid.values[1, 2, 3].item())
    assert history[:4] == pytest.approx([0.1 * 0.95**k for k in range(4)])
    assert not grid.mask[1, 2, 3]  # what is gone is skipped again
    grid.update(field(solid), 0.1, generator)
    assert grid.mask[1, 2, 3]
    assert grid.values[1, 2, 3].item() == pytest.approx(0.1)


def test_thin_fog_is_judged_by_its_mean(generator: torch.Generator) -> None:
    """Below the threshold everywhere, the denser half stays: else nothing could ever grow."""
    grid = make_grid()
    grid.update(lambda points: torch.linspace(0, 1e-3, 64), 1.0, generator)
    assert grid.mask.flatten().tolist() == [False] * 32 + [True] * 32
    grid.update(lambda points: torch.full((64,), 0.5).index_fill(0, torch.arange(3), 0.0), 1.0, generator)
    assert grid.mask.sum() == 61  # and above it by the threshold, not by the mean


def test_occupancy_depends_on_its_generator_alone() -> None:
    scene = make_scene("numba").float()
    states = []
    for seed in (1, 1, 2):
        scene.occupancy.values = torch.zeros(8, 8, 8)
        scene.update_occupancy(torch.Generator().manual_seed(seed))
        states.append(scene.occupancy.values.clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
