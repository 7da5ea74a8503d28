"""Other people's kernels against the plain torch reference on the same GPU, each where it is installed."""

from importlib.util import find_spec

import pytest
import torch
from backend_cases import LAYOUT, SMOOTH, worst_difference
from package_cases import features_difference, field_difference, march_difference, raster_difference

from raydream.backend import load_backend
from raydream.types import Backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def loaded(package: str) -> Backend:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed beside this GPU")
    return load_backend(package, "cuda")


@pytest.mark.parametrize("package", ["nerfacc", "nvdiffrast"])
def test_all_kernels_are_the_reference(package: str) -> None:
    assert worst_difference(loaded(package), torch.float32, "cuda") < 3e-5


def test_tinycudann_encodes_as_the_reference_does() -> None:
    for layout in (LAYOUT, SMOOTH):
        assert features_difference(loaded("tinycudann"), "cuda", layout) < 1e-4  # type: ignore[arg-type]


def test_tinycudann_network_is_the_reference_in_half_precision() -> None:
    assert field_difference(loaded("tinycudann"), "cuda") < 2e-2


def test_nerfacc_marches_as_the_reference_does() -> None:
    others, apart = march_difference(loaded("nerfacc"), "cuda", 5000)
    assert others < 0.02  # midpoints on borders of cells, after steps that are added up in float32
    assert apart < 1e-4


def test_nvdiffrast_sees_the_faces_that_the_reference_sees() -> None:
    others, apart = raster_difference(loaded("nvdiffrast"), "cuda")
    assert others < 0.05  # along edges: corners lie on sixteenths of a pixel
    assert apart < 1e-2
