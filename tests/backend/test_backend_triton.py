"""The Triton kernels without a GPU: the seam imports, and triton's interpreter agrees with the reference."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from raydream.backend.cuda import CudaBackend
from raydream.types import Backend

pytestmark = pytest.mark.slow

CHECK = """
import torch
from jaxtyping import install_import_hook
install_import_hook("raydream", "beartype.beartype")
from backend_cases import summed_kernels, worst_difference
from raydream.backend.cuda import CudaBackend
for dtype in (torch.float32, torch.float64):
    print(worst_difference(CudaBackend(), dtype, "cpu"))
"""


def test_cuda_backend_imports_without_triton_and_cuda() -> None:
    assert isinstance(CudaBackend(), Backend)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels")
def test_interpreted_kernels_are_the_reference() -> None:
    """In a process of its own: triton decides at its import whether it interprets."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests/support"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    float32, float64 = map(float, done.stdout.split())
    assert float32 < 4e-6  # measured 7e-7
    assert float64 < 1e-7  # measured 5e-9: the series for small optical depths is cut where float32 ends
