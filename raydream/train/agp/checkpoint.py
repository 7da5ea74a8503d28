"""Checkpoints of an AGP's fine-tuning: every worker writes a shard, its slices; any number of workers reads them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from raydream.config.train import StageSettings
from raydream.priors.agp import AgpDenoiser, check_same_prior
from raydream.store import tensors
from raydream.store.run_folder import FileDigest, RunFolder
from raydream.train.deepspeed import DeepSpeedEngine
from raydream.train.engine import KINDS, PlainEngine, join, slice_length
from raydream.train.learner import AVERAGE, Learner, TrainingState
from raydream.train.team import Team


def begin(
    denoiser: AgpDenoiser,
    settings: StageSettings,
    team: Team,
    deepspeed: Mapping[str, Any] | None,
    run: RunFolder,
    step: int | None,
    loss_of: Callable[[], Tensor],
) -> Learner[nn.Module]:
    """A learner of what an AGP trains, as the checkpoint of ``step`` left it; without a step, as the AGP is now.

    ValueError naming ``out`` where the checkpoint is another model's. Without ``deepspeed``, what ``read_deepspeed``
    gave, plain torch trains. From here on the engine runs the UNet.
    """
    parameters = denoiser.trainable()
    state = None
    if step is not None:
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        state = read_state(run, step, denoiser, shapes, team)
        denoiser.load_state({name: join(state.slices[f"value/{name}"], s, team) for name, s in shapes.items()})
    make_engine = PlainEngine if deepspeed is None else functools.partial(DeepSpeedEngine, deepspeed)
    learner: Learner[nn.Module] = Learner(denoiser.unet, settings, team, parameters, make_engine)
    denoiser.model.call = learner.engine.module
    if state is not None:
        learner.restore(state, loss_of)
    return learner


def read_state(
    run: RunFolder, step: int, denoiser: AgpDenoiser, shapes: Mapping[str, tuple[int, ...]], team: Team
) -> TrainingState:
    """This worker's slices of a checkpoint, whatever number of workers wrote it."""
    length = {name: slice_length(torch.Size(shape).numel(), team.size) for name, shape in shapes.items()}
    parts: dict[str, list[Tensor]] = {f"{kind}/{name}": [] for kind in (*KINDS, AVERAGE) for name in shapes}
    number = last = 0
    while number <= last:
        arrays, facts = tensors.unpack(run.read_checkpoint_file(step, _shard_name(number)))
        last = facts["num_shards"] - 1
        check_same_prior(facts["prior_sha256"], denoiser.facts.prior_sha256, f"out: the checkpoint in {run.uri}")
        if facts["shapes"] != {name: list(shape) for name, shape in shapes.items()}:
            raise ValueError(f"out: the checkpoint in {run.uri} is of another model; model.rank must stay the same")
        for key, array in arrays.items():
            name = key.partition("/")[2]
            old, first = len(array), team.rank * length[name]  # both count from this tensor's begin
            low, high = max(first, number * old), min(first + length[name], (number + 1) * old)
            if low < high:
                parts[key].append(torch.from_numpy(array[low - number * old : high - number * old].copy()))
        number += 1
    slices = {}
    for key, found in parts.items():
        whole = torch.cat(found) if found else torch.zeros(0)
        missing = length[key.partition("/")[2]] - whole.numel()
        slices[key] = torch.cat([whole, whole.new_zeros(max(missing, 0))]).to(denoiser.unet.device)
    return TrainingState(int(facts["step"]), float(facts["elapsed_s"]), slices)


def save(learner: Learner[nn.Module], run: RunFolder, prior_sha256: str) -> None:
    """A checkpoint that exists when it is whole; all workers call it together."""
    state, team = learner.state(), learner.team
    facts = {
        "step": state.step,
        "elapsed_s": state.elapsed_s,
        "num_shards": team.size,
        "prior_sha256": prior_sha256,
        "shapes": learner.shapes,
    }
    content = tensors.pack({name: part.cpu().numpy() for name, part in state.slices.items()}, facts)
    mine = run.write_checkpoint_file(state.step, _shard_name(team.rank), content)
    digests: list[FileDigest] = [mine]
    if team.size > 1:
        digests = [mine] * team.size
        distributed.all_gather_object(digests, mine)
    if team.rank == 0:
        run.commit_checkpoint(state.step, {_shard_name(i): found for i, found in enumerate(digests)})
    if team.size > 1:
        distributed.barrier()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
