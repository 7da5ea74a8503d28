"""Every launch of a Triton kernel is compiled without a GPU, for those that runs are meant for; nothing is run."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import LAYOUT, SMOOTH, random_points, random_rays, random_triangles

from raydream.backend import cuda
from raydream.types import HashGridLayout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: tests/gpu runs the compiled kernels"),
]

MOST_REGISTERS = 128
"""With 128 threads a program, at least four programs then fit on a multiprocessor of 65,536."""
KERNELS = {
    *("encode", "encode_backward", "encode_jacobian", "encode_jacobian_backward", "composite", "composite_backward"),
    *("march_count", "march_write", "prune_count", "prune_write", "depth_test"),
}


class CompilingDriver:
    """As much of a GPU's driver as triton asks for before it launches. Each device has kernels of its own."""

    def __init__(self, capability: int, device: int) -> None:
        self._capability, self._device = capability, device

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@pytest.fixture
def launched(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What has been compiled since, by the kernel, the type of the gradient or of the winners that it looks for, and
    whether the grid is smooth.
    """
    from triton.runtime import driver

    compiled: dict[str, Any] = {}

    def launch(kernel: str, grid: tuple[int, ...], *arguments: Any) -> None:
        function = cuda.find_kernel(kernel)
        names = dict(zip(function.arg_names, arguments))
        made = function.run(*arguments, grid=grid, warmup=True, enable_fp_fusion=cuda.may_fuse(kernel))
        kind = getattr(names.get("grad_table"), "dtype", names.get("WINNERS", ""))
        compiled[f"{kernel} {kind}{' smooth' * names.get('SMOOTH', 0)}"] = made
        if kernel.endswith("_count"):  # nothing was counted: one for each ray
            names["kept_counts" if "kept_counts" in names else "counts"].fill_(1)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(driver, "_active", CompilingDriver(*request.param))
    return compiled


def launch_everything(
    dtype: torch.dtype, num_points: int = 300, deterministic: bool = False, layout: HashGridLayout = LAYOUT
) -> None:
    """All kernels once."""
    backend, generator = cuda.CudaBackend(deterministic), torch.Generator().manual_seed(0)
    rays, clip, faces = random_rays(generator, 30, dtype), *random_triangles(generator, dtype)
    everywhere, jitter = torch.ones(8, 9, 10, dtype=torch.bool), torch.rand(30, generator=generator)
    samples = backend.march(rays, everywhere, 1.0, 0.1, jitter)
    samples = backend.prune(torch.ones(30, dtype=dtype), samples, torch.tensor(0.01), 1e-4)
    backend.rasterize(clip, faces, 20, 20)
    points = random_points(generator, num_points, dtype)
    shapes = ((layout.num_entries, 2), (8, layout.num_features), (4, 8))
    table, hidden, head = (torch.rand(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    backend.field(points, table, layout, hidden, head).sum().backward()
    torch.cat(backend.field_gradient(points, table, layout, hidden, head), dim=1).sum().backward()
    density, values = (torch.rand(shape, dtype=dtype, requires_grad=True) for shape in ((30,), (30, 4)))
    backend.composite(density, values, samples)[0].sum().backward()


@pytest.mark.parametrize("launched", [(80, 0), (90, 1), (100, 2)], indirect=True, ids=["sm_80", "sm_90", "sm_100"])
def test_kernels_fit_into_registers(launched: dict[str, Any], tmp_path: Path) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for deterministic in (False, True):
        launch_everything(torch.float32, deterministic=deterministic)
    launch_everything(torch.float32, layout=SMOOTH)
    assert {name.split()[0] for name in launched} == KERNELS
    # gradients in integers too, the winners of the depth test, and all four of the grid's where it is smooth
    assert len(launched) == len(KERNELS) + 2 + 1 + 4
    for name, kernel in launched.items():
        (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
        told = subprocess.run(
            [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        )
        usage = {what: int(number) for what, number in re.findall(r"(\w+):(\d+)", told.stdout)}
        assert usage["LOCAL"] == usage["STACK"] == 0, (name, usage)  # where registers would be spilled to
        assert 0 < usage["REG"] <= MOST_REGISTERS, (name, usage)


@pytest.mark.parametrize("launched", [(90, 1)], indirect=True)
def test_what_runs_ask_of_the_compiler(launched: dict[str, Any]) -> None:
    for num_points in (300, 304, 301):
        launch_everything(torch.float32, num_points)
    launch_everything(torch.float32, 300, deterministic=True)
    launch_everything(torch.float32, 300, layout=SMOOTH)
    caches = {name: cuda.find_kernel(name).device_caches[1][0] for name in KERNELS}
    several = {name: len(kernels) for name, kernels in caches.items() if len(kernels) > 1}
    # nothing is compiled anew for another number of samples; the grid's for a smooth one
    forward, backward = {"encode": 2, "encode_jacobian": 2}, {"encode_backward": 3, "encode_jacobian_backward": 3}
    assert several == {**forward, **backward, "depth_test": 2}

    # floats are added two at a time: both features of an entry, at each corner of a cell
    added = {name: re.findall(r"\.global[\w.]*\.add\.([\w.]+)", kernel.asm["ptx"]) for name, kernel in launched.items()}
    assert added["encode_backward torch.float32"] == ["v2.f32"] * 8
    assert added["encode_backward torch.int64"] == ["u64"] * 16

    # what must be the reference's, bit by bit, is divided exactly and not fused
    march, rasterize = (launched[name].asm["ptx"] for name in ("march_write ", "depth_test False"))
    for code in (march, rasterize):
        assert "div.rn.f32" in code
        assert not re.search(r"div\.full|fma\.rn", code)
    assert "fma.rn" in launched["composite "].asm["ptx"]


@pytest.mark.parametrize("launched", [(90, 3)], indirect=True)
def test_kernels_compile_for_float64(launched: dict[str, Any]) -> None:
    """As ``tests/gpu`` compares them with the reference."""
    launch_everything(torch.float64)
    assert {name.split()[0] for name in launched} == KERNELS
