"""Hash grid and field against closed forms, against finite differences, and numba against its plain torch twin."""

import pytest
import torch
from backend_cases import LAYOUT, SMOOTH, hash_grid, hash_grid_jacobian, random_points
from torch import Tensor
from torch.autograd import gradcheck

from raydream.backend import load_backend, reference
from raydream.backend.layout import make_hash_grid_layout
from raydream.types import Backend, HashGridLayout, Interpolation

REFERENCE = load_backend("reference", "cpu")
NUMBA = load_backend("numba", "cpu")
INTERPOLATION = ["linear", "smoothstep"]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
"""Relative to sums of up to eight terms of size 1; measured 4e-7 and 9e-16."""


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_dense_level_reproduces_a_trilinear_function(backend: Backend, generator: torch.Generator) -> None:
    layout = make_hash_grid_layout(1, 2, 12, 7, 7)
    vertex = torch.arange(8, dtype=torch.float64) / 7
    z, y, x = torch.meshgrid(vertex, vertex, vertex, indexing="ij")  # x fastest
    table = torch.stack([1 + 2 * x - 3 * y + x * y * z, x * z - y], dim=-1).reshape(-1, 2)
    x, y, z = (points := torch.rand(50, 3, generator=generator, dtype=torch.float64)).unbind(-1)
    features, jacobian = hash_grid_jacobian(backend, points, table, layout)
    torch.testing.assert_close(features[:, 0], 1 + 2 * x - 3 * y + x * y * z, rtol=0, atol=1e-13)
    torch.testing.assert_close(jacobian[:, :, 0], torch.stack([2 + y * z, -3 + x * z, x * y], -1), rtol=0, atol=1e-13)
    torch.testing.assert_close(jacobian[:, :, 1], torch.stack([z, -torch.ones_like(x), x], -1), rtol=0, atol=1e-13)
    torch.testing.assert_close(hash_grid(backend, points, table, layout), features, rtol=0, atol=1e-15)


