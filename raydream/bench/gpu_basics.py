"""The first parts on a GPU: what card this is, what it can do at best, and whether our kernels are right on it."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from raydream import __version__
from raydream.backend import PACKAGE_COMMANDS, load_backend
from raydream.backend.layout import make_hash_grid_layout
from raydream.bench.parts import Bench, Found
from raydream.camera import camera_rays, orbit_cameras
from raydream.types import Backend, RaySamples

_PACKAGES = ("torch", "triton", "diffusers", "peft", "transformers", "jaxtyping", "nerfacc", "tinycudann", "nvdiffrast")
_TESTS = Path(__file__).parents[2] / "tests" / "gpu"


def card(bench: Bench, found: Found) -> None:
    """Versions, and what torch and the driver say of the card."""
    found |= {"raydream": __version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if bench.device.type != "cuda":
        found["device"] = f"{bench.device.type} ({platform.machine()})"
        return
    about = torch.cuda.get_device_properties(bench.device)
    found |= {"device": about.name, "gib": round(about.total_memory / 2**30, 1), "sm": f"{about.major}.{about.minor}"}
    found["multiprocessors"] = about.multi_processor_count
    query = "driver_version,clocks.max.sm,power.limit,mig.mode.current"
    told = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    found["driver, clock, power, mig"] = told.stdout.strip()


def rates(bench: Bench, found: Found) -> None:
    """Square products in each precision, and copies: what all shares are shares of."""
    size, device = bench.sizes.matrix, bench.device
    settings = [("float32", torch.float32, False), ("tf32", torch.float32, True)]
    settings += [("float16", torch.float16, False), ("bfloat16", torch.bfloat16, False)]
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in settings:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = bench.seconds_of(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        found[name] = {"ms": round(1e3 * seconds, 3), "tflops": round(2e-12 * size**3 / seconds, 3)}
    torch.backends.cuda.matmul.allow_tf32 = before
    bench.bf16_tflops = found["bfloat16"]["tflops"]
    number = bench.sizes.copy_bytes
    here, there = torch.empty(number, dtype=torch.uint8), torch.empty(number, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    ways = {"to device": lambda: there.copy_(here), "to host": lambda: here.copy_(there)}
    if device.type == "cuda":
        pinned = here.pin_memory()
        ways["to device, pinned"] = lambda: there.copy_(pinned, non_blocking=True)
        ways["to host, pinned"] = lambda: pinned.copy_(there, non_blocking=True)
    ways["on the device"] = lambda: other.copy_(there)
    for name, copy in ways.items():
        found[f"copy {name}, GB/s"] = round(number / bench.seconds_of(copy) / 1e9, 3)


def tests(bench: Bench, found: Found) -> None:
    """The kernels' own tests, in a process of their own, where they and pytest were brought along."""
    missing = [what for what, is_there in (("tests/gpu", _TESTS.is_dir()), ("pytest", _has("pytest"))) if not is_there]
    if missing:
        found["skipped"] = f"no {' and no '.join(missing)} here"
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        str(_TESTS),
    ]
    # whatever else is installed there, and whatever pytest is told elsewhere
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    limit = bench.seconds or None
    done = subprocess.run(
        command, cwd=_TESTS.parents[1], env=environment, capture_output=True, text=True, check=False, timeout=limit
    )
    lines = done.stdout.strip().splitlines()
    found |= {"exit": done.returncode, "said": lines[-1] if lines else done.stderr[-500:]}
    if done.returncode not in (0, 5):  # 5: all were left out
        found["output"] = done.stdout[-4000:]
        raise RuntimeError(f"pytest ended with code {done.returncode}")


def kernels(bench: Bench, found: Found) -> None:
    """Each kernel on as many samples as a step may have: ours, plain torch, and the packages that are here."""
    names = ["reference", "auto", *(name for name in PACKAGE_COMMANDS if _has(name))]
    for number in bench.sizes.samples:
        for name in names:
            try:
                backend = load_backend(name, bench.device.type)
                found[f"{number} {backend.name}"] = _times(bench, backend, number)
            except (ValueError, RuntimeError) as error:  # too large for the card, or not for this one
                found[f"{number} {name}"] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    if bench.device.type == "cuda" and len(names) > 1:
        exact = load_backend("ours", bench.device.type, deterministic=True)
        found["deterministic"] = _times(bench, exact, bench.sizes.samples[0])


def _times(bench: Bench, backend: Backend, number: int) -> Found:
    """Milliseconds: field, its gradient, march, prune, composite; backward with those that have one."""
    device, draws = bench.device, torch.Generator(bench.device).manual_seed(0)
    layout = make_hash_grid_layout(16, 2, bench.sizes.log2_table_size, 16, 2048 if not bench.is_small else 64)
    points = torch.rand(number, 3, generator=draws, device=device)
    table = torch.randn(layout.num_entries, 2, generator=draws, device=device, requires_grad=True)
    hidden = torch.randn(64, layout.num_features, generator=draws, device=device, requires_grad=True)
    head = torch.randn(4, 64, generator=draws, device=device, requires_grad=True)
    density = torch.rand(number, generator=draws, device=device, requires_grad=True)
    values = torch.rand(number, 4, generator=draws, device=device, requires_grad=True)
    samples = _even_samples(number, device)
    side = max(1, int((number / 200) ** 0.5))
    azimuth, elevation, distance, fov = (torch.tensor([value]) for value in (30.0, 15.0, 1.2, 60.0))
    cameras = orbit_cameras(azimuth, elevation, distance, fov, side, side)
    rays, cells = camera_rays(cameras), torch.ones(64, 64, 64, dtype=torch.bool, device=device)
    rays = type(rays)(rays.origins.to(device), rays.directions.to(device))
    jitter, least = torch.full((side * side,), 0.5, device=device), torch.tensor(0.01, device=device)

    def field() -> None:
        backend.field(points, table, layout, hidden, head).sum().backward()

    def slopes() -> None:
        output, gradient = backend.field_gradient(points, table, layout, hidden, head)
        (output.sum() + gradient.sum()).backward()

    def composite() -> None:
        color, opacity, weights = backend.composite(density, values, samples)
        (color.sum() + opacity.sum() + weights.sum()).backward()

    work = {
        "field": field,
        "field_gradient": slopes,
        "composite": composite,
        "march": lambda: backend.march(rays, cells, 1.0, 2 * 3**0.5 / 512, jitter),
        "prune": lambda: backend.prune(density.detach(), samples, least, 1e-4),
    }
    return {name: round(1e3 * bench.seconds_of(call, 3), 3) for name, call in work.items()}


def _even_samples(number: int, device: torch.device) -> RaySamples:
    per_ray = min(64, number)
    counts = torch.full((-(-number // per_ray),), per_ray, device=device)
    counts[-1] -= int(counts.sum()) - number
    ray = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    start = torch.arange(number, device=device).float() * 0.01
    return RaySamples(ray, start, start + 0.01, counts.cumsum(0) - counts, counts)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
