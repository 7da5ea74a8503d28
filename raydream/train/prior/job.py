"""From a command line to a trained or measured prior."""

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from raydream.config.train import TrainConfig
from raydream.train import job

if TYPE_CHECKING:
    from raydream.train.loop import Worker

_VAE_SHARE = 0.15


def main(description: str, words: Sequence[str] | None = None) -> int:
    """The job; its exit code is ``job.run_job``'s."""
    return job.run_job(_parser(description), words, _run)


def _run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    config = job.read_settings(args, TrainConfig, lambda: _saved(out), with_minutes)
    if args.pack:
        return _pack(args.views, Path(args.pack))
    if args.evaluate:
        return _evaluate(args.views, out, config, args.device)
    from raydream.train.prior.check import check_training  # torch only for what can be done

    config = check_training(args.views, config, out if job.is_first() else None)
    if args.no_ray:
        work = functools.partial(_work, views=args.views, config=config, out=out)
        return job.train_here(work, job.device_here(args.device))
    return _train_on_ray(args.views, out.resolve(), config, args.device, args.workers)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = job.make_parser(description, TrainConfig, out="outputs/prior")
    parser.add_argument("--views", required=True, help="folder or URI of jobs/render_ccm.py, or a packed .zip")
    parser.add_argument("--evaluate", action="store_true", help="measure OUT/prior and write its model card")
    parser.add_argument("--pack", metavar="FILE.zip", help="write the views as one small file and stop")
    return parser


def _saved(out: Path) -> str:
    path = out / "config.json"
    return path.read_text(encoding="utf-8") if path.is_file() else "{}"


def with_minutes(config: TrainConfig, minutes: float) -> TrainConfig:
    """The settings for a training of so many minutes: a part for the VAE, at most 12, the rest for the UNet."""
    vae_minutes = min(12.0, _VAE_SHARE * minutes)
    return replace(
        config,
        vae=replace(config.vae, stage=job.timed(config.vae.stage, vae_minutes)),
        unet=replace(config.unet, stage=job.timed(config.unet.stage, minutes - vae_minutes)),
    )


def _evaluate(source: str, out: Path, config: TrainConfig, device_name: job.DeviceName) -> int:
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

    folder = out / PRIOR
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"out: {out} has no {PRIOR}/ yet; train first")
    device, views = job.device_here(device_name), open_views(source)
    models = load_models(folder, device)
    sets = make_sets(views, config, device, models.lexicon)
    results = gate.evaluate(models, sets.held_out_views, sets.held_out, config.gate)
    steps = {}
    for stage in ("vae", "unet"):
        checkpoint = out / f"{stage}.safetensors"
        if checkpoint.is_file():
            facts = read_tensors(checkpoint)[1]
            steps[stage] = f"{facts['step']:.0f} steps, {facts['elapsed_s'] / 60:.0f} minutes"
    save_sheet(models, config.gate, out / SHEET)
    write_card(folder, models.lexicon, views, sets.train, config, results, steps)
    print(gate.table(results))
    print(json.dumps(results["passed"]))
    return 0 if all(results["passed"].values()) else 1


def _train_on_ray(views: str, out: Path, config: TrainConfig, device: job.DeviceName, workers: int) -> int:
    on_gpu = job.ray_on_gpu(device, workers)
    work = functools.partial(_work, views=job.absolute(views), config=config, out=out)
    return job.train_on_ray(work, str(out), workers, on_gpu)


def _work(worker: "Worker", *, views: str, config: TrainConfig, out: Path) -> bool:
    """One worker's training; ``out`` must be a path that all workers share."""
    from raydream.train.prior.train import train_prior
    from raydream.views.view_set import open_views

    return train_prior(open_views(views), config, out, worker)


def _pack(source: str, path: Path) -> int:
    from raydream.views.view_set import PACK_SUFFIX, open_views, pack

    if path.suffix != PACK_SUFFIX:
        raise ValueError(f"pack: must end in {PACK_SUFFIX}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"pack: there is no folder {path.parent}")
    print(f"{pack(open_views(source), path)} bytes in {path}")
    return 0
