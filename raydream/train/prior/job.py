"""From a command line to a trained or measured prior: in this process, or by Ray Train on several workers."""

import argparse
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from raydream.config import strict_json
from raydream.config.train import StageSettings, TrainConfig
from raydream.store.faults import StorageError

_FAILED, _BAD_INPUT, _STOPPED = 1, 2, 130
_VAE_SHARE = 0.15
_NEVER_STOP: Callable[[], bool] = lambda: False  # noqa: E731
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class TrainRequest:
    """What a command line asked for."""

    views: str
    out: Path
    config: TrainConfig
    device: DeviceName
    workers: int


def main(description: str, words: Sequence[str] | None = None) -> int:
    """The job: its exit code is 0 when done, 2 for bad input, 1 where a storage is away and 130 when stopped; with the
    last two run it again to go on.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = _parser(description).parse_args(words)
    try:
        request = TrainRequest(args.views, Path(args.out), _config(args), args.device, args.workers)
        if args.pack:
            return _pack(request.views, Path(args.pack))
        if args.evaluate:
            return evaluate_prior(request)
        from raydream.train.prior.check import check_training  # torch only for what can be done

        request = replace(request, config=check_training(request.views, request.config, request.out))
        return _train_here(request) if args.no_ray else _train_on_ray(request)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return _BAD_INPUT
    except StorageError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return _FAILED


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--views", required=True, help="folder or URI of jobs/render_ccm.py, or a packed .zip")
    parser.add_argument("--out", default="outputs/prior", help="folder of this training; the same one again resumes it")
    parser.add_argument("--config", help="JSON file of settings; without it those in --out, else the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="one setting, e.g. seed=1")
    parser.add_argument("--minutes", type=float, help="length of the whole training instead of numbers of steps")
    parser.add_argument("--workers", type=int, default=1, help="processes of one Ray Train run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-ray", action="store_true", help="train in this process; Ray need not be installed")
    parser.add_argument("--evaluate", action="store_true", help="measure OUT/prior and write its model card")
    parser.add_argument("--pack", metavar="FILE.zip", help="write the views as one small file and stop")
    return parser


def _config(args: argparse.Namespace) -> TrainConfig:
    saved = Path(args.out) / "config.json"
    source = Path(args.config) if args.config else saved if saved.is_file() else None
    try:
        text = source.read_text(encoding="utf-8") if source else "{}"
    except OSError as error:
        raise ValueError(f"config: cannot be read ({error})") from error
    config = strict_json.apply_overrides(strict_json.loads(TrainConfig, text), args.set)
    if args.workers < 1:
        raise ValueError(f"workers: must be positive, got {args.workers}")
    return config if args.minutes is None else with_minutes(config, args.minutes)


def with_minutes(config: TrainConfig, minutes: float) -> TrainConfig:
    """The settings for a training of so many minutes: a part for the VAE, at most 12, the rest for the UNet."""
    if minutes <= 0:
        raise ValueError(f"minutes: must be positive, got {minutes}")
    vae_minutes = min(12.0, _VAE_SHARE * minutes)

    def timed(stage: StageSettings, share: float) -> StageSettings:
        return replace(stage, minutes=share, num_steps=10**9)

    return replace(
        config,
        vae=replace(config.vae, stage=timed(config.vae.stage, vae_minutes)),
        unet=replace(config.unet, stage=timed(config.unet.stage, minutes - vae_minutes)),
    )


def evaluate_prior(request: TrainRequest) -> int:
    """Measures ``out/prior`` by the gate, prints the table, writes ``gate.json``, the model card and a sheet of a
    hundred samples; 0 if it passes.
    """
    from raydream.train import gate
    from raydream.train.model_card import write_card
    from raydream.train.prior.checkpoint import read_tensors
    from raydream.train.prior.export import SHEET, save_sheet
    from raydream.train.prior.models import load_models
    from raydream.train.prior.train import PRIOR, make_sets
    from raydream.views.view_set import open_views

    folder = request.out / PRIOR
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"out: {request.out} has no {PRIOR}/ yet; train first")
    device, views = _device(request.device), open_views(request.views)
    models = load_models(folder, device)
    sets = make_sets(views, request.config, device, models.lexicon)
    results = gate.evaluate(models, sets.held_out_views, sets.held_out, request.config.gate)
    steps = {}
    for stage in ("vae", "unet"):
        checkpoint = request.out / f"{stage}.safetensors"
        if checkpoint.is_file():
            facts = read_tensors(checkpoint)[1]
            steps[stage] = f"{facts['step']:.0f} steps, {facts['elapsed_s'] / 60:.0f} minutes"
    save_sheet(models, request.config.gate, request.out / SHEET)
    write_card(folder, models.lexicon, views, sets.train, request.config, results, steps)
    print(gate.table(results))
    passed = results["passed"]
    assert isinstance(passed, dict)
    print(json.dumps(passed))
    return 0 if all(passed.values()) else 1


def _train_here(request: TrainRequest) -> int:
    from raydream.train.prior.train import train_prior
    from raydream.train.team import Team
    from raydream.views.view_set import open_views

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    done = train_prior(
        open_views(request.views), request.config, request.out, _device(request.device), Team(), _print, stop.is_set
    )
    print("done" if done else "stopped; the same command goes on", file=sys.stderr)
    return 0 if done else _STOPPED


def _train_on_ray(request: TrainRequest) -> int:
    from raydream.cluster.connection import connect
    from raydream.cluster.placement import Cluster, workers_on_gpu
    from raydream.train.workers import run_workers

    # absolute: a worker has another working directory
    views = request.views if "://" in request.views else str(Path(request.views).resolve())
    out = str(request.out.resolve())
    connect()
    on_gpu = workers_on_gpu(request.device, request.workers, Cluster.now())
    work = functools.partial(_work, views=views, out=out, config=strict_json.dumps(request.config))
    run_workers(work, out, request.workers, on_gpu)
    print("done", file=sys.stderr)
    return 0


def _work(_settings: Mapping[str, object] | None = None, *, views: str, out: str, config: str) -> None:
    """One Ray Train worker; ``out`` must be a path that all workers share."""
    import ray.train
    import ray.train.torch

    from raydream.train.prior.train import train_prior
    from raydream.train.team import Team
    from raydream.views.view_set import open_views

    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    settings, device = strict_json.loads(TrainConfig, config), ray.train.torch.get_device()
    train_prior(
        open_views(views), settings, Path(out), device, team, lambda row: ray.train.report(dict(row)), _NEVER_STOP
    )


def _device(name: DeviceName):  # type: ignore[no-untyped-def]
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _pack(source: str, path: Path) -> int:
    from raydream.views.view_set import PACK_SUFFIX, open_views, pack

    if path.suffix != PACK_SUFFIX:
        raise ValueError(f"pack: must end in {PACK_SUFFIX}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"pack: there is no folder {path.parent}")
    print(f"{pack(open_views(source), path)} bytes in {path}")
    return 0


def _print(row: Mapping[str, float | str]) -> None:
    print(
        " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
        ),
        flush=True,
    )
