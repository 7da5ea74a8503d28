"""The compiled Triton kernels against the plain torch reference on the same GPU."""

from importlib.util import find_spec

import pytest
import torch
from backend_cases import LAYOUT, hash_grid_jacobian, random_rays, random_triangles, summed_kernels, worst_difference

from raydream.backend import load_backend
from raydream.types import Rays

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


def test_auto_is_cuda() -> None:
    assert load_backend("auto", "cuda").name == "cuda"


# 1 - exp by the GPU's fast exponential, and contracted products, cost some units in the last place.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_compiled_kernels_are_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    assert worst_difference(load_backend("cuda", "cuda"), dtype, "cuda") < tolerance


def test_equal_inputs_give_equal_bits() -> None:
    """Many points on few table entries, where floating point additions in any order would differ."""
    backend = load_backend("cuda", "cuda")
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


def test_torch_kernels_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    rays = random_rays(generator, 500, torch.float64)
    occupancy = torch.rand(9, 9, 9, generator=generator) < 0.4
    jitter = torch.rand(500, generator=generator, dtype=torch.float64)
    expected = load_backend("reference", "cpu").march(rays, occupancy, 1.0, 0.03, jitter)
    on_gpu = Rays(rays.origins.cuda(), rays.directions.cuda())
    found = load_backend("cuda", "cuda").march(on_gpu, occupancy.cuda(), 1.0, 0.03, jitter.cuda())
    assert torch.equal(found.ray_index.cpu(), expected.ray_index)
    torch.testing.assert_close(found.t_start.cpu(), expected.t_start, rtol=0, atol=1e-12)

    clip, faces = random_triangles(generator, torch.float64)
    pictured = load_backend("reference", "cpu").rasterize(clip, faces, 40, 50)
    fragments = load_backend("cuda", "cuda").rasterize(clip.cuda(), faces.cuda(), 40, 50)
    assert torch.equal(fragments.face.cpu(), pictured.face)
    torch.testing.assert_close(fragments.depth.cpu(), pictured.depth, rtol=1e-12, atol=0)
