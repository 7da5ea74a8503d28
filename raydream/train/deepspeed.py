"""DeepSpeed's ZeRO as the engine of a training, on GPUs or, with gloo, on CPUs.

Its own checkpoints are pickles tied to one number of workers; here its state goes through ``engine``'s slices.
"""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from raydream.config.train import StageSettings
from raydream.train.engine import KINDS, Parameters, Slices, cut, join, make_optimizer
from raydream.train.team import Team

_OURS = ("optimizer", "scheduler")
_REMEDY = "leave it out of the DeepSpeed config, or change the job's own setting"


def read_deepspeed(source: str, stage: StageSettings, workers: int, on_gpu: bool) -> dict[str, Any]:
    """The whole DeepSpeed config for a job: from a JSON file, or from "0".."3", a ZeRO stage.

    What the file leaves out or calls "auto" comes from the job. ValueError naming ``deepspeed`` where it contradicts
    the job, or cannot work on these devices.
    """
    given: Any = {"zero_optimization": {"stage": int(source)}} if source in ("0", "1", "2", "3") else None
    if given is None:
        try:
            given = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"deepspeed: must be 0, 1, 2, 3 or a JSON file; {source!r}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"deepspeed: {source} is not a JSON object")
    for name in _OURS:
        if name in given:
            raise ValueError(f"deepspeed.{name}: the job brings its own (AdamW, warm-up and cosine); {_REMEDY}")
    zero, half, brain = (_section(given, name) for name in ("zero_optimization", "fp16", "bf16"))
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization: needs a stage of 0, 1, 2 or 3, got {zero['stage']!r}")
    if half.get("enabled") or (brain.get("enabled") and not on_gpu):
        raise ValueError("deepspeed.fp16, deepspeed.bf16: on GPUs the job trains in bf16, on CPUs in float32 weights")
    for name in ("offload_optimizer", "offload_param"):
        if _section(zero, name).get("device", "none") != "none":
            raise ValueError(f"deepspeed.zero_optimization.{name}: offloading is not supported; use more workers")
    derived = {
        "train_micro_batch_size_per_gpu": stage.batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": stage.batch_size * workers,
        "gradient_clipping": stage.gradient_clip,
    }
    for name, value in derived.items():
        if given.get(name, "auto") not in ("auto", value):
            raise ValueError(f"deepspeed.{name}: is {given[name]}, but the job's is {value}; {_REMEDY}")
    fixed = {"steps_per_print": 10**9, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {**given, **derived, "bf16": {"enabled": on_gpu}, "zero_optimization": zero, **fixed}


def _section(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = given.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"deepspeed: {name} must be a JSON object, got {section!r}")
    return section


def check_installed() -> None:
    """ValueError naming ``deepspeed``, with the remedy, where it is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "deepspeed: it is not installed; DS_BUILD_OPS=0 pip install 'raydream[deepspeed]', or train without it"
        )


class DeepSpeedEngine:
    """An ``engine.Engine`` around ``deepspeed.initialize``; ``config`` is what ``read_deepspeed`` gave."""

    def __init__(
        self,
        config: Mapping[str, Any],
        module: nn.Module,
        parameters: Parameters,
        settings: StageSettings,
        team: Team,
    ) -> None:
        deepspeed = _import_deepspeed()
        self._named, self._team = dict(parameters), team
        self._shapes = {name: parameter.shape for name, parameter in self._named.items()}
        optimizer = make_optimizer(list(self._named.values()), settings)
        self.module, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=dict(config), dist_init_required=False
        )
        self._api = deepspeed.utils
        self._masters: dict[Tensor, Tensor] = {}
        if hasattr(self._optimizer, "fp32_groups"):  # bfloat16 without ZeRO: it optimises float32 copies
            groups = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
            self._masters = {low: master for pair in groups for low, master in zip(*pair, strict=True)}
            for state in self._base_optimizer().state.values():
                state["step"].zero_()  # it has made the moments in a step of its own, which must not count

    def step(self, loss: Tensor, rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.module.backward(loss)
        finite = torch.isfinite(loss.detach()).float()
        if self._team.size > 1:
            distributed.all_reduce(finite, distributed.ReduceOp.MIN)
        if not finite:
            return math.nan
        self.module.step()
        return float(self.module.get_global_grad_norm() or 0.0)

    def values(self) -> dict[str, Tensor]:
        # ZeRO-3 leaves only ds_tensor, this worker's slice, which is cut as ours are
        return {
            name: parameter.ds_tensor.detach().flatten().float()  # type: ignore[attr-defined]
            if hasattr(parameter, "ds_tensor")
            else cut(parameter, self._team)
            for name, parameter in self._named.items()
        }

    def slices(self) -> dict[str, Tensor]:
        return {f"{kind}/{name}": self._read(kind, name) for name in self._named for kind in KINDS}

    def restore(self, slices: Slices, step: int, loss_of: Callable[[], Tensor]) -> None:
        # DeepSpeed makes the moments in the first step only: one that changes nothing, as its rate is 0
        self.step(loss_of(), 0.0)
        for name in self._named:
            for kind in KINDS:
                self._write(kind, name, slices[f"{kind}/{name}"])
        for state in self._base_optimizer().state.values():
            state["step"].fill_(float(step))

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _read(self, kind: str, name: str) -> Tensor:
        parameter = self._named[name]
        if hasattr(parameter, "ds_tensor"):
            return self._ask("get_local", kind, parameter).detach().flatten().float()
        if hasattr(parameter, "_hp_mapping"):
            return cut(self._ask("get_full", kind, parameter), self._team)
        return cut(self._own(kind, name), self._team)

    def _write(self, kind: str, name: str, part: Tensor) -> None:
        parameter = self._named[name]
        if hasattr(parameter, "ds_tensor"):
            self._ask("set_local", kind, parameter, part)
            return
        full = join(part, self._shapes[name], self._team)
        if hasattr(parameter, "_hp_mapping"):
            self._ask("set_full", kind, parameter, full)
        else:
            self._own(kind, name).copy_(full)

    def _ask(self, what: str, kind: str, parameter: nn.Parameter, *values: Tensor) -> Any:
        """One of DeepSpeed's functions that read or write what it has partitioned."""
        if kind == "value":
            return getattr(self._api, f"safe_{what}_fp32_param")(parameter, *values)
        return getattr(self._api, f"safe_{what}_optimizer_state")(parameter, *values, kind)

    def _own(self, kind: str, name: str) -> Tensor:
        """What it holds of a parameter that it has not partitioned."""
        parameter = self._masters.get(self._named[name], self._named[name])
        return parameter.data if kind == "value" else self._base_optimizer().state[parameter][kind]


def _import_deepspeed() -> Any:
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    import deepspeed
    import deepspeed.utils

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # its shared-memory collectives are compiled at run time; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
