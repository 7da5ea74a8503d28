"""What every part of the first minutes on a GPU works with: sizes, a clock, the rate that others are shares of."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from raydream.bench import sd21
from raydream.diffusion.tally import tally

Found = dict[str, Any]  # JSON; filled on the way, so that a part that is cut short keeps what it has


@dataclass(frozen=True)
class Sizes:
    """How large everything is: as on a GPU, or so small that a CPU goes through the whole script."""

    matrix: int
    copy_bytes: int
    samples: tuple[int, ...]
    image_px: int
    samples_per_diagonal: int
    log2_table_size: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    latent_px: int
    text_width: int
    batches: tuple[int, ...]
    particles: tuple[int, ...]
    repeats: int


FULL = Sizes(
    8192, 2**30, (1_000_000, 5_000_000, 20_000_000), 512, 512, 19,
    sd21.SD21_UNET, sd21.SD21_VAE, 64, sd21.SD21_UNET["cross_attention_dim"], (1, 8, 16), (1, 2, 4, 8), 5,
)  # fmt: skip
_TINY = {"norm_num_groups": 8, "layers_per_block": 1}
SMALL = Sizes(
    64, 2**16, (500,), 16, 16, 8,
    {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    } | _TINY,
    sd21.SD21_VAE | {"block_out_channels": [8] * 4} | _TINY,
    8, 16, (1, 2), (1, 2), 1,
)  # fmt: skip


@dataclass
class Bench:
    """``bf16_tflops`` is the measured rate that others are told as shares of; 0 where it was not measured."""

    device: torch.device
    is_small: bool
    bf16_tflops: float = 0.0
    views: dict[str, str] = field(default_factory=dict)  # to train on, by model; a packed set or a folder
    settings: dict[str, str] = field(default_factory=dict)  # files of settings of the trainings, by model
    out: str = "."
    seconds: float = 0.0  # of the part that runs

    @property
    def sizes(self) -> Sizes:
        return SMALL if self.is_small else FULL

    @property
    def half(self) -> torch.dtype:
        """The half precision that all that is frozen has; a CPU's is emulated and bfloat16's alone complete."""
        return torch.float16 if self.device.type == "cuda" else torch.bfloat16

    def seconds_of(self, work: Callable[[], object], repeats: int = 0) -> float:
        """The median time of a call once it has been called: by events on a GPU, by the clock elsewhere."""
        work()
        return statistics.median(self._one(work) for _ in range(repeats or self.sizes.repeats))

    def rate(self, tflop: float, seconds: float) -> Found:
        """Operations a second, and as a share of a measured product's."""
        tflops = tflop / seconds
        share = {"share": round(tflops / self.bf16_tflops, 4)} if self.bf16_tflops else {}
        return {"ms": round(1e3 * seconds, 3), "tflops": float(f"{tflops:.4g}")} | share

    def peak_gib(self, work: Callable[[], object]) -> float | None:
        """The most that torch held on a GPU during a call; None where there is none."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def _one(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def tflop_of(work: Callable[[], object]) -> float:
    """Of a piece of work on meta tensors, matrix products and convolutions: the same minimum for everybody."""
    return tally(work, []).flops / 1e12
