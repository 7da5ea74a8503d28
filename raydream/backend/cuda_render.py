"""Triton kernels of ray marching and compositing; their plain torch twins are in ``reference.py``.

Only ``cuda.py`` imports this module, because it needs triton. What is packed is walked twice: the first time counts the
samples of each ray, the second writes them where the counts before it end. So memory is that of the samples kept. Where
kernels have ``LANES``, a program takes a block of rays and, of each, so many intervals at once.
"""

from typing import no_type_check

import triton
import triton.language as tl


# no_type_check, here and below, keeps jaxtyping's import hook from wrapping what triton has to compile.
@triton.jit
@no_type_check
def march_count(
    origins, directions, jitter, occupancy, numbers, counts, num_rays, x_cells, y_cells, z_cells,
    RAYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """How many intervals of each ray have their midpoint in an occupied cell.

    ``numbers``: the box's radius, the step, and what a scene unit is of the box's side.
    """
    ray, rays, most = _enter(origins, directions, jitter, numbers, num_rays, RAYS)
    count = tl.zeros([RAYS], dtype=tl.int64)
    for first in range(0, most, LANES):
        kept, _, _ = _intervals(rays, occupancy, numbers, x_cells, y_cells, z_cells, first, LANES)
        count += tl.sum(kept.to(tl.int32), axis=1)
    tl.store(counts + ray, count, mask=ray < num_rays)


@triton.jit
@no_type_check
def march_write(
    origins, directions, jitter, occupancy, numbers, ends, ray_index, t_start, t_end, num_rays,
    x_cells, y_cells, z_cells, RAYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Packs what ``march_count`` has counted; ``ends`` are its sums up to and with each ray."""
    ray, rays, most = _enter(origins, directions, jitter, numbers, num_rays, RAYS)
    place = _starts(ends, ray, num_rays)
    for first in range(0, most, LANES):
        kept, start, end = _intervals(rays, occupancy, numbers, x_cells, y_cells, z_cells, first, LANES)
        place = _pack(kept, place, ray, start, end, ray_index, t_start, t_end)


@triton.jit
@no_type_check
def prune_count(
    density, old_start, old_end, starts, counts, least_depth, most_depth, kept_counts, num_rays,
    RAYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """How many samples of each ray can be seen: see ``_seen``."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    before, kept_count = tl.zeros([RAYS], dtype=tl.float32), tl.zeros([RAYS], dtype=tl.int64)
    for first in range(0, _longest(counts, ray, num_rays), LANES):
        kept, before, _, _ = _seen(
            density, old_start, old_end, starts, counts, least_depth, most_depth, num_rays, ray, before, first, LANES
        )
        kept_count += tl.sum(kept.to(tl.int32), axis=1)
    tl.store(kept_counts + ray, kept_count, mask=ray < num_rays)


@triton.jit
@no_type_check
def prune_write(
    density, old_start, old_end, starts, counts, least_depth, most_depth, ends, ray_index, t_start, t_end, num_rays,
    RAYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Packs what ``prune_count`` has counted; ``ends`` are its sums up to and with each ray."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    before, place = tl.zeros([RAYS], dtype=tl.float32), _starts(ends, ray, num_rays)
    for first in range(0, _longest(counts, ray, num_rays), LANES):
        kept, before, start, end = _seen(
            density, old_start, old_end, starts, counts, least_depth, most_depth, num_rays, ray, before, first, LANES
        )
        place = _pack(kept, place, ray, start, end, ray_index, t_start, t_end)


@triton.jit
@no_type_check
def _enter(origins, directions, jitter, numbers, num_rays, RAYS: tl.constexpr):
    """This program's rays: their numbers; origins, directions, entry, exit, jitter; and the intervals of the longest.

    Operations and their order are the reference's here and in ``_intervals``, for which nothing may be fused either.
    """
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    x, dx, low_x, high_x = _slab(origins, directions, numbers, ray, num_rays, 0)
    y, dy, low_y, high_y = _slab(origins, directions, numbers, ray, num_rays, 1)
    z, dz, low_z, high_z = _slab(origins, directions, numbers, ray, num_rays, 2)
    near = tl.maximum(tl.maximum(low_x, low_y), tl.maximum(low_z, 0))
    far = tl.minimum(tl.minimum(high_x, high_y), high_z)
    crossed = far > near
    length = tl.where(crossed, far - tl.where(crossed, near, 0), 0)
    most = tl.max(_divide(length, tl.load(numbers + 1)).to(tl.int32), axis=0) + 2
    shift = tl.load(jitter + ray, mask=ray < num_rays, other=0)
    return ray, (x, y, z, dx, dy, dz, near, far, shift), most


@triton.jit
@no_type_check
def _slab(origins, directions, numbers, ray, num_rays, axis: tl.constexpr):
    """A ray's coordinate and direction, and distances between which it runs between two sides of the box: if it is
    parallel to them, always or never, which is also where there is no ray.
    """
    radius, infinity = tl.load(numbers), float("inf")
    origin = tl.load(origins + ray * 3 + axis, mask=ray < num_rays, other=infinity)
    along = tl.load(directions + ray * 3 + axis, mask=ray < num_rays, other=0)
    parallel, between = along == 0, tl.abs(origin) <= radius
    divisor = tl.where(parallel, 1, along)
    a, b = _divide(-radius - origin, divisor), _divide(radius - origin, divisor)
    low = tl.where(parallel, tl.where(between, -infinity, infinity), tl.minimum(a, b))
    high = tl.where(parallel, tl.where(between, infinity, -infinity), tl.maximum(a, b))
    return origin, along, low, high


@triton.jit
@no_type_check
def _divide(a, b):
    # A plain quotient of 32 bits is only close on a GPU.
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
@no_type_check
def _intervals(rays, occupancy, numbers, x_cells, y_cells, z_cells, first, LANES: tl.constexpr):
    """Which of ``LANES`` intervals from ``first`` on are kept, their starts and their ends."""
    x, y, z, dx, dy, dz, near, far, shift = rays
    step, scale = tl.load(numbers + 1), tl.load(numbers + 2)
    k = (first + tl.arange(0, LANES)).to(near.dtype)
    start = near[:, None] + (k[None, :] + shift[:, None]) * step
    middle = start + step * 0.5
    inside = middle < far[:, None]
    row = _cell_along(x, dx, middle, scale, x_cells) * y_cells + _cell_along(y, dy, middle, scale, y_cells)
    cell = row * z_cells + _cell_along(z, dz, middle, scale, z_cells)
    return inside & (tl.load(occupancy + cell, mask=inside, other=0) != 0), start, start + step


@triton.jit
@no_type_check
def _cell_along(origin, along, middle, scale, cells):
    place = ((origin[:, None] + middle * along[:, None]) * scale + 0.5) * cells
    # What is no place in the box is never looked up; held in it, its integer is defined.
    return tl.minimum(tl.where(place > 0, tl.minimum(place, cells), 0).to(tl.int32), cells - 1)


@triton.jit
@no_type_check
def _seen(
    density, old_start, old_end, starts, counts, least_depth, most_depth, num_rays, ray, before, first,
    LANES: tl.constexpr,
):  # fmt: skip
    """Which of ``LANES`` samples from ``first`` on can be seen, the optical depth before the next, starts and ends.

    Comparisons are such that a NaN is kept: what is wrong must show.
    """
    count = tl.load(counts + ray, mask=ray < num_rays, other=0)
    k = first + tl.arange(0, LANES)[None, :]
    inside, i = k < count[:, None], tl.load(starts + ray, mask=ray < num_rays, other=0)[:, None] + k
    start, end = tl.load(old_start + i, mask=inside, other=0), tl.load(old_end + i, mask=inside, other=0)
    depth = (tl.load(density + i, mask=inside, other=0) * (end - start)).to(tl.float32)
    # Held at what hides everything, lest the difference below cancels.
    held = tl.where(depth > 128, 128, depth)
    upto = before[:, None] + tl.cumsum(held, axis=1)
    hidden = (depth < tl.load(least_depth)) | (upto - held > most_depth)
    return inside & (hidden == 0), before + tl.sum(held, axis=1), start, end


@triton.jit
@no_type_check
def _longest(counts, ray, num_rays):
    return tl.max(tl.load(counts + ray, mask=ray < num_rays, other=0), axis=0).to(tl.int32)


@triton.jit
@no_type_check
def _starts(ends, ray, num_rays):
    """Where each ray's packed samples begin."""
    return tl.load(ends + ray - 1, mask=(ray > 0) & (ray < num_rays), other=0)


@triton.jit
@no_type_check
def _pack(kept, place, ray, start, end, ray_index, t_start, t_end):
    """Writes the kept lanes of each ray side by side from ``place`` on, and says where the next belong."""
    at = place[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - 1
    tl.store(ray_index + at, ray[:, None].to(tl.int64), mask=kept)
    tl.store(t_start + at, start, mask=kept)
    tl.store(t_end + at, end, mask=kept)
    return place + tl.sum(kept.to(tl.int32), axis=1)


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
