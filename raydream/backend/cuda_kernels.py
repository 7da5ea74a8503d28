"""Triton kernels of the hash grid and of compositing; their plain torch twins are in ``reference.py``.

Only ``cuda.py`` imports this module, because it needs triton. A program of a hash grid kernel takes a block of samples
at one level; ``levels`` holds a row for each level: cells along an axis, first entry in the table, entries minus one,
and whether the level is stored densely. ``LANES`` is the number of features of a level, rounded up to a power of two.
"""

from typing import no_type_check

import triton
import triton.language as tl

# The primes of layout.py; 32 bits, wrapped, are enough: only the low bits of the products survive the mask.
PRIME_Y = tl.constexpr(2_654_435_761 - 2**32)
PRIME_Z = tl.constexpr(805_459_861)


# no_type_check, here and below, keeps jaxtyping's import hook from wrapping what triton has to compile.
@triton.jit
@no_type_check
def encode(
    points, table, levels, encoded, num_samples, width, FEATURES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores the trilinear features of each sample."""
    sample, lane, kept, at = _own(num_samples, width, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, _ = _cell(points, levels, sample, num_samples)
    value = tl.zeros([BLOCK, LANES], dtype=encoded.dtype.element_ty)
    for corner in tl.static_range(8):
        place = _place(levels, x0, y0, z0, corner) * FEATURES
        weight = _along(x, corner & 1) * _along(y, corner >> 1 & 1) * _along(z, corner >> 2)
        value += weight[:, None] * tl.load(table + place[:, None] + lane, mask=kept, other=0)
    tl.store(encoded + at, value, mask=kept)


@triton.jit
@no_type_check
def encode_backward(
    points, grad_encoded, levels, scale, grad_table, num_samples, width,
    FEATURES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds ``scale`` times each sample's gradient to the integers of ``grad_table``: integer sums have no order."""
    sample, lane, kept, at = _own(num_samples, width, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, _ = _cell(points, levels, sample, num_samples)
    grad = tl.load(grad_encoded + at, mask=kept, other=0) * tl.load(scale)
    for corner in tl.static_range(8):
        place = _place(levels, x0, y0, z0, corner) * FEATURES
        weight = _along(x, corner & 1) * _along(y, corner >> 1 & 1) * _along(z, corner >> 2)
        tl.atomic_add(
            grad_table + place[:, None] + lane, (weight[:, None] * grad).to(tl.int64), mask=kept, sem="relaxed"
        )


@triton.jit
@no_type_check
def encode_jacobian(
    points, table, levels, encoded, jacobian, num_samples, width,
    FEATURES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores features and, in ``jacobian`` [sample, 3, width], their derivatives by the point's coordinates."""
    sample, lane, kept, at = _own(num_samples, width, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, cells = _cell(points, levels, sample, num_samples)
    value = tl.zeros([BLOCK, LANES], dtype=encoded.dtype.element_ty)
    dx, dy, dz = value, value, value
    for corner in tl.static_range(8):
        place = _place(levels, x0, y0, z0, corner) * FEATURES
        entry = tl.load(table + place[:, None] + lane, mask=kept, other=0)
        wx, wy, wz = _along(x, corner & 1), _along(y, corner >> 1 & 1), _along(z, corner >> 2)
        value += (wx * wy * wz)[:, None] * entry
        dx += (wy * wz)[:, None] * entry * ((corner & 1) * 2 - 1)
        dy += (wx * wz)[:, None] * entry * ((corner >> 1 & 1) * 2 - 1)
        dz += (wx * wy)[:, None] * entry * ((corner >> 2) * 2 - 1)
    at_jacobian = at + sample[:, None] * (2 * width)
    tl.store(encoded + at, value, mask=kept)
    tl.store(jacobian + at_jacobian, dx * _slope(points, sample, 0, cells, num_samples)[:, None], mask=kept)
    tl.store(jacobian + at_jacobian + width, dy * _slope(points, sample, 1, cells, num_samples)[:, None], mask=kept)
    tl.store(jacobian + at_jacobian + 2 * width, dz * _slope(points, sample, 2, cells, num_samples)[:, None], mask=kept)


@triton.jit
@no_type_check
def encode_jacobian_backward(
    points, grad_encoded, grad_jacobian, levels, scale, grad_table, num_samples, width,
    FEATURES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The adjoint of ``encode_jacobian`` by the table, in the integers of ``encode_backward``."""
    sample, lane, kept, at = _own(num_samples, width, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, cells = _cell(points, levels, sample, num_samples)
    factor = tl.load(scale)
    at_jacobian = grad_jacobian + at + sample[:, None] * (2 * width)
    grad = tl.load(grad_encoded + at, mask=kept, other=0) * factor
    dx = tl.load(at_jacobian, mask=kept, other=0) * (factor * _slope(points, sample, 0, cells, num_samples))[:, None]
    dy = (
        tl.load(at_jacobian + width, mask=kept, other=0)
        * (factor * _slope(points, sample, 1, cells, num_samples))[:, None]
    )
    dz = (
        tl.load(at_jacobian + 2 * width, mask=kept, other=0)
        * (factor * _slope(points, sample, 2, cells, num_samples))[:, None]
    )
    for corner in tl.static_range(8):
        place = _place(levels, x0, y0, z0, corner) * FEATURES
        wx, wy, wz = _along(x, corner & 1), _along(y, corner >> 1 & 1), _along(z, corner >> 2)
        total = (wx * wy * wz)[:, None] * grad
        total += (wy * wz)[:, None] * dx * ((corner & 1) * 2 - 1)
        total += (wx * wz)[:, None] * dy * ((corner >> 1 & 1) * 2 - 1)
        total += (wx * wy)[:, None] * dz * ((corner >> 2) * 2 - 1)
        tl.atomic_add(grad_table + place[:, None] + lane, total.to(tl.int64), mask=kept, sem="relaxed")


@triton.jit
@no_type_check
def _own(num_samples, width, FEATURES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """This program's samples, its lanes as a row, what it may touch, and the places of its features."""
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)[None, :]
    kept = (sample < num_samples)[:, None] & (lane < FEATURES)
    return sample, lane, kept, sample[:, None] * width + tl.program_id(1) * FEATURES + lane


@triton.jit
@no_type_check
def _cell(points, levels, sample, num_samples):
    """Lower corner of each point's cell, the point's place in it, and the level's cells along an axis."""
    cells = tl.load(levels + tl.program_id(1) * 4)
    x = _clamped(points, sample, 0, num_samples) * cells
    y = _clamped(points, sample, 1, num_samples) * cells
    z = _clamped(points, sample, 2, num_samples) * cells
    x0, y0, z0 = (
        tl.minimum(x.to(tl.int32), cells - 1),
        tl.minimum(y.to(tl.int32), cells - 1),
        tl.minimum(z.to(tl.int32), cells - 1),
    )
    return x0, y0, z0, x - x0, y - y0, z - z0, cells


@triton.jit
@no_type_check
def _clamped(points, sample, axis: tl.constexpr, num_samples):
    # The comparison turns a NaN into 0: it must not become an index.
    point = tl.load(points + sample * 3 + axis, mask=sample < num_samples, other=0)
    return tl.minimum(tl.where(point > 0, point, 0), 1)


@triton.jit
@no_type_check
def _slope(points, sample, axis: tl.constexpr, cells, num_samples):
    """d(place in the grid)/d(point): the level's cells, or 0 along an axis where clamping holds the point."""
    point = tl.load(points + sample * 3 + axis, mask=sample < num_samples, other=0)
    return tl.where((point >= 0) & (point <= 1), cells, 0).to(point.dtype)


@triton.jit
@no_type_check
def _place(levels, x, y, z, corner: tl.constexpr):
    """Entry in the table of one of the eight corners of a cell, x fastest."""
    row = levels + tl.program_id(1) * 4
    cells, offset, mask, dense = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    x, y, z = x + (corner & 1), y + (corner >> 1 & 1), z + (corner >> 2)
    stored = x + (cells + 1) * (y + (cells + 1) * z)
    hashed = (x ^ (y * PRIME_Y) ^ (z * PRIME_Z)) & mask
    return offset + tl.where(dense != 0, stored, hashed)


@triton.jit
@no_type_check
def _along(fraction, upper: tl.constexpr):
    return fraction if upper else 1 - fraction


@triton.jit
@no_type_check
def composite(
    density, values, t_start, t_end, starts, counts, accumulated, opacity, weights, remaining, num_rays, num_channels,
    CHANNELS: tl.constexpr, RAYS: tl.constexpr,
):  # fmt: skip
    """A ray in each lane walks forwards; see ``cpu_render.composite``."""
    ray, channel, start, count, kept = _rays(starts, counts, num_rays, num_channels, CHANNELS, RAYS)
    total = tl.zeros([RAYS], dtype=weights.dtype.element_ty)
    transmittance = total + 1
    color = tl.zeros([RAYS, CHANNELS], dtype=weights.dtype.element_ty)
    for k in range(tl.max(count, axis=0)):
        inside, i = k < count, start + k
        length = tl.load(t_end + i, mask=inside, other=0) - tl.load(t_start + i, mask=inside, other=0)
        depth = tl.load(density + i, mask=inside, other=0) * length
        # 1 - exp cancels where the optical depth is small; there the series is exact to float32.
        series = depth * (1 - depth * (1 / 2 - depth * (1 / 6 - depth / 24)))
        alpha = tl.where(depth < 0.05, series, 1 - tl.exp(-depth))
        weight = transmittance * alpha
        transmittance -= weight
        value = tl.load(values + i[:, None] * num_channels + channel, mask=inside[:, None] & kept, other=0)
        color += weight[:, None] * value
        total += weight
        tl.store(weights + i, weight, mask=inside)
        tl.store(remaining + i, transmittance, mask=inside)
    tl.store(opacity + ray, total, mask=ray < num_rays)
    tl.store(accumulated + ray[:, None] * num_channels + channel, color, mask=kept)


@triton.jit
@no_type_check
def composite_backward(
    values, t_start, t_end, starts, counts, weights, remaining, grad_accumulated, grad_opacity, grad_weights,
    grad_density, grad_values, num_rays, num_channels, CHANNELS: tl.constexpr, RAYS: tl.constexpr,
):  # fmt: skip
    """A ray in each lane walks backwards; see ``cpu_render.composite_backward``."""
    ray, channel, start, count, kept = _rays(starts, counts, num_rays, num_channels, CHANNELS, RAYS)
    behind = tl.zeros([RAYS], dtype=weights.dtype.element_ty)
    grad_color = tl.load(grad_accumulated + ray[:, None] * num_channels + channel, mask=kept, other=0)
    grad_total = tl.load(grad_opacity + ray, mask=ray < num_rays, other=0)
    for back in range(tl.max(count, axis=0)):
        inside, i = back < count, start + count - 1 - back
        at, both = i[:, None] * num_channels + channel, inside[:, None] & kept
        weight = tl.load(weights + i, mask=inside, other=0)
        grad = grad_total + tl.load(grad_weights + i, mask=inside, other=0)
        grad += tl.sum(grad_color * tl.load(values + at, mask=both, other=0), axis=1)
        length = tl.load(t_end + i, mask=inside, other=0) - tl.load(t_start + i, mask=inside, other=0)
        slope = tl.load(remaining + i, mask=inside, other=0) * grad - behind
        tl.store(grad_density + i, slope * length, mask=inside)
        tl.store(grad_values + at, weight[:, None] * grad_color, mask=both)
        behind += weight * grad


@triton.jit
@no_type_check
def _rays(starts, counts, num_rays, num_channels, CHANNELS: tl.constexpr, RAYS: tl.constexpr):
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    channel = tl.arange(0, CHANNELS)[None, :]
    start = tl.load(starts + ray, mask=ray < num_rays, other=0)
    count = tl.load(counts + ray, mask=ray < num_rays, other=0)
    return ray, channel, start, count, (ray < num_rays)[:, None] & (channel < num_channels)
