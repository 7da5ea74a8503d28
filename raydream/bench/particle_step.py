"""One particle's step (render, backward, Adam) on two backends, in turns and in one thread. Needs neither Ray nor a
prior.

On a CPU the clock is the thread's own CPU time, which other processes hardly disturb; on a GPU it is wall time
around synchronised work. Each round takes a step on every backend, and the ratio is formed within the round.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from raydream.backend import load_backend
from raydream.bench.figures import Spread, spread_of
from raydream.camera import orbit_cameras
from raydream.config.presets import exhibit
from raydream.config.scene import NerfConfig
from raydream.diffusion.latent import RgbaCodec
from raydream.scene.nerf import NerfScene
from raydream.seeds import generator

STEP_PARTS = ("render", "backward", "adam")


@dataclass(frozen=True)
class StepSetting:
    """What is rendered: the default preset's scene and number of views, at this size.

    ``grid`` "ball" is the occupancy of a new object, most of space skipped; "full" skips nothing.
    """

    grid: Literal["ball", "full"]
    bfloat16: Literal["on", "off"]
    image_px: int = 64
    samples_per_diagonal: int = 96
    num_views: int = 2

    def text(self) -> str:
        """The setting in words."""
        precision = "bfloat16" if self.bfloat16 == "on" else "float32"
        return f"{self.num_views} x {self.image_px} px, {self.samples_per_diagonal} samples, {self.grid}, {precision}"


@dataclass(frozen=True)
class StepCost:
    """Seconds of each part of a step and of the whole, on one backend."""

    backend: str
    parts_s: dict[str, Spread]
    total_s: Spread


@dataclass(frozen=True)
class StepComparison:
    """Costs side by side; ``speedup`` is that of the last backend over the first, the plain torch twin."""

    setting: StepSetting
    device: str
    num_samples: int
    costs: list[StepCost]
    speedup: Spread


def compare_steps(setting: StepSetting, backends: Sequence[str], device: str, rounds: int) -> StepComparison:
    """Takes one step to warm up and then ``rounds`` steps on each backend, alternating."""
    torch.set_num_threads(1)
    steppers = [Stepper(setting, name, torch.device(device)) for name in backends]
    for stepper in steppers[1:]:  # the same cells for all: rounding can move one across the threshold
        stepper.scene.occupancy.values = steppers[0].scene.occupancy.values.clone()
    seconds: list[list[dict[str, float]]] = [[] for _ in steppers]
    for step in range(rounds + 1):
        for stepper, taken in zip(steppers, seconds):
            taken.append(stepper.take(step))
    measured = [taken[1:] for taken in seconds]
    totals = [[sum(parts.values()) for parts in taken] for taken in measured]
    costs = [
        StepCost(name, {part: spread_of([parts[part] for parts in taken]) for part in STEP_PARTS}, spread_of(total))
        for name, taken, total in zip(backends, measured, totals)
    ]
    speedup = spread_of([first / last for first, last in zip(totals[0], totals[-1])])
    return StepComparison(setting, device, steppers[-1].num_samples, costs, speedup)


class Stepper:
    """A scene with its optimiser, taken through steps as a particle takes them."""

    def __init__(self, setting: StepSetting, backend: str, device: torch.device) -> None:
        self._device, self._setting, stage = device, setting, exhibit().stages[0]
        assert isinstance(stage.scene, NerfConfig)
        config = replace(stage.scene, samples_per_diagonal=setting.samples_per_diagonal, bfloat16=setting.bfloat16)
        kernels = load_backend(backend, device.type)
        self.scene = NerfScene(config, stage.shading, stage.losses, kernels, device, _draws)
        self.num_samples = 0
        if setting.grid == "full":
            self.scene.occupancy.values.fill_(1.0)
        else:
            self.scene.after_step(0)
        self._optimizer = torch.optim.Adam(self.scene.param_groups(), betas=(0.9, 0.99), eps=1e-15, fused=True)
        self._codec = RgbaCodec(setting.image_px)
        shape = (setting.num_views, 4, setting.image_px, setting.image_px)
        self._gradient = torch.randn(shape, generator=generator(0, "gradient", 0, 0)).to(device) * 1e-2

    def take(self, step: int) -> dict[str, float]:
        """One step; the seconds of its ``STEP_PARTS``."""
        clock, view, px = clock_of(self._device), self._setting.num_views, self._setting.image_px
        marks = [clock()]
        azimuth = torch.arange(view) * (360.0 / view) + 40.0 * step
        level, distance, fov = (torch.full((view,), value) for value in (15.0, 2.6, 42.0))
        cameras = orbit_cameras(azimuth, level, distance, fov, px, px)
        render = self.scene.render(cameras, step)
        latents = self._codec.encode(render, _draws("codec", step))
        marks.append(clock())
        self._optimizer.zero_grad(set_to_none=True)
        (latents * self._gradient).sum().backward()
        marks.append(clock())
        self._optimizer.step()
        marks.append(clock())
        assert render.volume is not None
        self.num_samples = len(render.volume.weights)
        return {part: end - start for part, start, end in zip(STEP_PARTS, marks, marks[1:])}


def _draws(purpose: str, step: int) -> torch.Generator:
    return generator(0, purpose, 0, step)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of this thread on a CPU; wall seconds after all submitted work on a GPU."""
    if device.type == "cpu":
        return time.thread_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
