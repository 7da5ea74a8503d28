"""What a training holds: a module, the engine that trains it, its running average, its step and its pace."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from raydream.config.train import StageSettings
from raydream.train.engine import EngineMaker, Parameters, PlainEngine, Slices, join
from raydream.train.team import Team

AVERAGE = "ema"  # the kind of slices that a learner keeps beside its engine's
_LOWEST_RATE = 0.05
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def learning_rate(settings: StageSettings, step: int, elapsed_s: float) -> float:
    """The rate at a step: a linear warm-up, then a cosine over ``progress`` to a twentieth."""
    warm = min(1.0, (step + 1) / max(settings.warm_up_steps, 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress(settings, step, elapsed_s)))
    return settings.lr * warm * (_LOWEST_RATE + (1 - _LOWEST_RATE) * cosine)


def progress(settings: StageSettings, step: int, elapsed_s: float) -> float:
    """The finished share of a stage, by steps or by its minutes, whichever is further; 1 and more is done."""
    by_time = elapsed_s / (60 * settings.minutes) if settings.minutes else 0.0
    return max(step / settings.num_steps, by_time)


@dataclass(frozen=True)
class TrainingState:
    """All that the next step depends on, but the weights that a model has: one worker's slices of every kind."""

    step: int
    elapsed_s: float
    slices: Slices


class Learner(Generic[ModuleT]):
    """A module in training, from the weights that it has. ``parameters`` are all that it trains, in the order of the
    optimiser; without them, what of the module asks for a gradient.
    """

    def __init__(
        self,
        module: ModuleT,
        settings: StageSettings,
        team: Team,
        parameters: Parameters | None = None,
        make_engine: EngineMaker = PlainEngine,
    ) -> None:
        self.module, self.settings, self.team = module, settings, team
        if parameters is None:
            parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.engine = make_engine(module, parameters, settings, team)
        self.step, self.elapsed_s, self.rate = 0, 0.0, 0.0
        self._average: Slices = {name: part.clone() for name, part in self.engine.values().items()}

    @property
    def progress(self) -> float:
        return progress(self.settings, self.step, self.elapsed_s)

    def restore(self, state: TrainingState, loss_of: Callable[[], Tensor]) -> None:
        """Goes on from a state whose weights the module had before the learner was made; ``loss_of`` is any loss."""
        self.engine.restore(state.slices, state.step, loss_of)
        self.step, self.elapsed_s = state.step, state.elapsed_s
        self._average = {name: state.slices[f"{AVERAGE}/{name}"] for name in self.shapes}

    def update(self, loss_of: Callable[[], Tensor]) -> float:
        """One step on the team's mean gradient; returns this worker's loss.

        A gradient that is not finite raises ``FloatingPointError`` before it can touch the parameters.
        """
        self.rate = learning_rate(self.settings, self.step, self.elapsed_s)
        loss = loss_of()
        norm = self.engine.step(loss, self.rate)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm}, the loss {float(loss.detach())} at step {self.step}"
            )
        self.step += 1
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self._average.values()), list(self.engine.values().values()), 1 - decay)
        return float(loss.detach())

    def averaged(self) -> dict[str, Tensor]:
        """The running average of every weight, which is what is used afterwards, on the CPU; all workers call it
        together.
        """
        return {name: join(self._average[name], shape, self.team).cpu() for name, shape in self.shapes.items()}

    def state(self) -> TrainingState:
        """What ``restore`` takes; all workers call it together."""
        average = {f"{AVERAGE}/{name}": part for name, part in self._average.items()}
        return TrainingState(self.step, self.elapsed_s, self.engine.slices() | average)


@torch.no_grad()
def set_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies values into a module's parameters of the same names."""
    for name, value in values.items():
        module.get_parameter(name).copy_(value)
