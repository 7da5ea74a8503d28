"""Where bfloat16 arithmetic pays: a setting, or what the machine says."""

import contextlib
from collections.abc import Iterator

import torch

_TENSOR_CORES = (7, 0)  # the first compute capability that has them: V100 and T4 for float16, A100 for bfloat16 too


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have hardware behind them (AVX512-BF16 or AMX on a CPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fast_dtype(device: torch.device) -> torch.dtype:
    """The half precision that a device has hardware for, else float32; rather bfloat16, whose range is float32's."""
    if has_fast_bfloat16(device):
        return torch.bfloat16
    has_float16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TENSOR_CORES
    return torch.float16 if has_float16 else torch.float32


def memory_format(dtype: torch.dtype, device: torch.device) -> torch.memory_format:
    """How a network's images lie in memory: tensor cores take a half precision's channels last."""
    is_half = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return torch.channels_last if is_half else torch.contiguous_format


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Inside, a GPU rounds the factors of float32 products to 10 bits: a network bears that, a ray would not."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def arithmetic(bfloat16: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context whose matrix products are bfloat16 for "on", or for "auto" where that is fast; parameters stay
    float32.
    """
    if bfloat16 == "on" or (bfloat16 == "auto" and has_fast_bfloat16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
