"""What travels between particles, score model and controller: flat dicts of arrays (tensors cost 2-3 times more)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raydream.device import send
from raydream.types import Views

Message = dict[str, np.ndarray]
LATENTS = "latents/"  # and the kind of render
_SEEN, _ANGLES = ("c2w", "fov_y_deg"), ("azimuth_deg", "elevation_deg")


def pack_views(views: Mapping[str, Views], step: int, wire_dtype: str) -> Message:
    """Views of a step as arrays, by their kind of render; all of the same cameras. Only the latents take the wire's
    precision, cameras stay float32.
    """
    anyone = next(iter(views.values()))
    cameras = {name: getattr(anyone, name).detach().cpu().numpy() for name in (*_SEEN, *_ANGLES)}
    latents = {f"{LATENTS}{render}": to_wire(seen.latents, wire_dtype) for render, seen in views.items()}
    return latents | cameras | {"step": np.array(step)}


def unpack_views(
    messages: Sequence[Mapping[str, np.ndarray]], step: int, device: torch.device, render: str = "rgb"
) -> Views:
    """All views of one kind of render of a step as one batch, in the order of the messages (arrays from Ray are
    read-only: they are copied). Angles stay with the host, which chooses words by them. Raises ``RuntimeError`` where a
    message is of another step: guidance on stale views is worse than none.
    """
    stale = sorted({int(message["step"]) for message in messages} - {step})
    if stale:
        raise RuntimeError(f"got views of step {stale[0]} at step {step}")

    def batch(name: str) -> Tensor:
        stacked = np.concatenate([message[name] for message in messages])
        return torch.from_numpy(stacked.astype(np.float32))

    seen = (send(batch(name), device) for name in (f"{LATENTS}{render}", *_SEEN))
    return Views(*seen, *(batch(name) for name in _ANGLES))


def num_views(message: Message) -> int:
    """How many views a message has."""
    return len(message["c2w"])


def to_wire(tensor: Float[Tensor, "..."], wire_dtype: str) -> np.ndarray:
    """A tensor as an array of the wire's precision, owning its memory."""
    return tensor.detach().cpu().numpy().astype(wire_dtype)


def read_figures(figures: Mapping[str, Float[Tensor, ""]]) -> dict[str, float]:
    """What was measured, all by one copy: each alone would make the host wait for the device."""
    return dict(zip(figures, torch.stack([figure.detach() for figure in figures.values()]).tolist()))


def from_wire(array: np.ndarray, device: torch.device) -> Float[Tensor, "..."]:
    """An array from the wire as a float32 tensor with memory of its own."""
    return send(torch.from_numpy(np.array(array, dtype=np.float32)), device)
