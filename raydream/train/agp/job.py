"""From a command line to a fine-tuned AGP."""

import argparse
import functools
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace

import torch

from raydream.config import strict_json
from raydream.config.agp import AgpConfig
from raydream.config.checks import one_of
from raydream.diffusion import layout
from raydream.priors import find
from raydream.priors.agp import AgpDenoiser, check_same_prior
from raydream.store import tensors
from raydream.store.run_folder import RunFolder
from raydream.train import job
from raydream.train.agp.plan import report
from raydream.train.agp.samples import MemorySamples, SampleSource, check_kept, check_views
from raydream.train.agp.throughput import compare_throughput
from raydream.train.agp.train import AgpRequest, DataKind, check_settings, finetune_agp
from raydream.train.deepspeed import check_installed, read_deepspeed
from raydream.train.loop import Worker
from raydream.views.dataset import open_job

_LATENT_BYTES_IN_MEMORY = 4 * 2**30


def main(description: str, words: Sequence[str] | None = None) -> int:
    """The job; its exit code is ``job.run_job``'s."""
    return job.run_job(_parser(description), words, _run)


def _run(args: argparse.Namespace) -> int:
    if args.plan:
        print(report(args.workers if args.workers > 1 else 8))
        return 0
    if not (args.no_ray or args.benchmark):
        on_gpu = job.ray_on_gpu(args.device, args.workers)
        return _train_on_ray(_request(args, on_gpu), args.workers, on_gpu)
    device = job.device_here(args.device)
    request = _request(args, device.type == "cuda")
    if args.benchmark:
        return _benchmark(request, device)
    return job.train_here(functools.partial(_work, request=request), device, request.deepspeed is not None)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = job.make_parser(description, AgpConfig, out="outputs/agp", place="folder or URI")
    parser.add_argument(
        "--views", default="outputs/ccm", help="folder or URI of jobs/render_ccm.py, with ccm and alpha"
    )
    parser.add_argument("--prior", help="folder, alias or owner/name of the text-to-image prior to start from")
    parser.add_argument("--deepspeed", metavar="FILE|0|1|2|3", help="ZeRO by a DeepSpeed config or its stage")
    ways = ("auto", "memory", "stream")
    parser.add_argument(
        "--data", type=one_of(*ways), default="auto", metavar="|".join(ways), help="stream: by Ray Data"
    )
    parser.add_argument("--benchmark", action="store_true", help="time the job's steps against the bare model's")
    parser.add_argument("--plan", action="store_true", help="print memory by ZeRO stage and the cost of a large run")
    return parser


def _request(args: argparse.Namespace, on_gpu: bool) -> AgpRequest:
    """Everything that can be wrong is found here, before anything is started."""
    if not args.prior:
        raise ValueError("prior: name the text-to-image prior to start from (--prior FOLDER)")
    prior = find.resolve_prior(args.prior)
    latent_px = layout.latent_px(prior)
    config = _checked_start(job.read_settings(args, AgpConfig, lambda: _saved_config(args.out), _with_minutes))
    team_size = int(os.environ.get("WORLD_SIZE", "1")) if args.no_ray else args.workers
    deepspeed = read_deepspeed(args.deepspeed, config.stage, team_size, on_gpu) if args.deepspeed else None
    if deepspeed is not None:
        check_installed()
    view_config = check_views(args.views, latent_px)
    check_kept(args.views, config.data)
    bytes_needed = open_job(args.views)[1].num_objects * view_config.num_views * 4 * latent_px**2 * 2
    fits = bytes_needed <= _LATENT_BYTES_IN_MEMORY
    data: DataKind = "memory" if args.data == "memory" or (args.data == "auto" and fits) else "stream"
    if data == "stream" and args.no_ray:
        raise ValueError(f"data: {bytes_needed / 2**30:.1f} GiB of latents need Ray Data; run without --no-ray")
    request = AgpRequest(args.views, prior, args.out, config, deepspeed, data, latent_px, view_config)
    if job.is_first():
        _check_out(request)
    return request


def _with_minutes(config: AgpConfig, minutes: float) -> AgpConfig:
    return replace(config, stage=job.timed(config.stage, minutes))


def _checked_start(config: AgpConfig) -> AgpConfig:
    """The settings with the folders of an AGP and its prior to start from as absolute paths: workers run elsewhere."""
    if not config.start:
        return config
    try:
        start = find.resolve_agp(config.start)
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


def _train_on_ray(request: AgpRequest, workers: int, on_gpu: bool) -> int:
    from raydream.train.agp.stream import open_stream

    out, views = RunFolder.open(request.out).uri, job.absolute(request.views)
    datasets = {"views": open_stream(views)} if request.data == "stream" else None
    work = functools.partial(_work, request=replace(request, out=out, views=views))
    return job.train_on_ray(work, out, workers, on_gpu, datasets)


def _work(worker: Worker, *, request: AgpRequest) -> bool:
    """One worker's training; ``request.out`` must be reached by all of them."""
    with ExitStack() as stack:
        source: SampleSource
        if request.data == "stream":
            import ray.train

            from raydream.train.agp.stream import StreamSamples

            part, data = ray.train.get_dataset_shard("views"), request.config.data
            source = stack.enter_context(closing(StreamSamples(part, request.view_config, request.latent_px, data)))
        else:
            source = MemorySamples.read(request.views, request.latent_px, request.config.data)
        return finetune_agp(request, source, worker)


def _benchmark(request: AgpRequest, device: torch.device) -> int:
    torch.set_num_threads(request.config.num_threads)
    source = MemorySamples.read(request.views, request.latent_px, request.config.data)
    found = compare_throughput(request.config, request.prior, source, device)
    print(json.dumps({**asdict(found), "overhead": found.overhead}))
    return 0
