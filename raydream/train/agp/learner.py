"""What an AGP's fine-tuning holds and keeps. Each worker owns one slice of every tensor that is trained: of its running
average, and in a checkpoint also of its value and of Adam's moments. Slices join and split for any number of workers,
so a checkpoint is restored on as many as there are, by any engine.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn import Parameter

from raydream.config.train import StageSettings
from raydream.priors.agp import AgpDenoiser, check_same_prior
from raydream.store import tensors
from raydream.store.run_folder import FileDigest, RunFolder
from raydream.train.prior.learner import MeanGradients, Team, learning_rate, progress

BETAS = (0.9, 0.99)
KINDS = ("value", "exp_avg", "exp_avg_sq", "ema")
Slices = Mapping[str, Tensor]


@runtime_checkable
class Engine(Protocol):
    """What computes gradients and applies them: plain torch (below) or DeepSpeed."""

    def step(self, loss: Tensor, rate: float) -> float:
        """One step of AdamW on the team's mean gradient, clipped; its norm before that. A norm that is not finite
        raises ``FloatingPointError`` and leaves the weights alone."""
        ...

    def values(self) -> dict[str, Tensor]:
        """This worker's slice of each weight, float32, as it is used now."""
        ...

    def slices(self) -> dict[str, Tensor]:
        """This worker's slices ``value/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``. All workers call it together."""
        ...

    def restore(self, slices: Slices, step: int, loss_of: Callable[[], Tensor]) -> None:
        """Goes on from ``slices`` after ``step`` steps; the model has the weights already. ``loss_of`` is any loss."""
        ...


EngineMaker = Callable[[AgpDenoiser, StageSettings, Team], Engine]


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

    def __init__(self, denoiser: AgpDenoiser, settings: StageSettings, team: Team) -> None:
        self._named, self._clip, self._team = denoiser.trainable(), settings.gradient_clip, team
        self._parameters = list(self._named.values())
        self._gradients = MeanGradients(self._parameters, team)
        self._optimizer = make_optimizer(self._parameters, settings)

    def step(self, loss: Tensor, rate: float) -> float:
        loss.backward()
        self._gradients.wait()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
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
            for kind in KINDS[:3]:
                found[f"{kind}/{name}"] = cut(state.get(kind, torch.zeros_like(parameter)), self._team)
        return found

    def restore(self, slices: Slices, step: int, loss_of: Callable[[], Tensor]) -> None:
        for name, parameter in self._named.items():
            moments = {k: join(slices[f"{k}/{name}"], parameter.shape, self._team) for k in KINDS[1:3]}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(step)).to(parameter.device), **moments}


class AgpLearner:
    """The training's state: model, engine, running average, step and time."""

    def __init__(self, denoiser: AgpDenoiser, settings: StageSettings, team: Team) -> None:
        self.denoiser, self.settings, self.team = denoiser, settings, team
        self.step, self.elapsed_s = 0, 0.0
        self._shapes = {name: tuple(parameter.shape) for name, parameter in denoiser.trainable().items()}
        self._saved: dict[str, Tensor] = {}
        self._engine: Engine | None = None
        self._ema: dict[str, Tensor] = {}

    @property
    def progress(self) -> float:
        return progress(self.settings, self.step, self.elapsed_s)

    def load(self, run: RunFolder, step: int) -> None:
        """Reads the checkpoint of a step, before ``start``; ValueError naming ``out`` where it is another model's."""
        length = {name: slice_length(torch.Size(s).numel(), self.team.size) for name, s in self._shapes.items()}
        parts: dict[str, list[Tensor]] = {f"{kind}/{name}": [] for kind in KINDS for name in self._shapes}
        number = last = 0
        while number <= last:
            arrays, facts = tensors.unpack(run.read_checkpoint_file(step, _shard_name(number)))
            last = facts["num_shards"] - 1
            check_same_prior(
                facts["prior_sha256"], self.denoiser.facts.prior_sha256, f"out: the checkpoint in {run.uri}"
            )
            if facts["shapes"] != {name: list(shape) for name, shape in self._shapes.items()}:
                raise ValueError(f"out: the checkpoint in {run.uri} is of another model; model.rank must stay the same")
            for key, array in arrays.items():
                name = key.partition("/")[2]
                old, first = len(array), self.team.rank * length[name]  # both count from this tensor's begin
                low, high = max(first, number * old), min(first + length[name], (number + 1) * old)
                if low < high:
                    parts[key].append(torch.from_numpy(array[low - number * old : high - number * old].copy()))
            self.step, self.elapsed_s = int(facts["step"]), float(facts["elapsed_s"])
            number += 1
        for key, found in parts.items():
            whole = torch.cat(found) if found else torch.zeros(0)
            missing = length[key.partition("/")[2]] - whole.numel()
            self._saved[key] = torch.cat([whole, whole.new_zeros(max(missing, 0))])
        device = self.denoiser.unet.device
        self._saved = {key: part.to(device) for key, part in self._saved.items()}
        self.denoiser.load_state({n: join(self._saved[f"value/{n}"], s, self.team) for n, s in self._shapes.items()})

    def start(self, make_engine: EngineMaker, loss_of: Callable[[], Tensor]) -> None:
        """Builds the engine, at the state that ``load`` read if it did."""
        self._engine = make_engine(self.denoiser, self.settings, self.team)
        if self._saved:
            self._engine.restore(self._saved, self.step, loss_of)
            self._ema = {name: self._saved[f"ema/{name}"] for name in self._shapes}
            self._saved = {}
        else:
            self._ema = {name: part.clone() for name, part in self._engine.values().items()}

    def update(self, loss_of: Callable[[], Tensor]) -> float:
        """One step; returns this worker's loss."""
        assert self._engine is not None
        loss = loss_of()
        self._engine.step(loss, learning_rate(self.settings, self.step, self.elapsed_s))
        self.step += 1
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self._ema.values()), list(self._engine.values().values()), 1 - decay)
        return float(loss.detach())

    def averaged(self) -> dict[str, Tensor]:
        """The running average of every weight, on the CPU; all workers call it together."""
        return {name: join(self._ema[name], shape, self.team).cpu() for name, shape in self._shapes.items()}

    def save(self, run: RunFolder) -> None:
        """A checkpoint that exists when it is whole; all workers call it together."""
        assert self._engine is not None
        arrays = self._engine.slices() | {f"ema/{name}": part for name, part in self._ema.items()}
        facts = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "num_shards": self.team.size,
            "prior_sha256": self.denoiser.facts.prior_sha256,
            "shapes": self._shapes,
        }
        content = tensors.pack({name: part.cpu().numpy() for name, part in arrays.items()}, facts)
        mine = run.write_checkpoint_file(self.step, _shard_name(self.team.rank), content)
        digests: list[FileDigest] = [mine]
        if self.team.size > 1:
            digests = [mine] * self.team.size
            distributed.all_gather_object(digests, mine)
        if self.team.rank == 0:
            run.commit_checkpoint(self.step, {_shard_name(i): found for i, found in enumerate(digests)})
        if self.team.size > 1:
            distributed.barrier()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
