"""What a piece of torch code takes, counted on meta tensors: bytes that live at once, and floating-point operations."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Tally:
    """``peak_bytes``: the most that tensors held at one moment beside those that were there before."""

    peak_bytes: int
    flops: float


def tally(work: Callable[[], object], there_before: Iterable[Tensor]) -> Tally:
    """Runs ``work`` on tensors of the meta device, with attention as a fused kernel would do it."""
    live, attention = _Live(there_before), _FusedAttention()
    with ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(live)
        stack.enter_context(attention.in_place())
        work()
    return Tally(live.peak, counter.get_total_flops() + attention.flops)


class _Live(TorchDispatchMode):
    """The bytes of all storages that were made under it and are still referred to."""

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak, self._now = 0, 0
        self._sizes: dict[int, int] = {}
        self._others = [tensor.untyped_storage() for tensor in there_before]
        self._ignored = {storage._cdata for storage in self._others}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in self._ignored:
                    self._sizes[key] = storage.nbytes()
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._forget, key)
        return result

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


class _FusedAttention:
    """Stands in for ``scaled_dot_product_attention``, which makes whole attention matrices on the meta device."""

    def __init__(self) -> None:
        self.flops = 0.0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with mock.patch.object(F, "scaled_dot_product_attention", self._answer):
            yield

    def _answer(  # as many arguments as attention has: none but the tensors changes what it takes
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        # two matrix products forward; backward makes one of them again and then four more (FlashAttention-2)
        products = 2.0 * query.numel() * key.shape[-2]
        self.flops += 2 * products
        if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
            self.flops += 5 * products
        return _Attention.apply(query, key, value)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its arguments, its answer, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer, rows = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, answer, rows)
        return answer

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
