"""What Triton's interpreter makes of the CUDA kernels: ``python interpreted.py`` prints its findings as JSON.

In a process of its own, with ``TRITON_INTERPRET=1``: triton decides at its import whether it interprets. An operation
costs the interpreter the same however wide it is, so programs take more at once here than on a GPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    from jaxtyping import install_import_hook

    install_import_hook("raydream", "beartype.beartype")

import numpy as np
import torch
from backend_cases import LAYOUT, SMOOTH, random_points, random_rays, random_triangles, worst_difference
from package_cases import relative
from small_runs import small_config
from small_scenes import CPU, make_cameras

from raydream.assets.parts import Material, Part, build_asset
from raydream.backend import cuda
from raydream.backend.cuda import CudaBackend
from raydream.backend.reference import ReferenceBackend
from raydream.bench.pretend_device import DEVICE, PretendTensor, Tally, pretend_device
from raydream.config.actors import particle_config
from raydream.diffusion.latent import RgbaCodec
from raydream.distill.particle import Particle
from raydream.priors.exhibit_modes import ExhibitModes
from raydream.scene.kinds import make_scene
from raydream.seeds import generator
from raydream.types import Backend

WIDE = {
    "SAMPLES_PER_PROGRAM": 256,
    "RAYS_PER_PROGRAM": 256,
    "RAYS_PER_WALK": 256,
    "INTERVALS_PER_WALK": 64,
    "PIXELS_PER_PROGRAM": 256,
    "PROGRAMS_WANTED": 160,  # two for each of the faces
}


def interpret() -> dict[str, Any]:
    """The findings of all ``CHECKS``, from a process of its own."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests/support"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sums() -> dict[str, float]:
    """How far values and gradients are from the reference, by precision."""
    return {str(dtype): worst_difference(CudaBackend(), dtype, "cpu") for dtype in (torch.float32, torch.float64)}


def gradient() -> dict[str, Any]:
    """The table's gradient summed in integers and in floats, and how a field's gradient lies in memory."""
    draws, found, grads = torch.Generator().manual_seed(1), {}, {}
    points = random_points(draws, 400, torch.float32)
    table = torch.randn(LAYOUT.num_entries, 2, generator=draws, requires_grad=True)
    hidden, head = (torch.randn(shape, generator=draws) for shape in ((8, LAYOUT.num_features), (4, 8)))
    upstream = torch.randn(400, 4, generator=draws)
    strides: list[tuple[int, ...]] = []
    summed = cuda._sum_gradient

    def spy(ctx: Any, kernel: str, points: Any, most: Any, *grads: Any) -> Any:
        strides.append(grads[0].stride())
        return summed(ctx, kernel, points, most, *grads)

    backends: dict[str, Backend] = {"floats": CudaBackend(), "integers": CudaBackend(deterministic=True)}
    with patch.object(cuda, "_sum_gradient", spy):
        for name, backend in (backends | {"truth": ReferenceBackend()}).items():
            output = backend.field(points, table, LAYOUT, hidden, head)
            grads[name] = torch.autograd.grad(output, table, upstream)[0]
    found["size"] = float(grads["truth"].abs().max())
    for name in ("floats", "integers"):
        found[name] = float((grads[name] - grads["truth"]).abs().max())
    return found | {"strides": strides}


def smooth() -> float:
    """How far a smooth field, its slope and their gradients are from the reference, relative to the largest of each."""
    draws, dtype = torch.Generator().manual_seed(2), torch.float64
    points = random_points(draws, 300, dtype)
    shapes = (SMOOTH.num_entries, 2), (8, SMOOTH.num_features), (4, 8)
    table, *rest = weights = [torch.randn(s, generator=draws, dtype=dtype, requires_grad=True) for s in shapes]

    def everything(backend: Backend) -> list[torch.Tensor]:
        plain = backend.field(points, table, SMOOTH, *rest)
        both = backend.field_gradient(points, table, SMOOTH, *rest)
        results = [plain, *both, *torch.autograd.grad(plain.square().sum(), weights)]
        return results + list(torch.autograd.grad(both[0].sum() + both[1].square().sum(), weights))

    return relative(everything(CudaBackend()), everything(ReferenceBackend()))


