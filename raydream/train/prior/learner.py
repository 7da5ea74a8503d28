"""What a training stage holds and keeps: parameters, their running average, the optimiser, the step; and the team."""

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import safetensors.torch
import torch
import torch.distributed as distributed
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import Parameter

from raydream.config.train import StageSettings

_LOWEST_RATE = 0.05
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Team:
    """The workers that train one model; for more than one, ``torch.distributed`` is set up already."""

    rank: int = 0
    size: int = 1

    def largest(self, values: list[float], device: torch.device) -> list[float]:
        """Each value's maximum over the team, so that all workers decide the same."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, device=device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.tolist()


class MeanGradients:
    """A model's gradients, averaged over a team while backward still computes the rest of them.

    Each lies in one of a few flat buffers, in the order in which backward makes them; a full buffer is sent at once.
    The buffers stay for all steps: to a CPU, fresh pages in every step cost more than the sending. ``parameters`` are
    of one type, on one device, and every worker's loss depends on the same ones; a gradient that is None stays so.
    """

    def __init__(self, parameters: Sequence[Parameter], team: Team, buffer_bytes: int = 4 * 2**20) -> None:
        self._parameters, self._team, self._buffer_bytes = parameters, team, buffer_bytes
        self._order: list[int] = []  # of the first backward
        self._buffers: list[Tensor] = []
        self._places: dict[int, tuple[int, Tensor]] = {}  # of each parameter: the buffer's number, the part of it
        self._counts: list[int] = []  # of the gradients in each buffer
        self._missing: list[int] = []
        self._sent: list[distributed.Work] = []
        if team.size > 1:
            for index, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, index))

    def wait(self) -> None:
        """After ``backward``, by all workers together: leaves the team's mean in every ``grad``."""
        if self._team.size == 1:
            return
        if not self._buffers:
            self._lay_out()
            for index, parameter in enumerate(self._parameters):
                if parameter.grad is not None:
                    self._arrive(index, parameter)
        while len(self._sent) < len(self._buffers):  # those with parameters that the loss does not use
            self._send()
        for work in self._sent:
            work.wait()
        self._sent.clear()
        self._missing = list(self._counts)

    def _lay_out(self) -> None:
        """Makes the buffers, in rank 0's order; what no gradient came for in the first step lies at the end."""
        rest = sorted(set(range(len(self._parameters))) - set(self._order))
        first = self._parameters[0]
        order = torch.tensor(self._order + rest, device=first.device)
        distributed.broadcast(order, 0)
        groups: list[list[int]] = [[]]
        room = self._buffer_bytes
        for index in order.tolist():
            size = self._parameters[index].numel() * first.element_size()
            if groups[-1] and size > room:
                groups.append([])
                room = self._buffer_bytes
            groups[-1].append(index)
            room -= size
        for number, group in enumerate(groups):
            sizes = [self._parameters[index].numel() for index in group]
            self._buffers.append(torch.zeros(sum(sizes), dtype=first.dtype, device=first.device))
            for index, part in zip(group, self._buffers[number].split(sizes)):
                self._places[index] = number, part.view_as(self._parameters[index])
        self._counts = [len(group) for group in groups]
        self._missing = list(self._counts)

    def _arrive(self, index: int, parameter: Tensor) -> None:
        """Called by backward for each finished gradient."""
        if not self._buffers:
            self._order.append(index)
            return
        assert parameter.grad is not None
        number, place = self._places[index]
        torch.div(parameter.grad, self._team.size, out=place)
        parameter.grad = place
        self._missing[number] -= 1
        while len(self._sent) < len(self._buffers) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        """Starts the next buffer's sum; all workers send them in the same order."""
        work = distributed.all_reduce(self._buffers[len(self._sent)], async_op=True)
        assert work is not None
        self._sent.append(work)


def learning_rate(settings: StageSettings, step: int, elapsed_s: float) -> float:
    """The rate at a step: a linear warm-up, then a cosine over ``progress`` to a twentieth."""
    warm = min(1.0, (step + 1) / max(settings.warm_up_steps, 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress(settings, step, elapsed_s)))
    return settings.lr * warm * (_LOWEST_RATE + (1 - _LOWEST_RATE) * cosine)


def progress(settings: StageSettings, step: int, elapsed_s: float) -> float:
    """The finished share of a stage, by steps or by its minutes, whichever is further; 1 and more is done."""
    by_time = elapsed_s / (60 * settings.minutes) if settings.minutes else 0.0
    return max(step / settings.num_steps, by_time)


def stratified_timesteps(
    size: int, generator: torch.Generator, logit_mean: float = 0.0, logit_std: float = 0.0
) -> Int[Tensor, " view"]:
    """Timesteps in 0..999, one from each equal part of their distribution: that takes most scatter out of a loss. It is
    uniform or, with ``logit_std`` above 0, such that the logit of t / 1000 is normal.
    """
    quantile = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    if logit_std:
        quantile = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(quantile))
    return (1000 * quantile).long().clamp_max(999)


class Learner(Generic[ModuleT]):
    """One stage's module in training. ``ema`` is what is used afterwards."""

    def __init__(self, module: ModuleT, settings: StageSettings, team: Team) -> None:
        self.module, self.settings = module, settings
        self.ema = copy.deepcopy(module).eval().requires_grad_(False)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=fused
        )
        self._gradients = MeanGradients(self.parameters, team)
        self.step, self.elapsed_s = 0, 0.0

    @property
    def progress(self) -> float:
        return progress(self.settings, self.step, self.elapsed_s)

    def update(self, loss_of: Callable[[], Tensor]) -> float:
        """One step of the optimiser on the team's mean gradient; returns this worker's loss.

        A loss that is not finite raises ``FloatingPointError`` before it can touch the parameters.
        """
        rate = learning_rate(self.settings, self.step, self.elapsed_s)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of()
        loss.backward()
        self._gradients.wait()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is {float(norm)} at step {self.step}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = list(self.ema.parameters())
        values: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)

    def save(self, path: Path) -> None:
        """Writes everything that the next step depends on; the file is whole or absent."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{name}"] = value
        write_tensors(path, tensors, {"step": float(self.step), "elapsed_s": self.elapsed_s})

    def restore(self, path: Path) -> None:
        """Continues from what ``save`` wrote; ValueError naming ``out`` if it belongs to another model."""
        tensors, facts = read_tensors(path)
        self.step, self.elapsed_s = int(facts["step"]), float(facts["elapsed_s"])
        try:
            self.module.load_state_dict(_below(tensors, "module."))
            self.ema.load_state_dict(_below(tensors, "ema."))
        except RuntimeError as error:
            raise ValueError(f"out: {path} is a checkpoint of another model: {error}") from error
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, float]) -> None:
    """A safetensors file that appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    # a model may hold one tensor under two names; the file format wants copies
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, part, metadata={"facts": json.dumps(dict(facts))})
    os.replace(part, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What ``write_tensors`` wrote."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
