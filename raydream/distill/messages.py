"""What travels between particles, score model and controller: flat dicts of numpy arrays (torch tensors cost 2-3
times more).
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raydream.types import Views

Message = dict[str, np.ndarray]
MAPS = "maps"


def pack_views(views: Views, step: int, wire_dtype: str, maps: Float[Tensor, "view 4 mh mw"] | None = None) -> Message:
    """Views of a step as arrays, with the encoded coordinate maps of the same cameras where there are any; only these
    and the latents take the wire's precision, cameras stay float32.
    """
    arrays = {f.name: getattr(views, f.name).detach().cpu().numpy() for f in fields(Views)}
    arrays["latents"] = arrays["latents"].astype(wire_dtype)
    if maps is not None:
        arrays[MAPS] = to_wire(maps, wire_dtype)
    return arrays | {"step": np.array(step)}


def unpack_views(
    messages: Sequence[Mapping[str, np.ndarray]], step: int, device: torch.device, latents: str = "latents"
) -> Views:
    """All views of a step as one batch, in the order of the messages (arrays from Ray are read-only: they are copied).

    ``latents`` may be ``MAPS``: then the views' latents are their coordinate maps. Raises ``RuntimeError`` where a
    message is of another step: guidance on stale views is worse than none.
    """
    stale = sorted({int(message["step"]) for message in messages} - {step})
    if stale:
        raise RuntimeError(f"got views of step {stale[0]} at step {step}")
    names = {f.name: f.name for f in fields(Views)} | {"latents": latents}
    stacked = {name: np.concatenate([message[key] for message in messages]) for name, key in names.items()}
    tensors = {name: torch.from_numpy(array.astype(np.float32)).to(device) for name, array in stacked.items()}
    return Views(**tensors)


def to_wire(tensor: Float[Tensor, "..."], wire_dtype: str) -> np.ndarray:
    """A tensor as an array of the wire's precision, owning its memory."""
    return tensor.detach().cpu().numpy().astype(wire_dtype)


def from_wire(array: np.ndarray, device: torch.device) -> Float[Tensor, "..."]:
    """An array from the wire as a float32 tensor with memory of its own."""
    return torch.from_numpy(np.array(array, dtype=np.float32)).to(device)
