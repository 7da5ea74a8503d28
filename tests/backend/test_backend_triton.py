"""The Triton kernels without a GPU: what triton's interpreter makes of them, and what they ask of a pretend device."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreted import interpret

from raydream.backend.cuda import CudaBackend
from raydream.types import Backend

pytestmark = pytest.mark.slow


def test_cuda_backend_imports_without_triton_and_cuda() -> None:
    assert isinstance(CudaBackend(), Backend)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: tests/gpu runs the compiled kernels")
    return interpret()


def test_interpreted_kernels_are_the_reference(found: dict[str, Any]) -> None:
    assert found["sums"]["torch.float32"] < 4e-6  # measured 7e-7
    assert found["sums"]["torch.float64"] < 1e-7  # measured 8e-10: the series for small optical depths ends at float32


def test_an_interpreted_smooth_grid_is_the_reference(found: dict[str, Any]) -> None:
    assert 0 < found["smooth"] < 1e-12  # measured 8e-16


def test_packed_samples_and_fragments_are_the_reference_bit_by_bit(found: dict[str, Any]) -> None:
    march, prune, rasterize = (found["packed"][name] for name in ("march", "prune", "rasterize"))
    assert march[0] > march[1] > march[2] == 0  # and where there is nothing, nothing is found
    assert prune[0] == march[0] > prune[1] > prune[2] > 0
    assert min(rasterize) > 100


def test_the_gradient_is_summed_in_floats_or_in_integers(found: dict[str, Any]) -> None:
    gradient = found["gradient"]
    assert gradient["size"] > 1
    assert 0 < gradient["integers"] < 1e-6 * gradient["size"]
    assert 0 < gradient["floats"] < 1e-6 * gradient["size"]


def test_features_and_their_gradient_lie_feature_by_feature(found: dict[str, Any]) -> None:
    assert found["gradient"]["strides"] == [[1, 400]] * 2


def test_a_step_waits_for_the_device_twice_outside_the_wire(found: dict[str, Any]) -> None:
    """For the number of samples in occupied cells and for that of those that can be seen; and for both messages."""
    step = found["step"]["cuda"]
    assert step["finite"]
    assert step["repeats"]  # what is drawn on the device is drawn from seeds, too
    assert step["samples"] > 100
    assert step["render"]["waits"] == {"backend.cuda._pack": 2, "distill.messages.to_wire": 1}
    assert step["apply"]["waits"] == {"distill.messages.read_figures": 1}


def test_a_step_copies_what_cameras_and_latents_weigh(found: dict[str, Any]) -> None:
    """Whatever the size of the picture: rays, jitter and noise are made on the device."""
    render, apply = found["step"]["cuda"]["render"], found["step"]["cuda"]["apply"]
    latents = 4 * 16 * 16 * 4
    assert sum(render["to_device_bytes"].values()) < 128
    assert render["to_host_bytes"] == {"distill.messages.to_wire": latents}
    assert apply["to_device_bytes"] == {"device.send": latents}
    assert sum(apply["to_host_bytes"].values()) < 128


def test_a_step_launches_each_kernel_once(found: dict[str, Any]) -> None:
    step = found["step"]["cuda"]
    render, apply = step["render"]["launches"], step["apply"]["launches"]
    ours = ("march_count", "march_write", "encode", "prune_count", "prune_write", "encode_jacobian", "composite")
    assert [render[kernel] for kernel in ours] == [1] * len(ours)
    # the last two are those of the occupancy grid and of the picture
    assert [apply[kernel] for kernel in ("composite_backward", "encode_jacobian_backward", "encode")] == [1, 1, 1]
    assert sum(render.values()) <= 170  # measured 157
    assert sum(apply.values()) <= 260  # measured 243


def test_what_plain_torch_asks_for_is_seen(found: dict[str, Any]) -> None:
    """The counter can count: the reference marches through boolean masks."""
    waits = found["step"]["reference"]["render"]["waits"]
    assert waits["backend.reference.march"] >= 5
    assert waits["backend.reference.prune"] >= 4


def test_the_modes_of_an_exhibit_are_seen_without_waiting(found: dict[str, Any]) -> None:
    """But for which of them are asked for; every pixel is shaded, with and without a texture, as on the host."""
    modes = found["modes"]
    assert modes["waits"] == {"priors.exhibit_modes.means": 1}
    assert modes["same"]
    assert modes["shown"] > 0.1
