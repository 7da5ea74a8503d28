"""The choice of kernels; marching and compositing against closed forms, and numba against its plain torch twin."""

import logging
import math

import numpy as np
import pytest
import torch
from backend_cases import (
    LAYOUT,
    hash_grid,
    hash_grid_jacobian,
    random_points,
    random_rays,
    random_samples,
    random_triangles,
)
from torch import Tensor
from torch.autograd import gradcheck

from raydream import backend as backend_module
from raydream.backend import cpu, cpu_field, cpu_mesh, cpu_raster, cpu_render, load_backend
from raydream.backend.layout import is_dense, make_hash_grid_layout
from raydream.types import Backend, Rays, RaySamples

REFERENCE = load_backend("reference", "cpu")
NUMBA = load_backend("numba", "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
"""Relative to sums of up to eight terms of size 1; measured 4e-7 and 9e-16."""


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


# --- the choice of a backend and the layout of the table


def test_backend_names(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    backend_module._choose.cache_clear()
    with caplog.at_level(logging.INFO):
        assert load_backend("auto", "cpu").name == load_backend("auto", "cpu").name == "numba"
        assert load_backend("ours", "cpu").name == "numba"
    assert [record.getMessage() for record in caplog.records] == ["kernels: auto chose numba"]
    assert isinstance(REFERENCE, Backend)
    assert isinstance(NUMBA, Backend)
    with pytest.raises(
        ValueError,
        match="kernels: unknown name 'fast'; choose one of auto, ours, reference, numba, cuda, or of tinycudann",
    ):
        load_backend("fast", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, device in (("cuda", "cpu"), ("ours", "cuda")):
        with pytest.raises(ValueError, match="kernels: cuda needs a CUDA device"):
            load_backend(name, device)
    with pytest.raises(ValueError, match="kernels: numba runs on the CPU"):
        load_backend("numba", "cuda:0")


def test_without_numba_auto_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    backend_module._choose.cache_clear()
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None)
    assert load_backend("auto", "cpu").name == "reference"
    for name in ("numba", "ours"):  # never plain torch where nobody asked for it
        with pytest.raises(ValueError, match="kernels: numba is not installed"):
            load_backend(name, "cpu")
    backend_module._choose.cache_clear()


def test_layout_grows_geometrically_from_dense_to_hashed() -> None:
    layout = make_hash_grid_layout(8, 2, 15, 16, 256)
    assert (layout.resolutions[0], layout.resolutions[-1]) == (16, 256)
    ratios = np.divide(layout.resolutions[1:], layout.resolutions[:-1])
    assert np.allclose(ratios, 16 ** (1 / 7), rtol=0.04)  # rounding to whole cells: half a cell of 16
    assert [is_dense(layout, level) for level in range(8)] == [True, True] + [False] * 6
    assert np.diff(layout.offsets).tolist() == [17**3, 25**3] + [2**15] * 6
    assert layout.num_features == 16


# --- march


def march_by_hand(rays: Rays, occupancy: Tensor, radius: float, step: float, jitter: Tensor) -> list[list[float]]:
    """Starts of the intervals of each ray, from the definition, in double precision."""
    cells = np.array(occupancy.shape)
    kept = []
    for origin, direction, shift in zip(
        rays.origins.double().numpy(), rays.directions.double().numpy(), jitter.tolist()
    ):
        near, far = 0.0, math.inf
        for o, d in zip(origin, direction):
            if d == 0:
                near, far = (near, far) if abs(o) <= radius else (math.inf, -math.inf)
            else:
                low, high = sorted(((-radius - o) / d, (radius - o) / d))
                near, far = max(near, low), min(far, high)
        starts: list[float] = []
        k = 0
        while (middle := near + (k + shift + 0.5) * step) < far:
            cell = np.floor(((origin + middle * direction) / radius * 0.5 + 0.5) * cells).astype(int)
            if occupancy[tuple(np.clip(cell, 0, cells - 1))]:
                starts.append(middle - 0.5 * step)
            k += 1
        kept.append(starts)
    return kept


def test_march_follows_its_definition(backend: Backend, generator: torch.Generator) -> None:
    rays = random_rays(generator, 60, torch.float64)
    occupancy = torch.rand(5, 6, 7, generator=generator) < 0.4
    jitter = torch.rand(60, generator=generator, dtype=torch.float64)
    expected = march_by_hand(rays, occupancy, 1.0, 0.07, jitter)
    samples = backend.march(rays, occupancy, 1.0, 0.07, jitter)
    assert samples.counts.tolist() == [len(starts) for starts in expected]
    assert 0 in samples.counts.tolist()
    assert samples.starts.tolist() == np.cumsum([0, *samples.counts.tolist()[:-1]]).tolist()
    assert samples.ray_index.tolist() == [ray for ray, starts in enumerate(expected) for _ in starts]
    t_start = torch.tensor([start for starts in expected for start in starts], dtype=torch.float64)
    torch.testing.assert_close(samples.t_start, t_start, rtol=0, atol=1e-12)
    torch.testing.assert_close(samples.t_end, t_start + 0.07, rtol=0, atol=1e-12)


def test_march_crosses_a_full_box(backend: Backend) -> None:
    rays = Rays(
        torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, -3.0]]), torch.tensor([[0.0, 0.0, -1.0]] * 3)
    )
    samples = backend.march(rays, torch.ones(4, 4, 4, dtype=torch.bool), 1.0, 0.125, torch.zeros(3))
    assert samples.counts.tolist() == [16, 8, 0]  # across, from the middle, and away from the box
    assert samples.t_start[0] == 2
    assert samples.t_end[15] == 4
    assert samples.t_start[16] == 0


