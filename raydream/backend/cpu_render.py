"""Numba kernels of ray marching and compositing; their plain torch twins are in ``reference.py``."""

import math
from typing import no_type_check

import numpy as np
from numba import njit

# no_type_check keeps jaxtyping's import hook from wrapping what numba has to compile. The march has no fastmath: its
# samples must be those of the reference, bit by bit.
exact_kernel = njit(nogil=True, cache=True, error_model="numpy")
kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@exact_kernel
@no_type_check
def march(origins, directions, occupancy, radius, step_size, inverse_diameter, jitter):
    """``ray_index, t_start, t_end, starts, counts`` of the packed samples; scalars have the arrays' dtype."""
    num_rays, number = origins.shape[0], origins.dtype.type
    half, half_step = number(0.5), number(0.5) * step_size
    x_cells, y_cells, z_cells = occupancy.shape
    x_scale, y_scale, z_scale = number(x_cells), number(y_cells), number(z_cells)
    near, far, first, last = _candidates(origins, directions, occupancy, radius, step_size, jitter)

    # One place more than can be filled: the loop writes a sample before it knows whether it stays.
    capacity = np.maximum(last - first, 0).sum() + 1
    ray_index = np.empty(capacity, np.int64)
    t_start, t_end = np.empty(capacity, origins.dtype), np.empty(capacity, origins.dtype)
    starts, counts = np.empty(num_rays, np.int64), np.empty(num_rays, np.int64)
    filled = np.uint64(0)
    for ray in range(num_rays):
        starts[ray] = filled
        origin_x, origin_y, origin_z = origins[ray, 0], origins[ray, 1], origins[ray, 2]
        along_x, along_y, along_z = directions[ray, 0], directions[ray, 1], directions[ray, 2]
        for k in range(first[ray], last[ray]):
            start = near[ray] + (number(k) + jitter[ray]) * step_size
            middle = start + half_step
            x = ((origin_x + middle * along_x) * inverse_diameter + half) * x_scale
            y = ((origin_y + middle * along_y) * inverse_diameter + half) * y_scale
            z = ((origin_z + middle * along_z) * inverse_diameter + half) * z_scale
            ray_index[filled], t_start[filled], t_end[filled] = ray, start, start + step_size
            occupied = occupancy[_cell(x, x_cells), _cell(y, y_cells), _cell(z, z_cells)]
            filled += np.uint64(occupied & (middle < far[ray]))
        counts[ray] = np.int64(filled) - starts[ray]
    return ray_index[:filled], t_start[:filled], t_end[:filled], starts, counts


@exact_kernel
@no_type_check
def _cell(coordinate, cells):
    # Truncation is the floor of what is not negative, and the rest is clamped to 0 anyway.
    return np.uint64(max(min(np.int64(coordinate), cells - 1), 0))


@exact_kernel
@no_type_check
def _candidates(origins, directions, occupancy, radius, step_size, jitter):
    """Where each ray enters and leaves the scene's box, and a range of intervals that holds all occupied ones.

    The range comes from the box of the occupied cells, grown by an eighth of a cell and by an interval at both ends:
    far more than rounding can do, so that only empty intervals are left out.
    """
    num_rays, number = origins.shape[0], origins.dtype.type
    lower, upper = np.empty(3, origins.dtype), np.empty(3, origins.dtype)
    for axis, (begin, end) in enumerate(_occupied_box(occupancy)):
        cell = 2 * radius / number(occupancy.shape[axis])
        lower[axis] = (number(begin) - number(0.125)) * cell - radius
        upper[axis] = (number(end) + number(0.125)) * cell - radius
    near, far = np.empty(num_rays, origins.dtype), np.empty(num_rays, origins.dtype)
    first, last = np.zeros(num_rays, np.int64), np.zeros(num_rays, np.int64)
    for ray in range(num_rays):
        near[ray], far[ray] = number(0), number(math.inf)
        enter, leave = number(0), number(math.inf)
        for axis in range(3):
            origin, direction = origins[ray, axis], directions[ray, axis]
            low, high = _slab(origin, direction, -radius, radius)
            near[ray], far[ray] = max(near[ray], low), min(far[ray], high)
            low, high = _slab(origin, direction, lower[axis], upper[axis])
            enter, leave = max(enter, low), min(leave, high)
        leave = min(leave, far[ray])
        if max(enter, near[ray]) <= leave:
            offset = jitter[ray] + number(0.5)
            first[ray] = max(np.int64(math.floor((enter - near[ray]) / step_size - offset)) - 1, 0)
            last[ray] = np.int64(math.ceil((leave - near[ray]) / step_size - offset)) + 2
    return near, far, first, last


