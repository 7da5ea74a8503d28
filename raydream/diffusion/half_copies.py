"""Parameters that are learned in float32 and computed with in half precision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class HalfCopies:
    """Takes the parameters of modules out of them, and puts copies in half precision there for the time of a pass.

    A pass makes its own copies, so that they are never those before an update, and a backward pass may come at any time
    after; its gradients are the originals', in float32. The parameters of modules become this class's, by ``masters``.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._places = [(module, name) for module in modules for name, _ in module.named_parameters(recurse=False)]
        self.masters: list[Parameter] = [getattr(module, name) for module, name in self._places]
        for module, name in self._places:
            delattr(module, name)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Inside, the modules have their parameters."""
        for (module, name), copy in zip(self._places, _Copied.apply(self._dtype, *self.masters)):
            setattr(module, name, copy)
        try:
            yield
        finally:
            for module, name in self._places:
                delattr(module, name)


class _Copied(torch.autograd.Function):
    """Copies in another dtype, differentiable by what they are of: a few launches each way, however many there are."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_copied(masters, dtype))

    @staticmethod
    def backward(ctx: object, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(_copied([each for each in gradients if each is not None], torch.float32))
        return None, *(None if each is None else next(wide) for each in gradients)


def _copied(sources: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(source, dtype=dtype) for source in sources]
    if copies:
        torch._foreach_copy_(copies, list(sources))
    return copies