def test_a_smooth_level_eases_from_vertex_to_vertex(backend: Backend, generator: torch.Generator) -> None:
    """As tiny-cuda-nn's smoothstep: w = x^2 (3 - 2 x), which is level at every vertex."""
    layout = make_hash_grid_layout(1, 1, 8, 4, 4, "smoothstep")
    vertex = torch.arange(5, dtype=torch.float64)
    table = (vertex**2).repeat(25)[:, None]  # along x, which is fastest
    points = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    points[0, 0], points[1, 0], points[2, 0] = 0.25, 0.125, 0.0625
    cell, x = (points[:, 0] * 4).floor(), (points[:, 0] * 4).frac()
    rise = 2 * cell + 1  # (cell + 1)^2 - cell^2
    features, jacobian = hash_grid_jacobian(backend, points, table, layout)
    torch.testing.assert_close(features[:, 0], cell**2 + rise * x**2 * (3 - 2 * x), rtol=0, atol=1e-13)
    torch.testing.assert_close(jacobian[:, 0, 0], 4 * rise * 6 * x * (1 - x), rtol=0, atol=1e-12)
    assert jacobian[:, 1:].abs().max() < 1e-13
    assert features[:3, 0].tolist() == [1, 0.5, 0.15625]
    torch.testing.assert_close(hash_grid(backend, points, table, layout), features, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_hashed_level_reads_the_entries_of_instant_ngp(backend: Backend) -> None:
    layout = make_hash_grid_layout(1, 1, 6, 100, 100)
    table = torch.arange(64, dtype=torch.float64)[:, None]
    vertices = torch.tensor([[3, 5, 7], [99, 98, 1], [0, 0, 0], [100, 100, 100]])
    expected = [(x ^ (y * 2654435761) ^ (z * 805459861)) % 64 for x, y, z in vertices.tolist()]
    found = hash_grid(backend, vertices / 100.0, table.float(), layout)
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("features_per_level", [2, 3])
def test_numba_hash_grid_is_the_reference(
    features_per_level: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    layout = make_hash_grid_layout(5, features_per_level, 10, 4, 40)
    points = random_points(generator, 300, dtype)  # more than one block, and a partial one
    tables = [torch.randn(layout.num_entries, features_per_level, dtype=dtype).requires_grad_() for _ in "ab"]
    tables[1].data.copy_(tables[0].data)
    grads = torch.randn(2, 4, 300, layout.num_features, generator=generator, dtype=dtype)
    results = []
    for backend, table in zip((REFERENCE, NUMBA), tables):
        plain = hash_grid(backend, points, table, layout)
        features, jacobian = hash_grid_jacobian(backend, points, table, layout)
        plain_grad = torch.autograd.grad(plain, table, grads[0, 0])[0]
        both_grad = torch.autograd.grad((features, jacobian), table, (grads[1, 0], grads[1, 1:].movedim(0, 1)))[0]
        results.append([plain, features, jacobian / 40, plain_grad / 30, both_grad / 1200])  # each of size about 1
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=5 * TOLERANCE[dtype])


@pytest.mark.slow
def test_hash_grid_gradients(backend: Backend, generator: torch.Generator) -> None:
    points = random_points(generator, 9, torch.float64)
    layout = make_hash_grid_layout(3, 2, 5, 2, 9)
    table = torch.randn(layout.num_entries, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda table: hash_grid(backend, points, table, layout), table)
    assert gradcheck(lambda table: hash_grid_jacobian(backend, points, table, layout), table)


@pytest.mark.parametrize("layout", [LAYOUT, SMOOTH], ids=INTERPOLATION)
def test_jacobian_is_the_derivative(backend: Backend, layout: HashGridLayout, generator: torch.Generator) -> None:
    """Against central differences, exact up to rounding as long as a point stays in its cell along the axis."""
    table = torch.randn(layout.num_entries, 2, generator=generator, dtype=torch.float64)
    points = random_points(generator, 40, torch.float64)
    jacobian = hash_grid_jacobian(backend, points, table, layout)[1]
    assert (jacobian[4, 0] == 0).all()  # held by the clamp along x, but not along y
    assert (jacobian[4, 1, :8] != 0).all()  # its last level has a vertex at 0.3, where a smooth grid is level
    points, jacobian = points[7:], jacobian[7:]
    step = 1e-7
    for axis in range(3):
        shift = step * torch.eye(3, dtype=torch.float64)[axis]
        forward, back = (hash_grid(backend, points + sign * shift, table, layout) for sign in (1, -1))
        torch.testing.assert_close((forward - back) / (2 * step), jacobian[:, axis], rtol=0, atol=1e-7)


@pytest.mark.parametrize("layout", [LAYOUT, SMOOTH], ids=INTERPOLATION)
def test_jacobian_trains_like_double_backward(layout: HashGridLayout, generator: torch.Generator) -> None:
    """The table's gradient of a function of the spatial derivative, as torch finds it by differentiating twice."""
    points = torch.rand(20, 3, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(layout.num_entries, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(layout.num_features, generator=generator, dtype=torch.float64)
    features = []
    for level in range(layout.num_levels):
        index, fraction = reference._cell_corners(points, layout, level)
        weight = reference._along_axes(reference._blend(fraction, layout)).prod(-1, keepdim=True)
        features.append((table[index] * weight).sum(1))
    (slope,) = torch.autograd.grad((torch.cat(features, -1) @ mix).sum(), points, create_graph=True)
    (expected,) = torch.autograd.grad((slope**3).sum(), table)
    for backend in (REFERENCE, NUMBA):
        jacobian = hash_grid_jacobian(backend, points, table, layout)[1]
        (found,) = torch.autograd.grad(((jacobian @ mix) ** 3).sum(), table)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-8)


# --- field


def field_inputs(
    generator: torch.Generator, num: int, layout: HashGridLayout, sizes: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Points, and table, hidden and head."""
    (units, outputs), width = sizes, layout.num_features
    shapes = ((layout.num_entries, layout.features_per_level), (units, width), (outputs, units))
    weights = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return random_points(generator, num, dtype), weights


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", INTERPOLATION)
def test_field_gradients(backend: Backend, interpolation: Interpolation, generator: torch.Generator) -> None:
    layout = make_hash_grid_layout(
        3, 2, 5, 2, 9, interpolation
    )  # six features, seven units, three outputs: no multiples of four
    points, weights = field_inputs(generator, 9, layout, (7, 3), torch.float64)
    assert gradcheck(lambda t, *w: backend.field(points, t, layout, *w), weights)
    assert gradcheck(lambda t, *w: backend.field_gradient(points, t, layout, *w), weights)
    step, (table, hidden, head) = 1e-6, weights
    points = points[7:]
    output, gradient = backend.field_gradient(points, table, layout, hidden, head)
    torch.testing.assert_close(output, backend.field(points, table, layout, hidden, head), rtol=0, atol=1e-13)
    for axis in range(3):
        shift = step * torch.eye(3, dtype=torch.float64)[axis]
        up, down = (backend.field(points + sign * shift, table, layout, hidden, head)[:, 0] for sign in (1, -1))
        torch.testing.assert_close((up - down) / (2 * step), gradient[:, axis], rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATION)
@pytest.mark.parametrize(("num_levels", "sizes"), [(8, (64, 4)), (5, (21, 5))])
def test_numba_field_is_the_reference(
    num_levels: int,
    sizes: tuple[int, int],
    interpolation: Interpolation,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    layout = make_hash_grid_layout(num_levels, 2, 10, 4, 40, interpolation)
    points, weights = field_inputs(generator, 600, layout, sizes, dtype)  # whole blocks, and a partial one
    grads = [torch.randn(600, size, generator=generator, dtype=dtype) for size in (sizes[1], 3)]
    results = []
    for backend in (REFERENCE, NUMBA):
        plain = backend.field(points, weights[0], layout, *weights[1:])
        both = backend.field_gradient(points, weights[0], layout, *weights[1:])
        results.append(
            [plain, *both, *torch.autograd.grad(plain, weights, grads[0]), *torch.autograd.grad(both, weights, grads)]
        )
    for expected, found in zip(*results):
        # Sums over up to 600 samples, measured against their largest element: 4e-7 and 1e-15.
        largest = expected.abs().max()
        torch.testing.assert_close(found / largest, expected / largest, rtol=0, atol=TOLERANCE[dtype])
