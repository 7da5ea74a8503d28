"""The CUDA kernels as a ``Backend``: Triton for the hash grid and for compositing, torch for the rest.

Importable without triton and without CUDA; calling it needs both, or triton alone under ``TRITON_INTERPRET=1``.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from raydream.backend import reference
from raydream.backend.layout import is_dense
from raydream.types import HashGridLayout, RaySamples

SAMPLES_PER_PROGRAM = 128
RAYS_PER_PROGRAM = 32


class CudaBackend:
    """The Triton kernels; every result is bitwise reproducible, for sums over samples are kept in integers."""

    name = "cuda"
    march = staticmethod(reference.march)
    rasterize = staticmethod(reference.rasterize)

    def field(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> Float[Tensor, "sample out"]:
        _check_table(table, layout)
        return reference.mlp(_HashGrid.apply(points.detach().contiguous(), table.contiguous(), layout), hidden, head)

    def field_gradient(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample 3"]]:
        _check_table(table, layout)
        encoded, jacobian = _HashGridJacobian.apply(points.detach().contiguous(), table.contiguous(), layout)
        return reference.mlp_gradient(encoded, jacobian, hidden, head)

    def composite(
        self, density: Float[Tensor, " sample"], values: Float[Tensor, "sample channel"], samples: RaySamples
    ) -> tuple[Float[Tensor, "ray channel"], Float[Tensor, " ray"], Float[Tensor, " sample"]]:
        assert len(density) == len(values) == len(samples.t_start), "samples do not match"
        return _Composite.apply(density.contiguous(), values.contiguous(), samples)


class _HashGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, layout):
        ctx.save_for_backward(points)
        ctx.layout, ctx.shape = layout, table.shape
        encoded = table.new_empty(len(points), layout.num_features)
        with _on(points.device):
            _kernels().encode[_grid(points, layout)](
                points, table, _levels(layout, points.device), encoded, *_sizes(points, layout)
            )
        return encoded

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_encoded):
        (points,) = ctx.saved_tensors
        grad_encoded = grad_encoded.contiguous()
        scale = _integer_scale(_largest(grad_encoded) * len(points))
        total = torch.zeros(ctx.shape, dtype=torch.long, device=points.device)
        with _on(points.device):
            _kernels().encode_backward[_grid(points, ctx.layout)](
                points, grad_encoded, _levels(ctx.layout, points.device), scale, total, *_sizes(points, ctx.layout)
            )
        return None, total.to(grad_encoded.dtype) / scale, None


class _HashGridJacobian(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, layout):
        ctx.save_for_backward(points)
        ctx.layout, ctx.shape = layout, table.shape
        encoded = table.new_empty(len(points), layout.num_features)
        jacobian = table.new_empty(len(points), 3, layout.num_features)
        with _on(points.device):
            _kernels().encode_jacobian[_grid(points, layout)](
                points, table, _levels(layout, points.device), encoded, jacobian, *_sizes(points, layout)
            )
        return encoded, jacobian

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_encoded, grad_jacobian):
        (points,) = ctx.saved_tensors
        grad_encoded, grad_jacobian = grad_encoded.contiguous(), grad_jacobian.contiguous()
        most = _largest(grad_encoded) + 3 * max(ctx.layout.resolutions) * _largest(grad_jacobian)
        scale = _integer_scale(most * len(points))
        total = torch.zeros(ctx.shape, dtype=torch.long, device=points.device)
        with _on(points.device):
            _kernels().encode_jacobian_backward[_grid(points, ctx.layout)](
                points,
                grad_encoded,
                grad_jacobian,
                _levels(ctx.layout, points.device),
                scale,
                total,
                *_sizes(points, ctx.layout),
            )
        return None, total.to(grad_encoded.dtype) / scale, None


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, density, values, samples):
        num_rays, num_channels = len(samples.counts), values.shape[1]
        accumulated, opacity = values.new_empty(num_rays, num_channels), density.new_empty(num_rays)
        weights, remaining = torch.empty_like(density), torch.empty_like(density)
        spans = [part.contiguous() for part in (samples.t_start, samples.t_end, samples.starts, samples.counts)]
        sizes = (num_rays, num_channels, _power_of_two(num_channels), RAYS_PER_PROGRAM)
        if num_rays:
            with _on(density.device):
                _kernels().composite[(_blocks(num_rays, RAYS_PER_PROGRAM),)](
                    density, values, *spans, accumulated, opacity, weights, remaining, *sizes
                )
        ctx.save_for_backward(values, weights, remaining)
        ctx.spans, ctx.sizes = spans, sizes
        return accumulated, opacity, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        values, weights, remaining = ctx.saved_tensors
        grad_density, grad_values = torch.empty_like(weights), torch.empty_like(values)
        if ctx.sizes[0]:
            with _on(values.device):
                _kernels().composite_backward[(_blocks(ctx.sizes[0], RAYS_PER_PROGRAM),)](
                    values,
                    *ctx.spans,
                    weights,
                    remaining,
                    *map(Tensor.contiguous, grads),
                    grad_density,
                    grad_values,
                    *ctx.sizes,
                )
        return grad_density, grad_values, None


@lru_cache
def _kernels() -> ModuleType:
    """The kernels, imported on first use: the module needs triton."""
    from raydream.backend import cuda_kernels

    return cuda_kernels


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def _levels(layout: HashGridLayout, device: torch.device) -> Int[Tensor, "level 4"]:
    rows = [
        (cells, layout.offsets[level], layout.offsets[level + 1] - layout.offsets[level] - 1, is_dense(layout, level))
        for level, cells in enumerate(layout.resolutions)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _grid(points: Float[Tensor, "sample 3"], layout: HashGridLayout) -> tuple[int, int]:
    return max(_blocks(len(points), SAMPLES_PER_PROGRAM), 1), layout.num_levels


def _sizes(points: Float[Tensor, "sample 3"], layout: HashGridLayout) -> tuple[int, int, int, int, int]:
    features = layout.features_per_level
    return len(points), layout.num_features, features, _power_of_two(features), SAMPLES_PER_PROGRAM


def _blocks(number: int, size: int) -> int:
    return -(-number // size)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _largest(grad: Tensor) -> Tensor:
    return grad.abs().amax() if grad.numel() else grad.new_zeros(())


def _integer_scale(bound: Tensor) -> Tensor:
    """The power of two that takes sums of up to ``bound`` into 62 bits; NaN where the bound is not finite."""
    exponent = 61 - torch.log2(bound.clamp(min=1e-30)).ceil().clamp(min=-60)
    return torch.where(bound.isfinite(), torch.exp2(exponent), math.nan)


def _check_table(table: Tensor, layout: HashGridLayout) -> None:
    # The kernels index without bounds, in 32 bits.
    assert table.shape == (layout.num_entries, layout.features_per_level), "the table does not fit the layout"
    assert table.numel() < 2**31, "the table is too large for 32-bit indices"
