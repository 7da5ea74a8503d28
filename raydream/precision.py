"""Where bfloat16 arithmetic pays: a setting, or what the machine says."""

import contextlib

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have hardware behind them (AVX512-BF16 or AMX on a CPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def arithmetic(bfloat16: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context whose matrix products are bfloat16 for "on", or for "auto" where that is fast; parameters stay
    float32.
    """
    if bfloat16 == "on" or (bfloat16 == "auto" and has_fast_bfloat16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
