"""A stage's checkpoint of a prior's training: one safetensors file that is whole or absent."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from raydream.config.train import StageSettings
from raydream.train.engine import KINDS, cut, join
from raydream.train.learner import AVERAGE, Learner, ModuleT, TrainingState, set_parameters
from raydream.train.team import Team

_WHOLE = {"value": "module", AVERAGE: "ema"}  # what the file calls them; moments are by the parameter's number


def begin(
    module: ModuleT, settings: StageSettings, team: Team, path: Path, loss_of: Callable[[], Tensor]
) -> Learner[ModuleT]:
    """A stage's learner as it was left in a checkpoint, or at its beginning where there is none; ``loss_of`` is any
    loss. ValueError naming ``out`` where the checkpoint is another model's.
    """
    if not path.is_file():
        return Learner(module, settings, team)
    found, facts = read_tensors(path)
    names = [name for name, value in module.named_parameters() if value.requires_grad]
    device = module.get_parameter(names[0]).device
    try:
        set_parameters(module, {name: found[f"module.{name}"] for name in names})
        slices = {key: cut(found[place], team).to(device) for key, place in _places(names).items()}
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"out: {path} is a checkpoint of another model: {error}") from error
    learner = Learner(module, settings, team)
    learner.restore(TrainingState(int(facts["step"]), float(facts["elapsed_s"]), slices), loss_of)
    return learner


def save(learner: Learner[ModuleT], path: Path) -> None:
    """Writes everything that the next step depends on; all workers call it together, rank 0 writes."""
    state = learner.state()
    places = _places(list(learner.shapes))
    whole = {
        place: join(state.slices[key], learner.shapes[key.partition("/")[2]], learner.team).cpu()
        for key, place in places.items()
    }
    if learner.team.rank == 0:
        steps = {f"optimizer.{index}.step": torch.tensor(float(state.step)) for index in range(len(learner.shapes))}
        facts = json.dumps({"step": float(state.step), "elapsed_s": state.elapsed_s})
        part = path.with_name(path.name + ".part")
        safetensors.torch.save_file(whole | steps, part, metadata={"facts": facts})
        os.replace(part, path)


def _places(names: list[str]) -> dict[str, str]:
    """The tensors of the file by their kind and name."""
    whole = {f"{kind}/{name}": f"{place}.{name}" for kind, place in _WHOLE.items() for name in names}
    numbered = enumerate(names)
    return whole | {f"{kind}/{name}": f"optimizer.{i}.{kind}" for i, name in numbered for kind in KINDS[1:]}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A checkpoint's tensors, and its step and time."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
