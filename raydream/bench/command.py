"""The benchmark's command line: which measurements, how long, and where the figures go."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from raydream.bench.figures import CallCount
from raydream.bench.particle_step import StepComparison, StepSetting, compare_steps
from raydream.bench.report import show, to_json
from raydream.config.checks import one_of
from raydream.config.presets import PRESETS

# What an actor gets at its start (see ``ray_runtime.actor_environment``); the allocator reads it only then.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}

_LOG_COLUMNS = 130

QUICK_RUN = (
    "prior.exhibit.assets=procedural",
    "prior.image_px=16",
    "prior.exhibit.num_modes=2",
    "prior.exhibit.supersample=1",
    "stages.0.camera.image_px=16",
    "stages.0.camera.views_per_particle=1",
    "stages.0.learner.unet_channels=[16,16]",
    "stages.0.scene.samples_per_diagonal=16",
)


def main(description: str, words: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and writes ``--out``; returns the process's exit code."""
    args = _parser(description).parse_args(words)
    console = Console(width=None if sys.stdout.isatty() else _LOG_COLUMNS)
    comparisons = measure_steps(args.quick, args.rounds) if "step" in args.parts else []
    costs = []
    if "run" in args.parts:
        from raydream.bench.whole_run import sweep  # all that a run needs, which a box for kernels need not have

        numbers = (1, 2) if args.quick else tuple(args.n)
        costs = sweep(numbers, 4 if args.quick else args.steps, args.runtime, QUICK_RUN if args.quick else ())
    counts: list[CallCount] = []
    if "launches" in args.parts:
        from raydream.bench.launches import count_elsewhere  # which takes triton, diffusers and a prior

        counts = [row for preset in args.presets for row in count_elsewhere(preset)]
    show(console, comparisons, costs, counts)
    if args.out:
        Path(args.out).write_text(to_json(comparisons, costs, counts), encoding="utf-8")
    return 0


def _parser(description: str) -> argparse.ArgumentParser:
    """The flags of the benchmark."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parts, runtimes = ("step", "run", "launches"), ("ray", "local")
    parser.add_argument(
        "--parts", nargs="+", type=one_of(*parts), default=parts[:2], metavar="|".join(parts), help="what to measure"
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        type=one_of(*PRESETS),
        default=["sd21", "embedded", "exhibit"],
        help="whose launches to count",
    )
    parser.add_argument("--rounds", type=int, default=12, help="steps on each backend in each setting (default 12)")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of particles of the runs")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run (default 20)")
    parser.add_argument(
        "--runtime",
        type=one_of(*runtimes),
        default="ray",
        metavar="|".join(runtimes),
        help="local: all in this process",
    )
    parser.add_argument("--quick", action="store_true", help="everything in little, to see that it works")
    parser.add_argument("--out", help="a JSON file for the figures")
    return parser


def measure_steps(quick: bool, rounds: int) -> list[StepComparison]:
    """Plain torch against the fast kernels of this machine's devices; fewer rounds where nothing is skipped."""
    import torch

    pairs = [("cpu", ("reference", "numba"))]
    if torch.cuda.is_available():
        pairs.append(("cuda", ("reference", "cuda")))
    if quick:
        return [compare_steps(StepSetting("ball", "off", 8, 16, 1), names, device, 1) for device, names in pairs]
    settings = [StepSetting("ball", "off"), StepSetting("ball", "on"), StepSetting("ball", "off", 64, 128)]
    settings += [StepSetting("ball", "off", 64, 96, 1), StepSetting("full", "off"), StepSetting("full", "on")]
    return [
        compare_steps(setting, names, device, rounds if setting.grid == "ball" else max(rounds // 3, 2))
        for device, names in pairs
        for setting in settings
    ]


def start_as_an_actor_does() -> None:
    """Starts this process anew with the environment of an actor, unless it has it: one thread, the same allocator."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
