"""The CUDA kernels as a ``Backend``: Triton (``cuda_*.py``) and, for what is left, torch.

Importable without triton and without CUDA; calling it needs both, or triton alone under ``TRITON_INTERPRET=1``.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from raydream.backend import reference
from raydream.backend.layout import is_dense
from raydream.types import Fragments, HashGridLayout, Rays, RaySamples

SAMPLES_PER_PROGRAM = 128
RAYS_PER_PROGRAM = 32
PIXELS_PER_PROGRAM, PROGRAMS_WANTED = 128, 1 << 14  # of faces, each of which may cover one pixel or all
RAYS_PER_WALK, INTERVALS_PER_WALK = 4, 64  # of a program that counts or writes packed samples


class CudaBackend:
    """The Triton kernels. Its one sum without an order is the gradient of the hash grid: in floats, unless it is asked
    to be ``deterministic``; then in 64-bit integers, the same bits each time, which are twice as much to add.

    Of meshes, faces are found by a kernel; interpolation, outlines and their gradients are plain torch, whose outlines
    make the host wait.
    """

    name = "cuda"
    interpolate = staticmethod(reference.interpolate)
    antialias = staticmethod(reference.antialias)

    def __init__(self, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    def field(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> Float[Tensor, "sample out"]:
        _check_table(table, layout)
        encoded = _HashGrid.apply(points.detach().contiguous(), table.contiguous(), layout, self._deterministic)
        return reference.mlp(encoded, hidden, head)

    def field_gradient(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample 3"]]:
        _check_table(table, layout)
        inputs = points.detach().contiguous(), table.contiguous(), layout, self._deterministic
        encoded, jacobian = _HashGridJacobian.apply(*inputs)
        return reference.mlp_gradient(encoded, jacobian, hidden, head)

    def march(
        self,
        rays: Rays,
        occupancy: Bool[Tensor, "rx ry rz"],
        radius: float,
        step_size: float,
        jitter: Float[Tensor, " ray"],
    ) -> RaySamples:
        """Intervals inside the box whose midpoint lies in an occupied cell: the reference's, bit by bit.

        The host waits once, for their number.
        """
        origins = rays.origins.contiguous()
        spans = (origins, rays.directions.contiguous(), jitter.to(origins.dtype).contiguous())
        numbers = _numbers(radius, step_size, origins.dtype, origins.device)
        walked = (*spans, occupancy.contiguous().view(torch.uint8), numbers)
        return _pack("march", walked, origins, len(origins), tuple(occupancy.shape))

    def prune(
        self,
        density: Float[Tensor, " sample"],
        samples: RaySamples,
        min_alpha: Float[Tensor, ""],
        min_transmittance: float,
    ) -> RaySamples:
        """The samples that can be seen. The host waits once, for their number."""
        least_depth, most_depth = reference.visible_depths(min_alpha, min_transmittance)
        spans = [part.contiguous() for part in (samples.t_start, samples.t_end, samples.starts, samples.counts)]
        walked = (density.contiguous(), *spans, least_depth.float(), most_depth)
        return _pack("prune", walked, samples.t_start, len(samples.counts), ())

    def composite(
        self, density: Float[Tensor, " sample"], values: Float[Tensor, "sample channel"], samples: RaySamples
    ) -> tuple[Float[Tensor, "ray channel"], Float[Tensor, " ray"], Float[Tensor, " sample"]]:
        assert len(density) == len(values) == len(samples.t_start), "samples do not match"
        return _Composite.apply(density.contiguous(), values.contiguous(), samples)

    def rasterize(
        self, clip: Float[Tensor, "view vertex 4"], faces: Int[Tensor, "face 3"], height_px: int, width_px: int
    ) -> Fragments:
        """The nearest face at each pixel centre: the reference's, bit by bit. The host waits for nothing."""
        corners, spans = reference.face_corners(clip, faces.long(), height_px, width_px)
        num_views, num_faces, num_pixels = len(clip), len(faces), height_px * width_px
        nearest = clip.new_full((num_views, num_pixels), math.inf)
        bits = nearest.view(torch.int32 if clip.dtype == torch.float32 else torch.int64)
        lowest = torch.full((num_views, num_pixels), num_faces, dtype=torch.int32, device=clip.device)
        splits = max(1, min(64, PROGRAMS_WANTED // max(num_views * num_faces, 1)))
        grid, sizes = (num_faces, num_views, splits), (num_faces, num_pixels, width_px, splits)
        for winners in (False, True):
            launch("depth_test", grid, corners.detach(), spans.int(), bits, lowest, *sizes, winners, PIXELS_PER_PROGRAM)
        face = torch.where(lowest == num_faces, -1, lowest).long()
        return reference.make_fragments(corners, face.view(num_views, height_px, width_px))


class _HashGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, layout, deterministic):
        ctx.save_for_backward(points)
        ctx.layout, ctx.deterministic = layout, deterministic
        encoded = _by_feature(points, table, layout)
        _encode("encode", points, layout, encoded, table, _levels(layout, points.device), encoded)
        return encoded

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_encoded):
        (points,) = ctx.saved_tensors
        grad_table = _sum_gradient(ctx, "encode_backward", points, lambda: _largest(grad_encoded), grad_encoded)
        return None, grad_table, None, None