@exact_kernel
@no_type_check
def _slab(origin, direction, lower, upper):
    """Distances between which a ray runs between two planes; a parallel ray does so always or never."""
    if direction == 0:
        infinity = type(origin)(math.inf)
        inside = lower <= origin <= upper
        return (-infinity, infinity) if inside else (infinity, -infinity)
    a, b = (lower - origin) / direction, (upper - origin) / direction
    return min(a, b), max(a, b)


@exact_kernel
@no_type_check
def _occupied_box(occupancy):
    """First and one past the last occupied cell along each axis; an empty grid has its first after its last."""
    x_cells, y_cells, z_cells = occupancy.shape
    x_first, x_last, y_first, y_last, z_first, z_last = x_cells, 0, y_cells, 0, z_cells, 0
    for x in range(x_cells):
        for y in range(y_cells):
            any_occupied = False
            for z in range(z_cells):
                any_occupied |= occupancy[x, y, z]
            if any_occupied:
                x_first, x_last = min(x_first, x), x + 1
                y_first, y_last = min(y_first, y), max(y_last, y + 1)
                for z in range(z_first):
                    if occupancy[x, y, z]:
                        z_first = z
                        break
                for z in range(z_cells - 1, z_last - 1, -1):
                    if occupancy[x, y, z]:
                        z_last = z + 1
                        break
    return (x_first, x_last), (y_first, y_last), (z_first, z_last)


@kernel
@no_type_check
def composite(density, values, t_start, t_end, starts, counts, accumulated, opacity, weights, remaining):
    """Fills accumulated values and opacity of each ray, and weight and remaining transmittance of each sample."""
    one = density.dtype.type(1)
    num_channels = values.shape[1]
    for ray in range(len(starts)):
        transmittance, total = one, one - one
        for channel in range(num_channels):
            accumulated[ray, channel] = 0
        for i in range(np.uint64(starts[ray]), np.uint64(starts[ray] + counts[ray])):
            survival_loss = math.expm1(density[i] * (t_start[i] - t_end[i]))
            weight = -transmittance * survival_loss
            transmittance += transmittance * survival_loss
            weights[i], remaining[i] = weight, transmittance
            total += weight
            for channel in range(num_channels):
                accumulated[ray, channel] += weight * values[i, channel]
        opacity[ray] = total


@kernel
@no_type_check
def composite_backward(
    values,
    t_start,
    t_end,
    starts,
    counts,
    weights,
    remaining,
    grad_accumulated,
    grad_opacity,
    grad_weights,
    grad_density,
    grad_values,
):
    """Fills the gradients of density and values.

    With G_i the gradient of weight_i, d/d(density_i delta_i) = T_{i+1} G_i - sum_{j > i} weight_j G_j.
    """
    for ray in range(len(starts)):
        behind = weights.dtype.type(0)
        for back in range(counts[ray]):
            i = np.uint64(starts[ray] + counts[ray] - 1 - back)
            grad = grad_opacity[ray] + grad_weights[i]
            for channel in range(values.shape[1]):
                grad += grad_accumulated[ray, channel] * values[i, channel]
                grad_values[i, channel] = weights[i] * grad_accumulated[ray, channel]
            grad_density[i] = (remaining[i] * grad - behind) * (t_end[i] - t_start[i])
            behind += weights[i] * grad
