"""What this machine has for raydream, what it lacks, and what to do about that: ``raydream doctor``."""

import argparse
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from raydream import __version__
from raydream.console.finding import Finding
from raydream.console.gpu import gpu_findings

_MIN_PYTHON = (3, 11)
_MIN_FREE_GIB = 2.0  # a run of eight particles with its checkpoints, and a compiler's cache
_GIB = 2**30
# what each is for, and how it is had
OPTIONAL = {
    "triton": ("kernels on NVIDIA GPUs", "pip install 'raydream[cuda]'"),
    "deepspeed": ("ZeRO in finetune-agp", "DS_BUILD_OPS=0 pip install 'raydream[deepspeed]'"),
    "psycopg": ("the service's record in PostgreSQL", "pip install 'raydream[postgres]'"),
    "pxr": ("USDZ assets", "pip install 'raydream[usd]'"),
}


def main(description: str, words: Sequence[str] | None = None) -> int:
    """Prints a line for each finding and one for each remedy; 1 if something that every run needs is broken."""
    argparse.ArgumentParser(description=description).parse_args(words)
    logging.disable(logging.WARNING)  # what libraries say while they are looked at is told below in our words
    try:
        findings = examine()
    finally:
        logging.disable(logging.NOTSET)
    width = max(len(finding.name) for finding in findings) + 2
    for finding in findings:
        mark = "!!" if finding.is_broken else "- " if finding.remedy else "  "
        print(f"{mark} {finding.name:{width}}{finding.text}")
        if finding.remedy:
            print(f"   {'':{width}}-> {finding.remedy}")
    broken = [finding.name for finding in findings if finding.is_broken]
    print(f"broken: {', '.join(broken)}" if broken else "all that every run needs is here")
    return 1 if broken else 0


def examine() -> list[Finding]:
    """All findings, in the order in which a person would look; nothing is started and nothing is written."""
    lacking = missing_packages()
    if lacking is not None:
        return [_python(), lacking]
    torch = _torch()
    if torch.is_broken:
        return [_python(), torch]
    looks = (_kernels, _film, _priors, _weights, _assets, _disk, _ray)
    return [_python(), torch, _processor(), *gpu_findings(), *(look() for look in looks), *_extras()]


def missing_packages() -> Finding | None:
    """What the project says that it needs and this Python cannot find; None where all is there."""
    try:
        needed = importlib.metadata.requires("raydream") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        needed = []
    names = [re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0] for line in needed if "extra ==" not in line]
    missing = [name for name in names if not list(importlib.metadata.distributions(name=name))]
    if not missing:
        return None
    return Finding("packages", f"{', '.join(missing)} not found", f"pip install {' '.join(missing)}", is_broken=True)


def _python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable}), raydream {__version__}"
    if sys.version_info >= _MIN_PYTHON:
        return Finding("python", text)
    return Finding("python", text, f"use Python {'.'.join(map(str, _MIN_PYTHON))} or newer", is_broken=True)


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # a build for another machine, a library that is missing
        return Finding("torch", f"cannot be imported: {error}", "install it again, see pytorch.org", is_broken=True)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding("torch", f"{torch.__version__} ({build})")


def _processor() -> Finding:
    import torch

    from raydream.precision import has_fast_bfloat16

    fast = has_fast_bfloat16(torch.device("cpu"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = "bfloat16 in hardware" if fast else "bfloat16 not in hardware: float32 is used"
    return Finding("processor", f"{cores} cores ({platform.machine()}), {words}")


def _kernels() -> Finding:
    from raydream.backend import load_backend
    from raydream.device import own_device

    device = own_device().type
    try:
        name = load_backend("auto", device).name
    except (ValueError, ImportError, OSError) as error:
        return Finding("kernels", f"cannot be loaded: {error}", "pip install --force-reinstall numba", is_broken=True)
    slow = name == "reference"
    remedy = "pip install 'raydream[cuda]'" if device == "cuda" else "pip install numba"
    return Finding("kernels", f"{name} on {device}", remedy if slow else "")


def _film() -> Finding:
    try:
        import imageio_ffmpeg

        return Finding("ffmpeg", imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        remedy = "install ffmpeg, or name one by IMAGEIO_FFMPEG_EXE; runs leave meshes and pictures meanwhile"
        return Finding("ffmpeg", "none: no films", remedy)


def _priors() -> Finding:
    from raydream.priors import find

    try:
        find.resolve_prior(find.EMBEDDED.name)
        find.resolve_agp(find.EMBEDDED.name)
    except ValueError as error:
        remedy = "install raydream again; in a checkout: git checkout raydream/priors"
        return Finding("priors", f"what ships is damaged: {error}", remedy, is_broken=True)
    return Finding("priors", "those that ship are whole")


def _weights() -> Finding:
    """Of the preset for GPUs; those of others are found in the same way when a run names them."""
    from raydream.config.presets import make_preset
    from raydream.priors import find

    source = make_preset("sd21", None).prior.source
    try:
        return Finding("weights", f"{source} for --preset sd21: {find.resolve_prior(source)}")
    except ValueError as error:
        what, _, _ = str(error).removeprefix("prior: ").partition("; ")
        remedy = f"hf download {find.ALIASES[source][0]}, or --set prior.allow_download=true"
        return Finding("weights", f"{what}; --preset sd21 needs it", remedy)


def _assets() -> Finding:
    from raydream.assets.exhibit import ASSETS_VARIABLE, asset_folder

    try:
        folder = asset_folder(None)
    except ValueError as error:
        what, _, remedy = str(error).partition("; ")
        return Finding("assets", what, f"{remedy}, or unset {ASSETS_VARIABLE}", is_broken=True)
    if folder is None:
        remedy = f"name a folder of 3D files by --assets or {ASSETS_VARIABLE} for an exhibit of real ones"
        return Finding("assets", "those that raydream makes itself", remedy)
    return Finding("assets", str(folder))


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / _GIB
    remedy = "" if free_gib >= _MIN_FREE_GIB else f"a run wants {_MIN_FREE_GIB:g} GiB; give --out on another disk"
    return Finding("disk", f"{free_gib:.1f} GiB free in {Path.cwd()}", remedy)


def _ray() -> Finding:
    try:
        from raydream.cluster.connection import ADDRESS, check_address
    except ImportError as error:
        remedy = "pip install 'ray[train,serve]', or run with --runtime local"
        return Finding("ray", f"cannot be imported: {error}", remedy, is_broken=True)
    version = importlib.metadata.version("ray")
    try:
        address = check_address()
    except ValueError as error:
        what, _, remedy = str(error).partition("; ")
        return Finding("ray", f"{version}; {what}", remedy, is_broken=True)
    where = f"a cluster answers at {ADDRESS}={address}" if address else "runs start one of their own here"
    return Finding("ray", f"{version}; {where}")


def _extras() -> list[Finding]:
    from raydream.backend import PACKAGE_COMMANDS

    kernels = {name: (f"kernels of cluster.kernels={name}", command) for name, command in PACKAGE_COMMANDS.items()}
    return [
        Finding(name, what) if find_spec(name) else Finding(name, f"not installed: {what}", remedy)
        for name, (what, remedy) in (OPTIONAL | kernels).items()
    ]
