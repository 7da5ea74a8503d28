"""From a command line to a fine-tuned AGP: in this process, under torchrun, or by Ray Train on several workers."""

import argparse
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as distributed

from raydream.config import strict_json
from raydream.config.agp import AgpConfig
from raydream.config.render import ViewConfig
from raydream.diffusion import layout
from raydream.priors import find
from raydream.priors.agp import AgpDenoiser, check_same_prior, read_facts
from raydream.store import tensors
from raydream.store.faults import StorageError
from raydream.store.run_folder import RunFolder
from raydream.train.agp.plan import report
from raydream.train.agp.samples import MemorySamples, SampleSource, check_kept, check_views
from raydream.train.agp.throughput import compare_throughput
from raydream.train.agp.train import AgpSession, check_settings, finetune_agp
from raydream.train.deepspeed import DeepSpeedMaker, check_installed, read_deepspeed
from raydream.train.engine import EngineMaker, PlainEngine
from raydream.train.loop import MetricsSink
from raydream.train.team import Team
from raydream.views.dataset import open_views

_FAILED, _BAD_INPUT, _STOPPED = 1, 2, 130
_LATENT_BYTES_IN_MEMORY = 4 * 2**30
DataKind = Literal["memory", "stream"]


@dataclass(frozen=True)
class AgpRequest:
    """A checked request: nothing in it can fail for a mistake of the user's. ``deepspeed`` is None without it."""

    views: str
    prior: Path
    out: str
    config: AgpConfig
    deepspeed: Mapping[str, Any] | None
    data: DataKind
    latent_px: int
    view_config: ViewConfig

    @property
    def make_engine(self) -> EngineMaker:
        return PlainEngine if self.deepspeed is None else DeepSpeedMaker(self.deepspeed)