class _HashGridJacobian(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, layout, deterministic):
        ctx.save_for_backward(points)
        ctx.layout, ctx.deterministic = layout, deterministic
        encoded = _by_feature(points, table, layout)
        jacobian = table.new_empty(len(points), 3, layout.num_features)
        levels = _levels(layout, points.device)
        _encode("encode_jacobian", points, layout, encoded, table, levels, encoded, jacobian)
        return encoded, jacobian

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_encoded, grad_jacobian):
        (points,) = ctx.saved_tensors
        steepest = 3 * 1.5 * max(ctx.layout.resolutions)  # the slope of smoothstep is 1.5 at most
        grads = grad_encoded, grad_jacobian.contiguous()
        grad_table = _sum_gradient(
            ctx,
            "encode_jacobian_backward",
            points,
            lambda: _largest(grad_encoded) + steepest * _largest(grad_jacobian),
            *grads,
        )
        return None, grad_table, None, None


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, density, values, samples):
        num_rays, num_channels = len(samples.counts), values.shape[1]
        accumulated, opacity = values.new_empty(num_rays, num_channels), density.new_empty(num_rays)
        weights, remaining = torch.empty_like(density), torch.empty_like(density)
        spans = [part.contiguous() for part in (samples.t_start, samples.t_end, samples.starts, samples.counts)]
        sizes = (num_rays, num_channels, _power_of_two(num_channels), RAYS_PER_PROGRAM)
        grid = (_blocks(num_rays, RAYS_PER_PROGRAM),)
        launch("composite", grid, density, values, *spans, accumulated, opacity, weights, remaining, *sizes)
        ctx.save_for_backward(values, weights, remaining)
        ctx.spans, ctx.sizes, ctx.grid = spans, sizes, grid
        return accumulated, opacity, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        values, weights, remaining = ctx.saved_tensors
        grad_density, grad_values = torch.empty_like(weights), torch.empty_like(values)
        upstream = map(Tensor.contiguous, grads)
        inputs = (values, *ctx.spans, weights, remaining, *upstream)
        launch("composite_backward", ctx.grid, *inputs, grad_density, grad_values, *ctx.sizes)
        return grad_density, grad_values, None


