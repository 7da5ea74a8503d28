"""What a CUDA graph is, on a CPU: operations that are recorded once and then repeated in the memory where they were.

As with a graph no Python runs again: a number that the host put in stays, and what makes the host wait for numbers, or
draws some, or brings some along, cannot be recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The host would have to know numbers (a size, a truth), draw some, or bring some along.
REFUSED = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim"),
    *("repeat_interleave", "lift_fresh", "normal_", "uniform_", "random_", "randn", "rand", "randint", "bernoulli_"),
}


class Tape(TorchDispatchMode):
    """Notes each operation with the very tensors that it read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        by_mask = name.startswith("index") and any(
            each.dtype == torch.bool for each in tree_leaves(args[1:]) if isinstance(each, Tensor)
        )
        if name in REFUSED or by_mask:
            raise RuntimeError(f"{name}: not while a graph is recorded")
        made = func(*args, **kwargs)
        read = {_memory(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        own = [each for each in tree_leaves(made) if isinstance(each, Tensor) and _memory(each) not in read]
        if own or func._schema.is_mutable:  # the others are views
            self.noted.append((func, args, kwargs, own))
        return made

    @torch.no_grad()
    def repeat(self) -> None:
        """All of it again, on whatever the memory holds now."""
        for func, args, kwargs, own in self.noted:
            made = func(*args, **kwargs)
            if own:
                now = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
                for place, value in zip(own, now, strict=True):
                    place.copy_(value)


def record(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """In the place of ``CudaRecorder``. What the memory held while it was recorded is lost, as a graph's recording
    computes nothing.
    """
    tape = Tape()
    with tape:
        results = work()
    for _, _, _, own in tape.noted:
        for place in own:
            place.zero_()
    return tape.repeat, results


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