def main(description: str, words: Sequence[str] | None = None) -> int:
    """The job: its exit code is 0 when done, 2 for bad input, 1 where a storage is away and 130 when stopped; with the
    last two run it again to go on.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = _parser(description).parse_args(words)
    try:
        if args.plan:
            print(report(args.workers if args.workers > 1 else 8))
            return 0
        on_gpu = _on_gpu(args)
        request = _request(args, on_gpu)
        if args.benchmark:
            return _benchmark(request, torch.device("cuda" if on_gpu else "cpu"))
        if args.no_ray:
            return _train_here(request, torch.device("cuda" if on_gpu else "cpu"))
        return _train_on_ray(request, args.workers, on_gpu)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return _BAD_INPUT
    except StorageError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return _FAILED


def _parser(description: str) -> argparse.ArgumentParser:
    fields = ", ".join(strict_json.field_names(AgpConfig))
    parser = argparse.ArgumentParser(description=description, epilog=f"settings: {fields}")
    parser.add_argument(
        "--views", default="outputs/ccm", help="folder or URI of jobs/render_ccm.py, with ccm and alpha"
    )
    parser.add_argument("--prior", help="folder, alias or owner/name of the text-to-image prior to start from")
    parser.add_argument("--out", default="outputs/agp", help="run folder or URI; the same one again resumes it")
    parser.add_argument("--config", help="JSON file of settings; without it those in --out, else the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="one setting, e.g. seed=1")
    parser.add_argument("--minutes", type=float, help="length of the training instead of a number of steps")
    parser.add_argument("--workers", type=int, default=1, help="processes of one Ray Train run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--deepspeed", metavar="FILE|0|1|2|3", help="ZeRO by a DeepSpeed config or its stage")
    parser.add_argument("--data", choices=("auto", "memory", "stream"), default="auto", help="stream: by Ray Data")
    parser.add_argument("--no-ray", action="store_true", help="train in this process, or as one of torchrun's")
    parser.add_argument("--benchmark", action="store_true", help="time the job's steps against the bare model's")
    parser.add_argument("--plan", action="store_true", help="print memory by ZeRO stage and the cost of a large run")
    return parser


def _request(args: argparse.Namespace, on_gpu: bool) -> AgpRequest:
    """Everything that can be wrong is found here, before anything is started."""
    if args.workers < 1:
        raise ValueError(f"workers: must be positive, got {args.workers}")
    if not args.prior:
        raise ValueError("prior: name the text-to-image prior to start from (--prior FOLDER)")
    prior = find.resolve_prior(args.prior)
    latent_px = layout.latent_px(prior)
    config = _checked_start(_config(args))
    team_size = int(os.environ.get("WORLD_SIZE", "1")) if args.no_ray else args.workers
    deepspeed = read_deepspeed(args.deepspeed, config.stage, team_size, on_gpu) if args.deepspeed else None
    if deepspeed is not None:
        check_installed()
    view_config = check_views(args.views, latent_px)
    check_kept(args.views, config.data)
    bytes_needed = open_views(args.views)[1].num_objects * view_config.num_views * 4 * latent_px**2 * 2
    fits = bytes_needed <= _LATENT_BYTES_IN_MEMORY
    data: DataKind = "memory" if args.data == "memory" or (args.data == "auto" and fits) else "stream"
    if data == "stream" and args.no_ray:
        raise ValueError(f"data: {bytes_needed / 2**30:.1f} GiB of latents need Ray Data; run without --no-ray")
    request = AgpRequest(args.views, prior, args.out, config, deepspeed, data, latent_px, view_config)
    _check_out(request)
    return request


def _config(args: argparse.Namespace) -> AgpConfig:
    try:
        text = Path(args.config).read_text(encoding="utf-8") if args.config else _saved_config(args.out)
    except OSError as error:
        raise ValueError(f"config: cannot be read ({error})") from error
    config = strict_json.apply_overrides(strict_json.loads(AgpConfig, text), args.set)
    if args.minutes is None:
        return config
    if args.minutes <= 0:
        raise ValueError(f"minutes: must be positive, got {args.minutes}")
    return replace(config, stage=replace(config.stage, minutes=args.minutes, num_steps=10**9))


def _checked_start(config: AgpConfig) -> AgpConfig:
    """The settings with the folders of an AGP and its prior to start from as absolute paths: workers run elsewhere."""
    if not config.start:
        return config
    try:
        start = find.resolve_agp(config.start)
        read_facts(start)
    except ValueError as error:
        raise ValueError(f"start: {str(error).removeprefix('agp: ')}") from error
    try:
        start_prior = find.resolve_prior(config.start_prior)
    except ValueError as error:
        raise ValueError(f"start_prior: {str(error).removeprefix('prior: ')}") from error
    return replace(config, start=str(start), start_prior=str(start_prior))


def _saved_config(out: str) -> str:
    try:
        return RunFolder.open(out).read_config()
    except ValueError:
        return "{}"


def _check_out(request: AgpRequest) -> None:
    """Makes a new run folder, or makes sure that the one that is there can go on from this prior."""
    try:
        run = RunFolder.open(request.out)
    except ValueError:
        run = RunFolder.create(request.out, strict_json.dumps(request.config))
    check_settings(request.config, run)
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        content = run.read_checkpoint_file(checkpoint.step, min(checkpoint.files))
        own = AgpDenoiser.from_prior(request.prior, request.config.model.rank, 0, torch.device("cpu"))
        saved = tensors.unpack(content)[1]["prior_sha256"]
        check_same_prior(saved, own.facts.prior_sha256, f"out: the checkpoint in {request.out}")


def _on_gpu(args: argparse.Namespace) -> bool:
    if args.no_ray or args.benchmark:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: torch sees no CUDA device here")
        return args.device != "cpu" and torch.cuda.is_available()
    from raydream.cluster.connection import connect
    from raydream.cluster.placement import Cluster, workers_on_gpu

    connect()
    return workers_on_gpu(args.device, args.workers, Cluster.now())


def _train_here(request: AgpRequest, device: torch.device) -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    elif request.deepspeed is not None:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    team = Team(distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else Team()
    try:
        source = MemorySamples.read(request.views, request.latent_px, request.config.data)
        report_row = _print if team.rank == 0 else _say_nothing
        done = _train(request, source, device, team, report_row, stop)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    print("done" if done else "stopped; the same command goes on", file=sys.stderr)
    return 0 if done else _STOPPED


def _train(
    request: AgpRequest,
    source: SampleSource,
    device: torch.device,
    team: Team,
    tell: MetricsSink,
    stop: threading.Event,
) -> bool:
    session = AgpSession(
        RunFolder.open(request.out), request.prior, request.view_config, source, device, team, request.make_engine,
        tell, stop.is_set,
    )  # fmt: skip
    return finetune_agp(request.config, session)


def _train_on_ray(request: AgpRequest, workers: int, on_gpu: bool) -> int:
    from raydream.cluster.connection import connect
    from raydream.train.agp.stream import open_stream
    from raydream.train.workers import run_workers

    connect()  # before the stream is opened, which would start Ray in its own way
    out = RunFolder.open(request.out).uri  # absolute: a worker has another working directory
    views = request.views if "://" in request.views else str(Path(request.views).resolve())
    work = functools.partial(_work, request=replace(request, out=out, views=views))
    datasets = {"views": open_stream(views)} if request.data == "stream" else None
    run_workers(work, out, workers, on_gpu, datasets)
    print("done", file=sys.stderr)
    return 0


def _work(_settings: Mapping[str, object] | None = None, *, request: AgpRequest) -> None:
    """One Ray Train worker; ``request.out`` must be reached by all of them."""
    import ray.train
    import ray.train.torch

    from raydream.train.agp.stream import StreamSamples

    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    with ExitStack() as stack:
        source: SampleSource
        if request.data == "stream":
            part, data = ray.train.get_dataset_shard("views"), request.config.data
            source = stack.enter_context(closing(StreamSamples(part, request.view_config, request.latent_px, data)))
        else:
            source = MemorySamples.read(request.views, request.latent_px, request.config.data)
        _train(request, source, device, team, lambda row: ray.train.report(dict(row)), threading.Event())


def _benchmark(request: AgpRequest, device: torch.device) -> int:
    torch.set_num_threads(request.config.num_threads)
    source = MemorySamples.read(request.views, request.latent_px, request.config.data)
    found = compare_throughput(request.config, request.prior, source, device)
    print(json.dumps({**asdict(found), "overhead": found.overhead}))
    return 0


def _print(row: Mapping[str, float | int | str]) -> None:
    parts = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items())
    print(" ".join(parts), flush=True)


def _say_nothing(row: Mapping[str, float | int | str]) -> None:
    return None