def packed() -> dict[str, list[int]]:
    """How many samples and faces were looked at of which all are the reference's, bit by bit."""
    counts: dict[str, list[int]] = {"march": [], "prune": [], "rasterize": []}
    for dtype, fill, radius, step in ((torch.float32, 0.3, 1.0, 0.033), (torch.float64, 0.05, 0.7, 0.05)):
        draws = torch.Generator().manual_seed(0)
        rays = random_rays(draws, 300, dtype)
        occupancy = torch.rand(16, 12, 20, generator=draws) < fill
        jitter = torch.rand(300, generator=draws, dtype=dtype)
        samples = [b.march(rays, occupancy, radius, step, jitter) for b in (CudaBackend(), ReferenceBackend())]
        counts["march"].append(_equal(*samples))
        density = torch.rand(len(samples[1].t_start), generator=draws, dtype=dtype).exp() ** 8
        density[::7], density[::31] = 0, 1e9
        for min_alpha, min_transmittance in ((0.0, 0.0), (0.01, 1e-4), (0.3, 0.2)):
            least = torch.tensor(min_alpha)
            both = [b.prune(density, samples[1], least, min_transmittance) for b in (CudaBackend(), ReferenceBackend())]
            counts["prune"].append(_equal(*both))
        clip, faces = random_triangles(draws, dtype)
        images = [b.rasterize(clip, faces[:40], 20, 24) for b in (CudaBackend(), ReferenceBackend())]
        counts["rasterize"].append(_equal(*images))
    nothing = random_rays(draws, 300, torch.float32)
    empty = CudaBackend().march(nothing, torch.zeros(4, 4, 4, dtype=torch.bool), 1.0, 0.1, torch.zeros(300))
    counts["march"].append(len(CudaBackend().prune(empty.t_start, empty, torch.tensor(0.01), 1e-4).t_start))
    return counts


def step() -> dict[str, Any]:
    """What one step of a particle asks of a GPU, with all that a scene can have; and the same with plain torch."""
    return {backend.name: _step(backend) for backend in (CudaBackend(), ReferenceBackend())}


def _step(backend: Backend) -> dict[str, Any]:
    scene: dict[str, Any] = {"bfloat16": "off", "min_alpha": 0.01, "min_transmittance": 1e-4, "density_noise": 0.1}
    scene |= {"background": "network", "occupancy_every": 1}
    losses = dict.fromkeys(("sparsity", "opaqueness", "orientation", "z_variance"), 1)
    parts: dict[str, dict[str, Any]] = {"scene": scene, "losses": losses, "shading": {"albedo_steps": 0}}
    settings = [f"stages.0.{part}.{name}={value}" for part, values in parts.items() for name, value in values.items()]
    run = small_config(*settings)
    config = particle_config(run, 0, 0)
    told: dict[str, Any] = {}
    with pretend_device() as tally:
        nerf = make_scene(config.stage, backend, DEVICE, lambda purpose, step: generator(0, purpose, 0, step))
        particle = Particle(config, DEVICE, nerf, RgbaCodec(16), 0)
        for number in range(2):  # the first fills what is kept for good
            tally.clear()
            message = particle.render(number)
            told["render"] = _told(tally)
            told["repeats"] = np.array_equal(particle.render(number)["latents/rgb"], message["latents/rgb"])
            gradient = np.random.default_rng(0).standard_normal(message["latents/rgb"].shape).astype(np.float32)
            tally.clear()
            figures = particle.apply(number, gradient)
            told["apply"] = _told(tally)
    return told | {"samples": figures["scene/samples"], "finite": bool(np.isfinite(list(figures.values())).all())}


def _told(tally: Tally) -> dict[str, dict[str, int]]:
    return {part.name: dict(getattr(tally, part.name)) for part in fields(tally) if part.name != "is_busy"}


def _equal(found: Any, expected: Any) -> int:
    for part in fields(expected):
        assert torch.equal(getattr(found, part.name), getattr(expected, part.name)), part.name
    first = getattr(expected, fields(expected)[0].name)
    return int((first >= 0).sum())


def modes() -> dict[str, Any]:
    """What the modes of an exhibit ask of a GPU, seen from two sides; and whether they look there as on the host."""
    image = np.random.default_rng(0).integers(0, 255, (4, 4, 4), np.uint8)
    corners, square = [[-1, 1, 0], [1, 1, 0.5], [1, -1, 0], [-1, -1, 0]], [[0, 3, 2], [0, 2, 1]]
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64)
    parts = [
        Part(np.array(corners, np.float64), np.array(square), Material(image=image), uv=uv),
        Part(np.array(corners, np.float64), np.array(square[:1]), Material(np.array([0.2, 0.8, 0.4, 1.0]))),
    ]
    assets = [build_asset(name, "", [part], []) for name, part in zip(("textured", "plain"), parts)]
    cameras = make_cameras([30.0, 200.0], 16)
    where, fov = cameras.c2w.float(), cameras.fov_y_deg.float()
    expected = ExhibitModes(assets, 2, ReferenceBackend(), CPU).means(where, fov, torch.arange(2), 16)
    with pretend_device() as tally:
        exhibit = ExhibitModes(assets, 2, CudaBackend(), DEVICE)
        where, fov, used = (tensor.to(DEVICE) for tensor in (where, fov, torch.arange(2)))
        tally.clear()
        means = exhibit.means(where, fov, used, 16)
        told = _told(tally)
    assert isinstance(means, PretendTensor)
    shown = float((expected[:, :, 3] > 0).float().mean())
    return told | {"same": torch.equal(means.held, expected), "shown": shown}


CHECKS = (sums, gradient, smooth, packed, step, modes)

if __name__ == "__main__":
    for name, width in WIDE.items():
        setattr(cuda, name, width)
    print(json.dumps({each.__name__: each() for each in CHECKS}))
