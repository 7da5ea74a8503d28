"""The compiled Triton kernels against the plain torch reference on the same GPU."""

from dataclasses import fields
from importlib.util import find_spec

import pytest
import torch
from backend_cases import (
    LAYOUT,
    SMOOTH,
    hash_grid_jacobian,
    mesh_results,
    random_rays,
    random_triangles,
    summed_kernels,
    worst_difference,
)

from raydream.backend import load_backend
from raydream.camera import camera_rays, orbit_cameras
from raydream.types import Fragments, Rays, RaySamples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


def test_auto_is_cuda() -> None:
    assert load_backend("auto", "cuda").name == "cuda"


# 1 - exp by the GPU's fast exponential, and contracted products, cost some units in the last place.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_compiled_kernels_are_the_reference(dtype: torch.dtype, tolerance: float, deterministic: bool) -> None:
    for layout in (LAYOUT, SMOOTH):
        assert worst_difference(load_backend("cuda", "cuda", deterministic), dtype, "cuda", layout) < tolerance


def test_meshes_are_those_of_the_cpu() -> None:
    """Image and gradients of rasterising, interpolating and antialiasing, by other code on another machine."""
    ours = mesh_results(load_backend("cuda", "cuda"), torch.float64, "cuda")
    expected = mesh_results(load_backend("reference", "cpu"), torch.float64, "cpu")
    for found, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(found.cpu(), truth, rtol=0, atol=1e-9 * float(truth.abs().max()))


def test_equal_inputs_give_equal_bits() -> None:
    """Many points on few table entries, where floating point additions in any order would differ."""
    backend = load_backend("cuda", "cuda", deterministic=True)
    for first, second in zip(*(summed_kernels(backend, torch.float32, "cuda") for _ in range(2))):
        assert torch.equal(first, second)
    points = torch.rand(200_000, 3, device="cuda") * 0.1
    table = torch.ones(LAYOUT.num_entries, 2, device="cuda", requires_grad=True)
    grads = []
    for _ in range(3):
        features, jacobian = hash_grid_jacobian(backend, points, table, LAYOUT)
        grads.append(torch.autograd.grad((features.sum() + jacobian.square().sum() + jacobian.sum()), table)[0])
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_samples_and_fragments_are_the_reference_bit_by_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rays = random_rays(generator, 5000, dtype)
    rays = Rays(rays.origins.cuda(), rays.directions.cuda())
    occupancy = (torch.rand(17, 9, 33, generator=generator) < 0.4).cuda()
    jitter = torch.rand(5000, generator=generator, dtype=dtype).cuda()
    backends = load_backend("cuda", "cuda"), load_backend("reference", "cuda")
    found, expected = (backend.march(rays, occupancy, 1.0, 0.03, jitter) for backend in backends)
    assert len(expected.t_start) > 10_000
    assert_equal(found, expected)

    density = (torch.rand(len(expected.t_start), generator=generator, dtype=dtype).exp() ** 8).cuda()
    seen = [backend.prune(density, expected, torch.tensor(0.01, device="cuda"), 1e-4) for backend in backends]
    assert 0 < len(seen[1].t_start) < len(expected.t_start)
    assert_equal(*seen)

    clip, faces = random_triangles(generator, dtype)
    images = [backend.rasterize(clip.cuda(), faces.cuda(), 40, 50) for backend in backends]
    assert_equal(*images)


def assert_equal(found: RaySamples | Fragments, expected: RaySamples | Fragments) -> None:
    for part in fields(expected):
        assert torch.equal(getattr(found, part.name), getattr(expected, part.name)), part.name


def test_the_march_needs_memory_for_what_it_keeps() -> None:
    """512 px, 512 samples on the diagonal: 16 bytes for each that is kept, where the dense march takes gigabytes."""
    azimuth, elevation, distance, fov = torch.tensor([[30.0], [15.0], [1.2], [60.0]], device="cuda")
    cameras = orbit_cameras(azimuth, elevation, distance, fov, 512, 512)
    rays, occupancy = camera_rays(cameras), torch.zeros(64, 64, 64, dtype=torch.bool, device="cuda")
    occupancy[16:48, 16:48, 16:48] = True
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    jitter = torch.rand(512 * 512, device="cuda")
    samples = load_backend("cuda", "cuda").march(rays, occupancy, 1.0, 2 * 3**0.5 / 512, jitter)
    num_samples, num_rays = len(samples.t_start), len(jitter)
    assert num_samples > 1_000_000
    assert torch.cuda.max_memory_allocated() - before < 20 * num_samples + 64 * num_rays
