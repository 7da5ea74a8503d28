"""Other people's kernels behind the protocol, held on a CPU to what they publish: every call, value and gradient."""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from backend_cases import LAYOUT, SMOOTH, random_samples, worst_difference
from named_packages import PUBLISHED, installed, nerfacc_extension, stand_ins
from package_cases import REFERENCE, features_difference, field_difference, march_difference, raster_difference
from small_scenes import CPU, NO_LOSSES, SHADING, SMALL, make_cameras

from raydream import backend as backend_module
from raydream.backend import load_backend
from raydream.backend.layout import make_hash_grid_layout
from raydream.config.kernels import KERNEL_PACKAGES
from raydream.scene.nerf import NerfScene
from raydream.types import Backend


@pytest.fixture
def packages() -> Iterator[SimpleNamespace]:
    with installed(stand_ins()) as modules:
        yield modules


def over_reference(package: str) -> Backend:
    return backend_module._with_package(package, REFERENCE, "cpu")


def parameters_of(module: ModuleType, name: str) -> str:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
    parts = inspect.signature(found).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parts)


# --- what the packages publish


def test_the_stand_ins_have_the_published_signatures() -> None:
    modules = stand_ins()
    assert {place: parameters_of(modules[place[0]], place[1]) for place in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("package", ["tinycudann", "nerfacc", "nvdiffrast"])
def test_what_is_installed_has_the_published_signatures(package: str) -> None:
    if find_spec(package) is None or (package != "nerfacc" and not torch.cuda.is_available()):
        pytest.skip(f"{package} is not installed, or wants a GPU to be imported")
    places = [place for place in PUBLISHED if place[0].split(".")[0] == package]
    for module, name in places:
        assert parameters_of(importlib.import_module(module), name) == PUBLISHED[module, name], name


# --- values and gradients


@pytest.mark.parametrize("features", [1, 2, 8])
@pytest.mark.parametrize(
    "sizes",
    [(5, 10, 4, 40), (1, 4, 2, 2), (3, 12, 15, 63), (2, 9, 7, 200)],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_tinycudann_encodes_as_the_reference_does(
    packages: SimpleNamespace, features: int, sizes: tuple[int, int, int, int]
) -> None:
    """Dense levels that are no multiple of 8, that fill their table to the last entry, and hashed ones."""
    backend = over_reference("tinycudann")
    assert (backend.name, isinstance(backend, Backend)) == ("tinycudann+reference", True)
    levels, log2_table_size, coarsest, finest = sizes
    layout = make_hash_grid_layout(levels, features, log2_table_size, coarsest, finest)
    # where a point lies in one of 200 cells, to float32
    assert features_difference(backend, "cpu", layout) < 1e-4  # type: ignore[arg-type]


def test_tinycudann_blends_smoothly_where_it_is_asked_to(packages: SimpleNamespace) -> None:
    assert features_difference(over_reference("tinycudann"), "cpu", SMOOTH) < 1e-4  # type: ignore[arg-type]


def test_tinycudann_network_is_the_reference_in_half_precision(packages: SimpleNamespace) -> None:
    backend = over_reference("tinycudann")
    assert field_difference(backend, "cpu") < 2e-2  # 8e-3: float16, and units that are rounded on or off
    assert field_difference(backend, "cpu", 16) < 2e-2


def test_nerfacc_marches_and_composites_as_the_reference_does(
    packages: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    backend = over_reference("nerfacc")
    assert (backend.name, isinstance(backend, Backend)) == ("nerfacc+reference", True)
    assert worst_difference(backend, torch.float32, "cpu") < 4e-6
    assert os.environ.pop("NVCC_APPEND_FLAGS") == "-std=c++17", "as C++20 it cannot be compiled"
    others, apart = march_difference(backend, "cpu", 60)
    assert others == 0
    assert apart < 4e-6


def test_nerfacc_itself_takes_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own Python, where it is installed, over its kernels in plain torch."""
    if find_spec("nerfacc") is None:
        pytest.skip("nerfacc is not installed")
    for name, kernel in nerfacc_extension().items():
        monkeypatch.setattr(f"nerfacc.cuda.{name}", kernel)
    with installed({"nerfacc": importlib.import_module("nerfacc")}):
        backend = over_reference("nerfacc")
        assert worst_difference(backend, torch.float32, "cpu") < 4e-6
        assert march_difference(backend, "cpu", 60)[0] == 0


def test_nvdiffrast_sees_the_faces_that_the_reference_sees(packages: SimpleNamespace) -> None:
    backend = over_reference("nvdiffrast")
    assert (backend.name, isinstance(backend, Backend)) == ("nvdiffrast+reference", True)
    others, apart = raster_difference(backend, "cpu")
    assert others == 0
    assert apart < 4e-6
    behind = backend.rasterize(-torch.ones(1, 3, 4), torch.tensor([[0, 1, 2]]), 4, 4)
    assert behind.face.max() == -1


@pytest.mark.parametrize("package", ["tinycudann", "nerfacc"])
def test_nothing_is_computed_of_nothing(packages: SimpleNamespace, package: str) -> None:
    backend, none = over_reference(package), random_samples(torch.Generator(), [0, 0], torch.float32)
    color, opacity, weights = backend.composite(torch.zeros(0), torch.zeros(0, 3), none)
    assert (color.shape, opacity.tolist(), len(weights)) == ((2, 3), [0, 0], 0)
    table, hidden = torch.zeros(LAYOUT.num_entries, 2), torch.zeros(16, LAYOUT.num_features)
    assert backend.field(torch.zeros(0, 3), table, LAYOUT, hidden, torch.zeros(4, 16)).shape == (0, 4)


def test_any_kernels_go_on_from_any_others_checkpoint(packages: SimpleNamespace) -> None:
    backend: Backend = REFERENCE
    for package in KERNEL_PACKAGES:
        backend = backend_module._with_package(package, backend, "cpu")
    assert backend.name == "nvdiffrast+nerfacc+tinycudann+reference"
    mine, other = (
        NerfScene(SMALL, SHADING, NO_LOSSES, kernels, CPU, lambda *_: torch.Generator().manual_seed(1))
        for kernels in (REFERENCE, backend)
    )
    torch.nn.init.normal_(mine.field.table, generator=torch.Generator().manual_seed(2))
    for scene in (mine, other):
        scene.update_occupancy(torch.Generator().manual_seed(3))
    cameras = make_cameras([0.0, 120.0], 8)
    cameras = dataclasses.replace(cameras, c2w=cameras.c2w.float(), fov_y_deg=cameras.fov_y_deg.float())

    def apart() -> float:
        return float((mine.preview(cameras).rgb - other.preview(cameras).rgb).detach().abs().max())

    before = apart()
    other.load_state(mine.state())
    assert mine.preview(cameras).opacity.max() > 0.5
    assert before > 0.02 > apart()


# --- the choice


def test_packages_stand_on_one_another(packages: SimpleNamespace) -> None:
    both = backend_module._with_package("nerfacc", over_reference("nvdiffrast"), "cpu")
    assert both.name == "nerfacc+nvdiffrast+reference"
    assert worst_difference(both, torch.float32, "cpu") < 4e-6
    assert raster_difference(both, "cpu")[0] == 0


def test_named_packages_stand_on_our_kernels_for_the_gpu(
    packages: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    exercised: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(backend_module, "find_spec", lambda name: True)
    monkeypatch.setattr("raydream.backend.exercise.exercise", lambda backend, device: exercised.append(backend.name))
    assert load_backend("nerfacc+tinycudann", "cuda").name == "nerfacc+tinycudann+cuda"
    assert exercised == ["tinycudann+cuda", "nerfacc+tinycudann+cuda"]


def test_a_package_that_cannot_run_is_refused_with_the_command_that_gets_it(packages: SimpleNamespace) -> None:
    """As nerfacc is without a compiler: it can be imported, and its extension is None."""

    def no_extension(*_arguments: object, **_named: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'traverse_grids'")

    packages.nerfacc.traverse_grids = no_extension
    with pytest.raises(
        ValueError, match=r"^kernels: nerfacc cannot be used here \(AttributeError.*pip install .*ours$"
    ):
        over_reference("nerfacc")


def test_a_package_that_is_missing_or_has_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinycudann", None)  # what makes an import fail
    with pytest.raises(
        ValueError, match=r"^kernels: tinycudann cannot be used here \(ModuleNotFoundError.*tinycudann\]"
    ):
        over_reference("tinycudann")
    with pytest.raises(ValueError, match=r"^kernels: nerfacc\+tinycudann needs a CUDA device, which 'cpu' is not"):
        load_backend("nerfacc+tinycudann", "cpu")
    for wrong in ("nerfacc+", "nerfacc+numba", "nerfacc+nerfacc"):
        with pytest.raises(ValueError, match=r"^kernels: unknown name "):
            load_backend(wrong, "cpu")
