"""Triton kernels of the hash grid; their plain torch twins are in ``reference.py``.

Only ``cuda.py`` imports this module, because it needs triton. A program takes a block of samples at one level;
``levels`` holds a row for each level: cells along an axis, first entry in the table, entries minus one, and whether the
level is stored densely. ``LANES`` is the number of features of a level, rounded up to a power of two. Features stand at
``sample * sample_stride + feature * feature_stride``: stored feature by feature, neighbouring lanes write neighbours.

A gradient is added to ``grad_table`` as its type says: floats as they are, in whatever order; integers times ``scale``,
whose sum has no order, so that it is the same bits each time.
"""

from typing import no_type_check

import triton
import triton.language as tl

# The primes of layout.py; 32 bits, wrapped, are enough: only the low bits of the products survive the mask.
PRIME_Y = tl.constexpr(2_654_435_761 - 2**32)
PRIME_Z = tl.constexpr(805_459_861)
COUNTED = ("num_samples", "feature_stride")  # other numbers in each step, for which nothing is compiled anew


# no_type_check, here and below, keeps jaxtyping's import hook from wrapping what triton has to compile.
@triton.jit(do_not_specialize=COUNTED)
@no_type_check
def encode(
    points, table, levels, encoded, num_samples, sample_stride, feature_stride,
    FEATURES: tl.constexpr, LANES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the features of each sample."""
    sample, lane, kept, at = _own(num_samples, sample_stride, feature_stride, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, _, _, _ = _cell(points, levels, sample, num_samples, SMOOTH)
    value = tl.zeros([BLOCK, LANES], dtype=encoded.dtype.element_ty)
    for corner in tl.static_range(8):
        place = _place(levels, x0, y0, z0, corner) * FEATURES
        weight = _along(x, corner & 1) * _along(y, corner >> 1 & 1) * _along(z, corner >> 2)
        value += weight[:, None] * tl.load(table + place[:, None] + lane, mask=kept, other=0)
    tl.store(encoded + at, value, mask=kept)


@triton.jit(do_not_specialize=COUNTED)
@no_type_check
def encode_backward(
    points, grad_encoded, levels, scale, grad_table, num_samples, sample_stride, feature_stride,
    FEATURES: tl.constexpr, LANES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds each sample's gradient to ``grad_table``."""
    sample, lane, kept, at = _own(num_samples, sample_stride, feature_stride, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, _, _, _ = _cell(points, levels, sample, num_samples, SMOOTH)
    grad = tl.load(grad_encoded + at, mask=kept, other=0) * _factor(scale, grad_table)
    for corner in tl.static_range(8):
        place = _place(levels, x0, y0, z0, corner) * FEATURES
        weight = _along(x, corner & 1) * _along(y, corner >> 1 & 1) * _along(z, corner >> 2)
        _add(grad_table, place[:, None] + lane, weight[:, None] * grad, kept)


@triton.jit(do_not_specialize=COUNTED)
@no_type_check
def encode_jacobian(
    points, table, levels, encoded, jacobian, num_samples, sample_stride, feature_stride,
    FEATURES: tl.constexpr, LANES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores features and, in ``jacobian`` [sample, 3, width], their derivatives by the point's coordinates."""
    sample, lane, kept, at = _own(num_samples, sample_stride, feature_stride, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, slope_x, slope_y, slope_z = _cell(points, levels, sample, num_samples, SMOOTH)
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
    tl.store(encoded + at, value, mask=kept)
    row, width = _jacobian_row(sample, lane, FEATURES)
    tl.store(jacobian + row, dx * slope_x[:, None], mask=kept)
    tl.store(jacobian + row + width, dy * slope_y[:, None], mask=kept)
    tl.store(jacobian + row + 2 * width, dz * slope_z[:, None], mask=kept)


@triton.jit(do_not_specialize=COUNTED)
@no_type_check
def encode_jacobian_backward(
    points, grad_encoded, grad_jacobian, levels, scale, grad_table, num_samples, sample_stride, feature_stride,
    FEATURES: tl.constexpr, LANES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The adjoint of ``encode_jacobian`` by the table."""
    sample, lane, kept, at = _own(num_samples, sample_stride, feature_stride, FEATURES, LANES, BLOCK)
    x0, y0, z0, x, y, z, slope_x, slope_y, slope_z = _cell(points, levels, sample, num_samples, SMOOTH)
    factor = _factor(scale, grad_table)
    row, width = _jacobian_row(sample, lane, FEATURES)
    grad = tl.load(grad_encoded + at, mask=kept, other=0) * factor
    dx = tl.load(grad_jacobian + row, mask=kept, other=0) * (factor * slope_x)[:, None]
    dy = tl.load(grad_jacobian + row + width, mask=kept, other=0) * (factor * slope_y)[:, None]
    dz = tl.load(grad_jacobian + row + 2 * width, mask=kept, other=0) * (factor * slope_z)[:, None]
    for corner in tl.static_range(8):
        place = _place(levels, x0, y0, z0, corner) * FEATURES
        wx, wy, wz = _along(x, corner & 1), _along(y, corner >> 1 & 1), _along(z, corner >> 2)
        total = (wx * wy * wz)[:, None] * grad
        total += (wy * wz)[:, None] * dx * ((corner & 1) * 2 - 1)
        total += (wx * wz)[:, None] * dy * ((corner >> 1 & 1) * 2 - 1)
        total += (wx * wy)[:, None] * dz * ((corner >> 2) * 2 - 1)
        _add(grad_table, place[:, None] + lane, total, kept)


@triton.jit
@no_type_check
def _own(num_samples, sample_stride, feature_stride, FEATURES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """This program's samples, its lanes as a row, what it may touch, and the places of its features."""
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)[None, :]
    kept = (sample < num_samples)[:, None] & (lane < FEATURES)
    feature = (tl.program_id(1) * FEATURES + lane).to(tl.int64)
    return sample, lane, kept, sample[:, None] * sample_stride + feature * feature_stride


@triton.jit
@no_type_check
def _jacobian_row(sample, lane, FEATURES: tl.constexpr):
    """The places of this program's derivatives by x, and how much further those by y are."""
    width = tl.num_programs(1) * FEATURES
    return sample[:, None] * (3 * width) + tl.program_id(1) * FEATURES + lane, width


@triton.jit
@no_type_check
def _factor(scale, grad_table):
    """What integers are counted in; 1 where the sum is of floats."""
    return tl.load(scale) if grad_table.dtype.element_ty == tl.int64 else 1.0


@triton.jit
@no_type_check
def _add(grad_table, place, value, kept):
    tl.atomic_add(grad_table + place, value.to(grad_table.dtype.element_ty), mask=kept, sem="relaxed")


@triton.jit
@no_type_check
def _cell(points, levels, sample, num_samples, SMOOTH: tl.constexpr):
    """Lower corner of each point's cell, the upper corners' weight along each axis, and its derivative by the point."""
    cells = tl.load(levels + tl.program_id(1) * 4)
    x = _clamped(points, sample, 0, num_samples) * cells
    y = _clamped(points, sample, 1, num_samples) * cells
    z = _clamped(points, sample, 2, num_samples) * cells
    x0, y0, z0 = (
        tl.minimum(x.to(tl.int32), cells - 1),
        tl.minimum(y.to(tl.int32), cells - 1),
        tl.minimum(z.to(tl.int32), cells - 1),
    )
    x, y, z = x - x0, y - y0, z - z0
    slope_x = _slope(points, sample, 0, cells, num_samples, x, SMOOTH)
    slope_y = _slope(points, sample, 1, cells, num_samples, y, SMOOTH)
    slope_z = _slope(points, sample, 2, cells, num_samples, z, SMOOTH)
    return x0, y0, z0, _blend(x, SMOOTH), _blend(y, SMOOTH), _blend(z, SMOOTH), slope_x, slope_y, slope_z


@triton.jit
@no_type_check
def _clamped(points, sample, axis: tl.constexpr, num_samples):
    # The comparison turns a NaN into 0: it must not become an index.
    point = tl.load(points + sample * 3 + axis, mask=sample < num_samples, other=0)
    return tl.minimum(tl.where(point > 0, point, 0), 1)


@triton.jit
@no_type_check
def _slope(points, sample, axis: tl.constexpr, cells, num_samples, fraction, SMOOTH: tl.constexpr):
    """By the point's coordinate: the level's cells times the blend's slope; 0 where clamping holds the point."""
    point = tl.load(points + sample * 3 + axis, mask=sample < num_samples, other=0)
    slope = tl.where((point >= 0) & (point <= 1), cells, 0).to(point.dtype)
    return slope * 6 * fraction * (1 - fraction) if SMOOTH else slope


@triton.jit
@no_type_check
def _blend(fraction, SMOOTH: tl.constexpr):
    return fraction * fraction * (3 - 2 * fraction) if SMOOTH else fraction


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
