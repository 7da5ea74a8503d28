"""The skeleton of a training job: from a command line to a training here, under torchrun, or by Ray Train."""

import argparse
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from raydream.config import strict_json
from raydream.config.checks import one_of
from raydream.config.train import StageSettings
from raydream.store.faults import StorageError

if TYPE_CHECKING:
    import torch
    from ray.data import Dataset

    from raydream.train.loop import MetricsRow, Worker

FAILED, BAD_INPUT, STOPPED = 1, 2, 130
DeviceName = Literal["auto", "cpu", "cuda"]
ConfigT = TypeVar("ConfigT")
Work = Callable[["Worker"], bool]  # one worker's part of a training; False where it had to stop before the end


def run_job(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, answer: Callable[[argparse.Namespace], int]
) -> int:
    """A job's exit code: 0 when done, 2 for bad input, 1 where a storage is away and 130 when stopped; with the last
    two run it again to go on.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = parser.parse_args(words)
    try:
        return answer(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except StorageError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return FAILED


def make_parser(description: str, config: type, out: str, place: str = "folder") -> argparse.ArgumentParser:
    """The options that all training jobs have; ``config`` is the class of their settings, ``place`` what OUT may be."""
    fields = ", ".join(strict_json.field_names(config))
    parser = argparse.ArgumentParser(description=description, epilog=f"settings: {fields}")
    parser.add_argument("--out", default=out, help=f"{place} of this training; the same one again resumes it")
    parser.add_argument("--config", help="JSON file of settings; without it those in --out, else the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="one setting, e.g. seed=1")
    parser.add_argument("--minutes", type=float, help="length of the whole training instead of a number of steps")
    parser.add_argument("--workers", type=int, default=1, help="processes of one Ray Train run")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", metavar="auto|cpu|cuda")
    parser.add_argument(
        "--no-ray", action="store_true", help="train in this process without Ray, or as one of torchrun's"
    )
    return parser


def read_settings(
    args: argparse.Namespace,
    kind: type[ConfigT],
    saved: Callable[[], str],
    with_minutes: Callable[[ConfigT, float], ConfigT],
) -> ConfigT:
    """The settings that a command line asks for; ``saved`` are those that its folder has, as JSON."""
    if args.workers < 1:
        raise ValueError(f"workers: must be positive, got {args.workers}")
    try:
        text = Path(args.config).read_text(encoding="utf-8") if args.config else saved()
    except OSError as error:
        raise ValueError(f"config: cannot be read ({error})") from error
    config = strict_json.apply_overrides(strict_json.loads(kind, text), args.set)
    return config if args.minutes is None else with_minutes(config, args.minutes)


def timed(stage: StageSettings, minutes: float) -> StageSettings:
    """A stage of so many minutes, whatever number of steps they give."""
    if minutes <= 0:
        raise ValueError(f"minutes: must be positive, got {minutes:g} for a stage")
    return replace(stage, minutes=minutes, num_steps=10**9)


def is_first() -> bool:
    """Whether this is torchrun's first process, or one of its own: the one that makes folders and judges them."""
    return os.environ.get("RANK", "0") == "0"


def absolute(path: str) -> str:
    """A path or URI as a worker reads it, whose working directory is another."""
    return path if "://" in path else str(Path(path).resolve())


def device_here(name: DeviceName) -> "torch.device":
    """The device of this process; ValueError naming ``device`` where it has no such one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no CUDA device here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def ray_on_gpu(name: DeviceName, workers: int) -> bool:
    """Whether Ray's workers, which must find room, take GPUs; joins the cluster or starts one."""
    from raydream.cluster.connection import connect
    from raydream.cluster.placement import Cluster, workers_on_gpu

    connect()
    return workers_on_gpu(name, workers, Cluster.now())


def train_here(work: Work, device: "torch.device", needs_group: bool = False) -> int:
    """Trains in this process, or as one of torchrun's; ``needs_group`` sets ``torch.distributed`` up for one, too."""
    import torch
    from torch import distributed

    from raydream.train.loop import Worker
    from raydream.train.team import Team

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    elif needs_group:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    team = Team(distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else Team()
    try:
        done = work(Worker(device, team, _print if team.rank == 0 else _say_nothing, stop.is_set))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    print("done" if done else "stopped; the same command goes on", file=sys.stderr)
    return 0 if done else STOPPED


def train_on_ray(
    work: Work, out: str, workers: int, on_gpu: bool, datasets: "Mapping[str, Dataset] | None" = None
) -> int:
    """Trains by Ray Train; ``out``, absolute, must be reached by all workers."""
    from raydream.train.workers import run_workers

    run_workers(functools.partial(_work_for_ray, work), out, workers, on_gpu, datasets)
    print("done", file=sys.stderr)
    return 0


def _work_for_ray(work: Work) -> None:
    import ray.train
    import ray.train.torch

    from raydream.train.loop import Worker
    from raydream.train.team import Team

    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    work(Worker(ray.train.torch.get_device(), team, lambda row: ray.train.report(dict(row)), lambda: False))


def _print(row: "MetricsRow") -> None:
    parts = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items())
    print(" ".join(parts), flush=True)


def _say_nothing(row: "MetricsRow") -> None:
    return None