def launch(kernel: str, grid: tuple[int, ...], *arguments: object) -> None:
    """Starts the kernel of that name on the device of its first argument, if there is anything to do."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    if 0 not in grid:
        with _on(first.device):
            find_kernel(kernel)[grid](*arguments, enable_fp_fusion=may_fuse(kernel))


def find_kernel(name: str) -> Any:
    """Triton's function of that name, looked for on use: its module needs triton."""
    from raydream.backend import cuda_field, cuda_raster, cuda_render

    return next(getattr(room, name) for room in (cuda_field, cuda_render, cuda_raster) if hasattr(room, name))


def may_fuse(kernel: str) -> bool:
    """Whether products may be contracted with sums: not where a decision must be the reference's, bit by bit."""
    return kernel.startswith(("encode", "composite"))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _pack(kind: str, walked: tuple[object, ...], like: Tensor, num_rays: int, shape: tuple[int, ...]) -> RaySamples:
    """What the kernels ``kind``_count and ``kind``_write find on ``walked``, as samples in the dtype of ``like``."""
    grid, sizes = (_blocks(num_rays, RAYS_PER_WALK),), (num_rays, *shape, RAYS_PER_WALK, INTERVALS_PER_WALK)
    counts = torch.empty(num_rays, dtype=torch.long, device=like.device)
    launch(f"{kind}_count", grid, *walked, counts, *sizes)
    ends = counts.cumsum(0)
    total = int(ends[-1]) if num_rays else 0
    ray_index = torch.empty(total, dtype=torch.long, device=like.device)
    t_start, t_end = like.new_empty(total), like.new_empty(total)
    if total:
        launch(f"{kind}_write", grid, *walked, ends, ray_index, t_start, t_end, *sizes)
    return RaySamples(ray_index, t_start, t_end, ends - counts, counts)


def _by_feature(
    points: Float[Tensor, "sample 3"], table: Float[Tensor, "entry feature"], layout: HashGridLayout
) -> Float[Tensor, "sample width"]:
    return table.new_empty(layout.num_features, len(points)).t()


def _encode(
    kernel: str,
    points: Float[Tensor, "sample 3"],
    layout: HashGridLayout,
    strided: Float[Tensor, "sample width"],
    *arguments: Tensor,
) -> None:
    """Starts a hash grid kernel; the places of ``strided`` are those of features."""
    grid = _blocks(len(points), SAMPLES_PER_PROGRAM), layout.num_levels
    features = layout.features_per_level
    smooth = layout.interpolation == "smoothstep"
    sizes = (len(points), *strided.stride(), features, _power_of_two(features), smooth, SAMPLES_PER_PROGRAM)
    launch(kernel, grid, points, *arguments, *sizes)


def _sum_gradient(
    ctx: torch.autograd.function.FunctionCtx,
    kernel: str,
    points: Float[Tensor, "sample 3"],
    most: Callable[[], Tensor],
    *grads: Tensor,
) -> Float[Tensor, "entry feature"]:
    """The table's gradient by ``kernel``; ``most`` bounds what one sample adds to an entry."""
    layout, levels = ctx.layout, _levels(ctx.layout, points.device)  # type: ignore[attr-defined]
    shape = (layout.num_entries, layout.features_per_level)
    if not ctx.deterministic:  # type: ignore[attr-defined]
        total = grads[0].new_zeros(shape)
        _encode(kernel, points, layout, grads[0], *grads, levels, total, total)
        return total
    scale = _integer_scale(most() * len(points))
    counted = torch.zeros(shape, dtype=torch.long, device=points.device)
    _encode(kernel, points, layout, grads[0], *grads, levels, scale, counted)
    return counted.to(scale.dtype) / scale


@lru_cache
def _numbers(radius: float, step_size: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "3"]:
    return torch.tensor([radius, step_size, 0.5 / radius], dtype=dtype, device=device)


@lru_cache
def _levels(layout: HashGridLayout, device: torch.device) -> Int[Tensor, "level 4"]:
    rows = [
        (cells, layout.offsets[level], layout.offsets[level + 1] - layout.offsets[level] - 1, is_dense(layout, level))
        for level, cells in enumerate(layout.resolutions)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


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
