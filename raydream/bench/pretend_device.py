"""A made-up accelerator: what a GPU would be asked to do, counted on a machine that has none.

Its tensors say that they are on ``DEVICE`` and hold CPU numbers. As on a GPU they do not mix with tensors of the host,
and whatever makes the host wait for results is noted, with the function of raydream that asked for it: a copy to the
host, a size that only the device knows, and a copy to the device that is not ``non_blocking`` while there is work that
nobody has waited for.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from raydream.backend import cuda
from raydream.diffusion.graphs import Recording, Work

DEVICE = torch.device("meta")
# Operations of torch whose result has a size that only the device knows, or is a number of the host.
WAITS = {"nonzero", "bincount", "masked_select", "unique_dim", "_unique2", "repeat_interleave", "equal"}
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand", "select", "slice"),
    *("unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "chunk"),
    *("unfold", "lift_fresh", "diagonal", "empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided"),
    *("is_same_size", "view_as_real", "expand_as", "_local_scalar_dense"),
}


@dataclass
class Tally:
    """What was asked of the device: launches by name; waits of the host, and copies and bytes, by who caused them."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    to_device_bytes: Counter[str] = field(default_factory=Counter)
    to_host_bytes: Counter[str] = field(default_factory=Counter)
    to_device: Counter[str] = field(default_factory=Counter)
    to_host: Counter[str] = field(default_factory=Counter)
    is_busy: bool = False  # with work that nobody has waited for

    def clear(self) -> None:
        for part in fields(self):
            if part.name != "is_busy":
                getattr(self, part.name).clear()

    def launch(self, name: str) -> None:
        self.launches[name] += 1
        self.is_busy = True

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """What is launched inside is one launch: that of a graph. It may wait for nothing."""
        before, waits = self.launches.copy(), self.waits.total()
        yield
        assert self.waits.total() == waits, "a graph cannot wait for the device"
        self.launches = before
        self.launch(name)

    def record(self, work: Work) -> Recording:
        """Stands in for ``CudaRecorder``."""
        results = work()

        def repeat() -> None:
            with self.as_one("graph"):
                for place, result in zip(results, work()):
                    place.copy_(result)

        return repeat, results

    def wait(self) -> None:
        self.waits[_asker()] += 1
        self.is_busy = False


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
        name, kwargs, crosses = func._schema.name.removeprefix("aten::"), dict(kwargs or {}), False
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = any(isinstance(tensor, PretendTensor) for tensor in tensors)
        to_device = ours
        if kwargs.get("device") is not None:
            to_device = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
        if name in ("_to_copy", "copy_"):
            source = args[-1] if name == "copy_" else args[0]
            to_there = isinstance(args[0], PretendTensor) if name == "copy_" else to_device
            crosses = isinstance(source, PretendTensor) != to_there
            if crosses:
                blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                self._copy(source, to_there, blocks)
        elif ours:
            strangers = [t for t in tensors if not isinstance(t, PretendTensor) and t.dim() > 0]
            assert not strangers, f"{func} on tensors of the device and of the host, in {_asker()}"
        if (ours or to_device) and not crosses:
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
            self.tally.wait()
        if name not in VIEWS:
            self.tally.launch(name)

    def _copy(self, source: torch.Tensor, to_device: bool, blocks: bool) -> None:
        tally, asker = self.tally, _asker()
        copies, num_bytes = (
            (tally.to_device, tally.to_device_bytes) if to_device else (tally.to_host, tally.to_host_bytes)
        )
        copies[asker] += 1
        num_bytes[asker] += source.nbytes
        if not to_device or (blocks and tally.is_busy):
            tally.wait()


class _Attention(torch.autograd.Function):
    """One kernel each way, as a GPU has it; torch would take it apart on a device that it does not know."""

    @staticmethod
    def forward(ctx: Any, tally: Tally, attend: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.tally, ctx.attend = tally, attend
        tally.launch("attention")
        return PretendTensor(attend(*map(_held, tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.tally.launch("attention_backward")
        with torch.enable_grad():
            inputs = [_held(tensor).detach().requires_grad_() for tensor in ctx.saved_tensors]
            answer = ctx.attend(*inputs)
        return None, None, *map(PretendTensor, torch.autograd.grad(answer, inputs, *map(_held, gradients)))


@contextmanager
def pretend_device(skipped: frozenset[str] = frozenset()) -> Iterator[Tally]:
    """Inside, ``DEVICE`` computes. Triton's kernels are interpreted: ``TRITON_INTERPRET=1`` must have been set. Kernels
    that are ``skipped`` count and compute nothing.
    """
    tally, plain, launch = Tally(), torch.tensor, cuda.launch

    def tensor(data: Any, *, dtype: Any = None, device: Any = None) -> torch.Tensor:
        made = plain(data, dtype=dtype)
        return made if device is None else made.to(device)

    def counted(kernel: str, grid: tuple[int, ...], *arguments: object) -> None:
        tally.launch(kernel)
        if kernel not in skipped:
            launch(kernel, grid, *map(_held, arguments))

    attend = F.scaled_dot_product_attention

    def attention(  # as many arguments as attention has
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, _held(attn_mask), dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        if isinstance(query, PretendTensor):
            return _Attention.apply(tally, masked, query, key, value)  # type: ignore[no-any-return]
        return masked(query, key, value)

    # Torch asks these without dispatching them; the device's generators and optimiser are the CPU's.
    supported = optimizer._get_fused_kernels_supported_devices()  # type: ignore[attr-defined]
    loops = optimizer._get_foreach_kernels_supported_devices()
    replaced: list[tuple[object, str, Any]] = [
        (torch, "tensor", tensor),
        (torch, "Generator", _Generator),
        (optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported, DEVICE.type]),
        (optimizer, "_get_foreach_kernels_supported_devices", lambda: [*loops, DEVICE.type]),
        (optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, PretendTensor]),
        (F, "scaled_dot_product_attention", attention),
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
        if module.startswith("raydream.") and module != __name__:
            return f"{module.removeprefix('raydream.')}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
