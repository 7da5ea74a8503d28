"""A made-up accelerator: what a GPU would be asked to do, counted on a machine that has none.

Its tensors say that they are on ``DEVICE`` and hold CPU numbers. As on a GPU they do not mix with tensors of the host,
and whatever makes the host wait for results is noted, with the function of raydream that asked for it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from raydream.backend import cuda

DEVICE = torch.device("meta")
# Operations of torch whose result has a size that only the device knows, or is a number of the host.
WAITS = {"nonzero", "bincount", "masked_select", "unique_dim", "_unique2", "repeat_interleave", "equal"}
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand", "select", "slice"),
    *("unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "chunk"),
    *("unfold", "lift_fresh", "diagonal", "empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided"),
}


@dataclass
class Tally:
    """What was asked of the device: launches by name; waits of the host, and copies and bytes, by who caused them."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    to_device_bytes: Counter[str] = field(default_factory=Counter)
    to_host_bytes: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in (self.launches, self.waits, self.to_device_bytes, self.to_host_bytes):
            counter.clear()


class PretendTensor(torch.Tensor):
    """A tensor of the device; ``held`` are its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=DEVICE, **place)  # type: ignore
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        raise AssertionError(f"{func} outside of pretend_device()")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=self.dtype, device=DEVICE)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls)


class _Counting(TorchDispatchMode):
    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = any(isinstance(tensor, PretendTensor) for tensor in tensors)
        to_device = ours
        if kwargs.get("device") is not None:
            to_device = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
        if name in ("_to_copy", "copy_"):
            source = args[-1] if name == "copy_" else args[0]
            self._copy(source, isinstance(args[0], PretendTensor) if name == "copy_" else to_device)
        elif ours:
            strangers = [t for t in tensors if not isinstance(t, PretendTensor) and t.dim() > 0]
            assert not strangers, f"{func} on tensors of the device and of the host, in {_asker()}"
        if ours or to_device:
            self._count(name, args)
        wrapped = {
            id(t.held): t for t in tensors if isinstance(t, PretendTensor)
        }  # in place, the same tensor comes out
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not to_device or name in ("_local_scalar_dense", "equal"):
            return result
        return tree_map(lambda out: wrapped[id(out)] if id(out) in wrapped else _wrap(out), result)

    def _count(self, name: str, args: Any) -> None:
        masked = name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if masked or name in WAITS or name == "_local_scalar_dense":
            self.tally.waits[_asker()] += 1
        if name not in VIEWS and name != "_local_scalar_dense":
            self.tally.launches[name] += 1

    def _copy(self, source: torch.Tensor, to_device: bool) -> None:
        if isinstance(source, PretendTensor) == to_device:
            return
        copied = self.tally.to_device_bytes if to_device else self.tally.to_host_bytes
        copied[_asker()] += source.nbytes
        if not to_device:
            self.tally.waits[_asker()] += 1


@contextmanager
def pretend_device() -> Iterator[Tally]:
    """Inside, ``DEVICE`` computes. Triton's kernels are interpreted: ``TRITON_INTERPRET=1`` must have been set."""
    tally, plain, launch = Tally(), torch.tensor, cuda.launch

    def tensor(data: Any, *, dtype: Any = None, device: Any = None) -> torch.Tensor:
        made = plain(data, dtype=dtype)
        return made if device is None else made.to(device)

    def counted(kernel: str, grid: tuple[int, ...], *arguments: object) -> None:
        tally.launches[kernel] += 1
        launch(kernel, grid, *map(_held, arguments))

    # Torch asks these without dispatching them; the device's generators and optimiser are the CPU's.
    supported = optimizer._get_fused_kernels_supported_devices()  # type: ignore[attr-defined]
    replaced: list[tuple[object, str, Callable[..., Any]]] = [
        (torch, "tensor", tensor),
        (torch, "Generator", _Generator),
        (optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported, DEVICE.type]),
        (cuda, "launch", counted),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in replaced:
            stack.enter_context(patch.object(owner, name, stand_in))
        stack.enter_context(_Counting(tally))
        yield tally


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _wrap(value: Any) -> Any:
    return PretendTensor(value) if isinstance(value, torch.Tensor) else value


def _asker() -> str:
    """The function of raydream that is nearest to what happens."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("raydream."):
            return f"{module.removeprefix('raydream.')}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
