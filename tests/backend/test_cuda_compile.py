"""Every Triton kernel compiles without a GPU for those that runs are meant for, and fits into their registers."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from raydream.backend import cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

MOST_REGISTERS = 128
"""With 128 threads a program, at least four programs then fit on a multiprocessor of 65,536."""
FLOATS, LONGS, INTS, BYTES = "*fp32", "*i64", "*i32", "*u8"
TYPES = {
    **dict.fromkeys(("levels", "spans", "lowest", "nearest"), INTS),
    **dict.fromkeys(("starts", "counts", "kept_counts", "ends", "ray_index"), LONGS),
    **dict.fromkeys(("num_samples", "sample_stride", "feature_stride", "num_rays", "num_channels"), "i32"),
    **dict.fromkeys(("x_cells", "y_cells", "z_cells", "num_faces", "num_pixels", "width_px", "splits"), "i32"),
    "occupancy": BYTES,
    "most_depth": "fp32",
}
"""By the arguments' names; all others are arrays of floats."""
FIELD = {"FEATURES": 2, "LANES": 2, "BLOCK": cuda.SAMPLES_PER_PROGRAM, "sample_stride": 1}
WALK = {"RAYS": cuda.RAYS_PER_WALK, "LANES": cuda.INTERVALS_PER_WALK}
RAYS = {"CHANNELS": 4, "RAYS": cuda.RAYS_PER_PROGRAM}
INTEGERS = {"grad_table": LONGS}
KERNELS: list[tuple[str, dict[str, int], dict[str, str]]] = [
    *((name, FIELD, {}) for name in ("encode", "encode_backward", "encode_jacobian", "encode_jacobian_backward")),
    *((name, FIELD, INTEGERS) for name in ("encode_backward", "encode_jacobian_backward")),
    *((name, WALK, {}) for name in ("march_count", "march_write", "prune_count", "prune_write")),
    *((name, RAYS, {}) for name in ("composite", "composite_backward")),
    *(("depth_test", {"PIXELS": cuda.PIXELS_PER_PROGRAM, "WINNERS": winners}, {}) for winners in (0, 1)),
]


def compiled(kernel: str, constants: dict[str, int], types: dict[str, str], capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = cuda.find_kernel(kernel)
    names = function.arg_names
    types = {name: "constexpr" if name in constants else (TYPES | types).get(name, FLOATS) for name in names}
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if types[name].startswith("*")},
    )
    options = {"num_warps": 4, "enable_fp_fusion": cuda.may_fuse(kernel)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90, 100], ids=["sm_80", "sm_90", "sm_100"])
def test_kernels_fit_into_registers(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel, constants, types in KERNELS:
        made = compiled(kernel, constants, types, capability)
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        used = subprocess.run(
            [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        )
        usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", used.stdout)}
        where = f"{kernel} {types} on sm_{capability}: {usage}"
        assert usage["LOCAL"] == usage["STACK"] == 0, where
        assert 0 < usage["REG"] <= MOST_REGISTERS, where


@pytest.mark.parametrize(
    ("types", "atomics"),
    [({}, {"v2.f32": 8}), (INTEGERS, {"u64": 16})],
)
def test_floats_are_added_two_at_a_time(
    types: dict[str, str], atomics: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both features of an entry at once, for each corner of a cell; in integers each by itself, and twice as wide."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled("encode_backward", FIELD, types, 90).asm["ptx"]
    found = re.findall(r"\b(?:atom|red)\.global[\w.]*\.add\.([\w.]+)", code)
    assert {name: found.count(name) for name in found} == atomics


def test_what_must_be_the_reference_bit_by_bit_is_not_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    march = compiled("march_write", WALK, {}, 90).asm["ptx"]
    assert "div.rn.f32" in march
    assert "div.full.f32" not in march
    assert "fma.rn" not in march
    assert "fma.rn" in compiled("composite", RAYS, {}, 90).asm["ptx"]
