"""What computes a training's gradients and applies them: plain torch here, DeepSpeed in a module of its own.

Each worker answers for one slice of every tensor that is trained: of its value, of Adam's moments, of its running
average. Slices join and split for any number of workers, so what one engine left any other can take up.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn import Parameter

from raydream.config.train import StageSettings
from raydream.train.team import MeanGradients, Team

BETAS = (0.9, 0.99)
KINDS = ("value", "exp_avg", "exp_avg_sq")  # of what an engine holds for each parameter
Slices = Mapping[str, Tensor]  # by KIND/NAME
Parameters = Mapping[str, Parameter]


@runtime_checkable
class Engine(Protocol):
    """Owns the optimiser. ``module`` is what the loss must call."""

    module: nn.Module

    def step(self, loss: Tensor, rate: float) -> float:
        """One step of AdamW on the team's mean gradient, clipped; its norm before that. Where the norm is not finite
        the weights stay as they are."""
        ...

    def values(self) -> dict[str, Tensor]:
        """This worker's slice of each weight, float32, as it is used now."""
        ...

    def slices(self) -> dict[str, Tensor]:
        """This worker's slices of all ``KINDS``. All workers call it together."""
        ...

    def restore(self, slices: Slices, step: int, loss_of: Callable[[], Tensor]) -> None:
        """Goes on from ``slices`` after ``step`` steps; the model has the weights already. ``loss_of`` is any loss."""
        ...


EngineMaker = Callable[[nn.Module, Parameters, StageSettings, Team], Engine]


def slice_length(numel: int, size: int) -> int:
    """The length of each of ``size`` equal slices, the last one padded; ZeRO-3 cuts its parameters in the same way."""
    return -(-numel // size)


def cut(full: Tensor, team: Team) -> Tensor:
    """This worker's slice of a tensor in float32, with zeros where it reaches over the end; may share its memory."""
    length = slice_length(full.numel(), team.size)
    part = full.detach().flatten()[team.rank * length : (team.rank + 1) * length].float()
    return part if len(part) == length else torch.cat([part, part.new_zeros(length - len(part))])


def join(part: Tensor, shape: Iterable[int], team: Team) -> Tensor:
    """The whole tensor from all workers' slices; they call it together."""
    shape = torch.Size(shape)
    parts = [part]
    if team.size > 1:
        parts = [torch.empty_like(part) for _ in range(team.size)]
        distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)[: shape.numel()].view(shape)


def make_optimizer(parameters: list[Parameter], settings: StageSettings) -> torch.optim.AdamW:
    """The optimiser of every engine; its rate is set at each step."""
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=settings.weight_decay, fused=fused)


class PlainEngine:
    """Every worker holds all weights and all of the optimiser."""

    def __init__(self, module: nn.Module, parameters: Parameters, settings: StageSettings, team: Team) -> None:
        self.module = module
        self._named, self._clip, self._team = dict(parameters), settings.gradient_clip, team
        self._parameters = list(parameters.values())
        self._gradients = MeanGradients(self._parameters, team)
        self._optimizer = make_optimizer(self._parameters, settings)

    def step(self, loss: Tensor, rate: float) -> float:
        loss.backward()
        self._gradients.wait()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._clip))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def values(self) -> dict[str, Tensor]:
        return {name: cut(parameter, self._team) for name, parameter in self._named.items()}

    def slices(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._named.items():
            state = {"value": parameter, **self._optimizer.state.get(parameter, {})}
            for kind in KINDS:
                found[f"{kind}/{name}"] = cut(state.get(kind, torch.zeros_like(parameter)), self._team)
        return found

    def restore(self, slices: Slices, step: int, loss_of: Callable[[], Tensor]) -> None:
        for name, parameter in self._named.items():
            moments = {kind: join(slices[f"{kind}/{name}"], parameter.shape, self._team) for kind in KINDS[1:]}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(step)).to(parameter.device), **moments}