@pytest.mark.parametrize(
    ("fill", "radius", "step_size"), [(0.0, 1.0, 0.05), (0.02, 0.7, 0.01), (0.3, 2.0, 0.033), (1.0, 1.0, 0.05)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_numba_march_is_the_reference_bit_by_bit(
    fill: float, radius: float, step_size: float, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rays = random_rays(generator, 2000, dtype)
    occupancy = torch.rand(16, 12, 20, generator=generator) < fill
    occupancy[:, :, :4] = False
    jitter = torch.rand(2000, generator=generator, dtype=dtype)
    expected, found = (b.march(rays, occupancy, radius, step_size, jitter) for b in (REFERENCE, NUMBA))
    assert (len(expected.t_start) > 0) == (fill > 0)
    assert_equal_samples(found, expected)


def assert_equal_samples(found: RaySamples, expected: RaySamples) -> None:
    for name in ("ray_index", "t_start", "t_end", "starts", "counts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# --- prune


def test_what_cannot_be_seen_is_pruned(backend: Backend) -> None:
    """By hand: alphas of 0.01 and 0.009; a wall after which 1e-3 is left, another, and what is hidden behind both."""
    alpha = torch.tensor([0.01, 0.009, 0.999, 0.99, 0.5, 0.5, 0.009, 0.5], dtype=torch.float64)
    counts = torch.tensor([5, 0, 3])
    t_start = torch.tensor([1.0, 2, 3, 4, 5, 1, 2, 3], dtype=torch.float64)
    ray_index = torch.tensor([0] * 5 + [2] * 3)
    samples = RaySamples(ray_index, t_start, t_start + 0.5, torch.tensor([0, 5, 5]), counts)
    density = torch.log1p(-alpha) / -0.5 * (1 + 1e-12)
    seen = backend.prune(density, samples, torch.tensor(0.01, dtype=torch.float64), 1e-4)
    assert seen.t_start.tolist() == [1, 3, 4, 1, 3]
    assert seen.t_end.tolist() == [1.5, 3.5, 4.5, 1.5, 3.5]
    assert seen.ray_index.tolist() == [0, 0, 0, 2, 2]
    assert seen.counts.tolist() == [3, 0, 2]
    assert seen.starts.tolist() == [0, 3, 3]
    assert_equal_samples(backend.prune(density, samples, torch.tensor(0.0), 0.0), samples)
    nothing = backend.prune(torch.zeros(8, dtype=torch.float64), samples, torch.tensor(0.01), 0.0)
    assert nothing.counts.tolist() == [0, 0, 0]
    wrong = backend.prune(density.index_fill(0, torch.tensor([6]), math.nan), samples, torch.tensor(0.01), 1e-4)
    assert 2 in wrong.t_start[wrong.ray_index == 2].tolist()  # a NaN is not invisible


# --- composite


def test_constant_density_absorbs_exponentially(backend: Backend) -> None:
    """Beer-Lambert: opacity 1 - exp(-density * length), however the length is cut; expected depth in closed form."""
    length, sigma, num = 1.5, 2.0, 300
    t = torch.linspace(0, length, num + 1, dtype=torch.float64)
    samples = RaySamples(torch.zeros(num, dtype=torch.long), t[:-1], t[1:], torch.tensor([0]), torch.tensor([num]))
    density, middle = torch.full((num,), sigma, dtype=torch.float64), ((t[:-1] + t[1:]) / 2)[:, None]
    depth, opacity, weights = backend.composite(density, middle, samples)
    torch.testing.assert_close(opacity, torch.tensor([-math.expm1(-sigma * length)], dtype=torch.float64))
    torch.testing.assert_close(weights.sum(), opacity[0])
    expected = 1 / sigma - math.exp(-sigma * length) * (length + 1 / sigma)
    # The midpoint rule errs by step^2 * (second derivative) / 24, below 1e-5 here.
    assert abs(depth.item() - expected) < 1e-5


def test_an_opaque_sample_hides_what_is_behind(backend: Backend, generator: torch.Generator) -> None:
    samples = random_samples(generator, [0, 3, 0], torch.float32)
    density = torch.tensor([0.0, 1e9, 5.0], requires_grad=True)
    color, opacity, _ = backend.composite(density, torch.eye(3), samples)
    torch.testing.assert_close(color, torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert opacity.tolist() == [0, 1, 0]
    color.sum().backward()
    assert density.grad is not None
    assert density.grad.isfinite().all()


def test_composite_without_any_sample(backend: Backend, generator: torch.Generator) -> None:
    samples = random_samples(generator, [0, 0], torch.float32)
    color, opacity, weights = backend.composite(torch.zeros(0), torch.zeros(0, 3), samples)
    assert color.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert opacity.tolist() == [0, 0]
    assert weights.shape == (0,)


def composite_inputs(
    generator: torch.Generator, counts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, RaySamples]:
    samples = random_samples(generator, counts, dtype)
    density = 3 * torch.rand(sum(counts), generator=generator, dtype=dtype)
    values = torch.randn(sum(counts), 5, generator=generator, dtype=dtype)
    return density.requires_grad_(), values.requires_grad_(), samples


def test_composite_gradients(backend: Backend, generator: torch.Generator) -> None:
    density, values, samples = composite_inputs(generator, [4, 0, 1, 3], torch.float64)
    assert gradcheck(lambda density, values: backend.composite(density, values, samples), (density, values))


def test_numba_composite_is_the_reference(dtype: torch.dtype, generator: torch.Generator) -> None:
    counts = torch.randint(0, 90, (50,), generator=generator).tolist()
    density, values, samples = composite_inputs(generator, counts, dtype)
    grads = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((50, 5), (50,), (sum(counts),))]
    results = []
    for backend in (REFERENCE, NUMBA):
        outputs = backend.composite(density, values, samples)
        results.append([*outputs, *torch.autograd.grad(outputs, (density, values), grads)])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=2 * TOLERANCE[dtype])  # measured 7e-7 and 2e-15


# --- all together


def every_result(backend: Backend) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    points, rays = random_points(generator, 200, torch.float32), random_rays(generator, 100, torch.float32)
    table = torch.randn(LAYOUT.num_entries, 2, generator=generator, requires_grad=True)
    features, jacobian = hash_grid_jacobian(backend, points, table, LAYOUT)
    plain = hash_grid(backend, points, table, LAYOUT)
    samples = backend.march(rays, torch.rand(8, 8, 8, generator=generator) < 0.5, 1.0, 0.05, torch.zeros(100))
    density = torch.rand(len(samples.t_start), generator=generator, requires_grad=True)
    outputs = backend.composite(density, torch.stack([samples.t_start, samples.t_end], -1), samples)
    fragments = backend.rasterize(*random_triangles(generator, torch.float32), 16, 16)
    output, slope = backend.field_gradient(points, table, LAYOUT, torch.ones(8, LAYOUT.num_features), torch.ones(2, 8))
    losses = [
        plain.sin().sum() + features.cos().sum() + (jacobian**2).sum() + (output @ output.T).sum() + slope.sum(),
        sum(output.sum() for output in outputs),
    ]
    grads = torch.autograd.grad(losses[0], table) + torch.autograd.grad(losses[1], density)
    return [
        plain,
        features,
        jacobian,
        output,
        slope,
        samples.t_start,
        *outputs,
        fragments.face,
        fragments.depth,
        *grads,
    ]


def test_equal_inputs_give_equal_bits(backend: Backend) -> None:
    for first, second in zip(every_result(backend), every_result(backend)):
        assert torch.equal(first, second)


def test_warm_up_leaves_nothing_to_compile() -> None:
    cpu.warm_up()
    modules = (cpu_field, cpu_render, cpu_raster, cpu_mesh)
    public = [value for module in modules for name, value in vars(module).items() if not name.startswith("_")]
    kernels = [kernel for kernel in public if hasattr(kernel, "signatures") and kernel is not cpu_raster.project]
    compiled = [len(kernel.signatures) for kernel in kernels]
    assert len(kernels) == 12  # ``project`` is a part of them
    assert min(compiled) >= 1
    every_result(NUMBA)
    assert [len(kernel.signatures) for kernel in kernels] == compiled
