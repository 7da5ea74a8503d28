"""What a checkpoint holds: an actor's state as flat arrays in safetensors files, with nothing pickled."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from raydream.store import tensors

if TYPE_CHECKING:
    from raydream.store.run_folder import FileDigest

_PREFIX = "adam/"


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Adam's moments and step counts, keyed by the parameter's place in the groups; empty before the first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{_PREFIX}{i}/{name}": value.detach().cpu().numpy().copy()
        for i, parameter in enumerate(parameters)
        for name, value in sorted(optimizer.state.get(parameter, {}).items())
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    """The inverse of ``optimizer_arrays``; parameters without saved state start anew."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for key, array in arrays.items():
        if key.startswith(_PREFIX):
            index, name = key.removeprefix(_PREFIX).split("/")
            parameter = parameters[int(index)]
            value = torch.from_numpy(np.array(array))
            # fused Adam keeps its step counts beside the parameters, the plain one on the CPU
            fused = any(group.get("fused") for group in optimizer.param_groups)
            optimizer.state[parameter][name] = value.to(parameter.device) if name != "step" or fused else value


def save_snapshot(uri: str, step: int, name: str, arrays: Mapping[str, np.ndarray]) -> "dict[str, FileDigest]":
    """Writes one actor's file of a checkpoint in the making; the driver commits all of them together."""
    from raydream.store.run_folder import RunFolder  # pyarrow, which a step does not need

    data = tensors.pack(arrays, {"step": step})
    return {name: RunFolder.open(uri).write_checkpoint_file(step, name, data)}


def load_snapshot(uri: str, step: int, name: str) -> dict[str, np.ndarray]:
    """Reads it back, verified against the manifest."""
    from raydream.store.run_folder import RunFolder

    return tensors.unpack(RunFolder.open(uri).read_checkpoint_file(step, name))[0]
