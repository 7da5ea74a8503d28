"""Numba kernels of the field: multiresolution hash grid and a network with one hidden layer.

Their plain torch twins are in ``reference.py``. Samples are taken in blocks, one sample to a vector lane: a row of
scratch holds one feature (or unit, or corner) of all samples of a block and stays in the cache. Nothing of hidden size
reaches memory; the backward pass computes the hidden layer again. ``features`` is a tuple as long as the features of a
level, so that their number is a constant of the compiled kernel. Indices are unsigned where they can be, because numba
checks signed ones for Python's negative indexing. All of it is one file, because numba's cache of a kernel does not
notice a change of another file.
"""

from typing import no_type_check

import numpy as np
from numba import njit

# Contraction and reassociation only: infinities and NaNs keep their meaning. no_type_check keeps jaxtyping's import
# hook from wrapping what numba has to compile.
kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})

BLOCK = 256
LINE = np.uint64(BLOCK)
ZERO, ONE, TWO, THREE, FOUR = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
PRIME_Y = np.int32(2_654_435_761 - 2**32)
PRIME_Z = np.int32(805_459_861)

# --- what the backend calls


@kernel
@no_type_check
def field(points, table, resolutions, offsets, features, smooth, hidden, head, saved, output, gradient):
    """Fills ``output`` and, unless it has no rows, ``gradient``, that of output 0 by the point.

    ``saved`` [block, rows] keeps the encoding (and its Jacobian) as rows of lanes for the backward pass. The sizes of
    all layers are multiples of 4; the columns of ``hidden`` beyond the width of the encoding meet zeros.
    """
    (num_units, width), num_outputs = hidden.shape, head.shape[0]
    units, outputs = np.empty(num_units * BLOCK, hidden.dtype), np.empty(num_outputs * BLOCK, hidden.dtype)
    slope, along = np.empty(width * BLOCK, hidden.dtype), np.empty(3 * BLOCK, hidden.dtype)
    for block in range(len(saved)):
        begin, rows = block * BLOCK, saved[block]
        rows[:] = 0
        _encode_block(points, begin, table, resolutions, offsets, features, smooth, width, len(gradient) > 0, rows)
        _combine(hidden.ravel(), width, 1, num_units, width, rows, units)
        _relu(units)
        _combine(head.ravel(), num_units, 1, num_outputs, num_units, units, outputs)
        _store(outputs, begin, output)
        if len(gradient):
            _active_weights(units, head)
            _combine(hidden.ravel(), 1, width, width, num_units, units, slope)
            along[:] = 0
            for axis in range(3):
                for i in range(width):
                    _add_product(slope, i, rows, (axis + 1) * width + i, along, axis)
            _store(along, begin, gradient)


@kernel
@no_type_check
def field_backward(
    points, resolutions, offsets, features, smooth, hidden, head, saved, grad_output, grad_gradient,
    grad_table, grad_hidden, grad_head,
):  # fmt: skip
    """Adds to the last three; ``grad_gradient`` without rows stands for zeros."""
    (num_units, width), num_outputs = hidden.shape, head.shape[0]
    units, grad_units = np.empty(num_units * BLOCK, hidden.dtype), np.empty(num_units * BLOCK, hidden.dtype)
    outputs, along = np.empty(num_outputs * BLOCK, hidden.dtype), np.empty(3 * BLOCK, hidden.dtype)
    grads, slope = np.zeros(4 * width * BLOCK, hidden.dtype), np.empty(width * BLOCK, hidden.dtype)
    for block in range(len(saved)):
        begin, rows = block * BLOCK, saved[block]
        _load(grad_output, begin, outputs)
        _combine(hidden.ravel(), width, 1, num_units, width, rows, units)
        _relu(units)
        _correlate(outputs, units, grad_head.ravel())
        _combine(head.ravel(), 1, num_units, num_units, num_outputs, outputs, grad_units)
        _mask(grad_units, units)
        _correlate(grad_units, rows[: width * BLOCK], grad_hidden.ravel())
        _combine(hidden.ravel(), 1, width, width, num_units, grad_units, grads)
        if len(grad_gradient):
            # gradient = Jacobian slope with slope = hidden^T (active * head_0); activity is constant almost everywhere.
            _load(grad_gradient, begin, along)
            slope[:] = 0
            for axis in range(3):
                for i in range(width):
                    _add_product(along, axis, rows, (axis + 1) * width + i, slope, i)
            _combine(hidden.ravel(), width, 1, num_units, width, slope, grad_units)
            _mask(grad_units, units)
            for unit in range(num_units):
                grad_head[0, unit] += grad_units[unit * BLOCK : (unit + 1) * BLOCK].sum()
            _active_weights(units, head)
            _correlate(units, slope, grad_hidden.ravel())
            _combine(hidden.ravel(), 1, width, width, num_units, units, slope)
            grads[width * BLOCK :] = 0
            for axis in range(3):
                for i in range(width):
                    _add_product(slope, i, along, axis, grads, (axis + 1) * width + i)
        _scatter_block(
            points, begin, grads, resolutions, offsets, features, smooth, width, len(grad_gradient) > 0, grad_table
        )


# --- hash grid


@kernel
@no_type_check
def _encode_block(points, begin, table, resolutions, offsets, features, smooth, width, with_jacobian, rows):
    """Fills rows 0.. with the features, and with the Jacobian rows ``width``.. by x, 2 ``width``.. by y, and so on."""
    clamped, free, fraction, slope, places = _scratch(points, begin)
    count = min(len(points) - begin, BLOCK)
    for level in range(len(resolutions)):
        _locate(clamped, level, resolutions, offsets, len(features), fraction, places)
        if with_jacobian or smooth:
            _blend(fraction, free, resolutions[level], smooth, slope)
        first, step = np.uint64(level * len(features) * BLOCK), np.uint64(width * BLOCK)
        for lane in range(np.uint64(count)):
            if not with_jacobian:
                weights, corners = _corner_weights(fraction, lane), _corner_places(places, lane)
                for feature in range(np.uint64(len(features))):
                    value = weights[0] * table[corners[0] + feature]
                    for corner in range(1, 8):
                        value += weights[corner] * table[corners[corner] + feature]
                    rows[first + feature * LINE + lane] = value
            else:
                x, y, z = fraction[lane], fraction[lane + LINE], fraction[lane + TWO * LINE]
                for feature in range(np.uint64(len(features))):
                    lower, dx0, dy0 = _face(table, places, lane, feature, x, y)
                    upper, dx1, dy1 = _face(table, places, lane + FOUR * LINE, feature, x, y)
                    at = first + feature * LINE + lane
                    rows[at] = lower + z * (upper - lower)
                    rows[at + step] = slope[lane] * (dx0 + z * (dx1 - dx0))
                    rows[at + TWO * step] = slope[lane + LINE] * (dy0 + z * (dy1 - dy0))
                    rows[at + THREE * step] = slope[lane + TWO * LINE] * (upper - lower)


@kernel
@no_type_check
def _scatter_block(points, begin, rows, resolutions, offsets, features, smooth, width, with_jacobian, grad_table):
    """The adjoint of ``_encode_block``: with the Jacobian, the same tree of linear blends walked backwards."""
    clamped, free, fraction, slope, places = _scratch(points, begin)
    count = min(len(points) - begin, BLOCK)
    for level in range(len(resolutions)):
        _locate(clamped, level, resolutions, offsets, len(features), fraction, places)
        if with_jacobian or smooth:
            _blend(fraction, free, resolutions[level], smooth, slope)
        first, step = np.uint64(level * len(features) * BLOCK), np.uint64(width * BLOCK)
        for lane in range(np.uint64(count)):
            if not with_jacobian:
                weights, corners = _corner_weights(fraction, lane), _corner_places(places, lane)
                for feature in range(np.uint64(len(features))):
                    grad = rows[first + feature * LINE + lane]
                    for corner in range(8):
                        grad_table[corners[corner] + feature] += weights[corner] * grad
            else:
                x, y, z = fraction[lane], fraction[lane + LINE], fraction[lane + TWO * LINE]
                for feature in range(np.uint64(len(features))):
                    at = first + feature * LINE + lane
                    grad_x = slope[lane] * rows[at + step]
                    grad_y = slope[lane + LINE] * rows[at + TWO * step]
                    upper = z * rows[at] + slope[lane + TWO * LINE] * rows[at + THREE * step]
                    lower = rows[at] - upper
                    x1, y1 = z * grad_x, z * grad_y
                    _face_backward(grad_table, places, lane, feature, x, y, lower, grad_x - x1, grad_y - y1)
                    _face_backward(grad_table, places, lane + FOUR * LINE, feature, x, y, upper, x1, y1)


@kernel
@no_type_check
def _scratch(points, begin):
    """Rows for a block: the clamped points, 1 where clamping leaves a coordinate free and 0 where it holds it; and
    rows for a level: the place of each point in its cell, its weight's slope, and the places of the corners in the
    table.
    """
    low, high = points.dtype.type(0), points.dtype.type(1)
    clamped, free = np.zeros(3 * BLOCK, points.dtype), np.zeros(3 * BLOCK, points.dtype)
    for lane in range(min(len(points) - begin, BLOCK)):
        for axis in range(3):
            point = points[begin + lane, axis]
            free[axis * BLOCK + lane] = high if low <= point <= high else low
            # In this order a NaN becomes 0: it must not become an index.
            point = point if point > low else low
            clamped[axis * BLOCK + lane] = point if point < high else high
    fraction, slope = np.empty(3 * BLOCK, points.dtype), np.empty(3 * BLOCK, points.dtype)
    return clamped, free, fraction, slope, np.empty(8 * BLOCK, np.uint32)


@kernel
@no_type_check
def _locate(clamped, level, resolutions, offsets, num_features, fraction, places):
    """Place of each point in its cell, and places in the flat table of the cell's corners, x fastest."""
    entries, cells = offsets[level + 1] - offsets[level], resolutions[level]
    scale, last, side = clamped.dtype.type(cells), np.int32(cells - 1), np.int32(cells + 1)
    offset, mask, step = np.int32(offsets[level]), np.int32(entries - 1), np.int32(num_features)
    for i in range(3 * BLOCK):
        place = clamped[i] * scale
        cell = min(np.int32(place), last)
        fraction[i] = place - clamped.dtype.type(cell)
        places[i] = cell
    if entries == (cells + 1) ** 3:
        for i in range(BLOCK):
            lower = np.int32(offset + places[i] + side * (places[BLOCK + i] + side * places[2 * BLOCK + i]))
            upper = np.int32(lower + side * side)
            places[i], places[BLOCK + i] = lower * step, (lower + 1) * step
            places[2 * BLOCK + i], places[3 * BLOCK + i] = (lower + side) * step, (lower + side + 1) * step
            places[4 * BLOCK + i], places[5 * BLOCK + i] = upper * step, (upper + 1) * step
            places[6 * BLOCK + i], places[7 * BLOCK + i] = (upper + side) * step, (upper + side + 1) * step
    else:
        for i in range(BLOCK):
            # 32 bits are enough: only the low bits of the products survive the mask.
            x0, y0 = np.int32(places[i]), np.int32(np.int32(places[BLOCK + i]) * PRIME_Y)
            z0 = np.int32(np.int32(places[2 * BLOCK + i]) * PRIME_Z)
            x1, y1, z1 = np.int32(x0 + 1), np.int32(y0 + PRIME_Y), np.int32(z0 + PRIME_Z)
            places[i] = (((x0 ^ y0 ^ z0) & mask) + offset) * step
            places[BLOCK + i] = (((x1 ^ y0 ^ z0) & mask) + offset) * step
            places[2 * BLOCK + i] = (((x0 ^ y1 ^ z0) & mask) + offset) * step
            places[3 * BLOCK + i] = (((x1 ^ y1 ^ z0) & mask) + offset) * step
            places[4 * BLOCK + i] = (((x0 ^ y0 ^ z1) & mask) + offset) * step
            places[5 * BLOCK + i] = (((x1 ^ y0 ^ z1) & mask) + offset) * step
            places[6 * BLOCK + i] = (((x0 ^ y1 ^ z1) & mask) + offset) * step
            places[7 * BLOCK + i] = (((x1 ^ y1 ^ z1) & mask) + offset) * step


@kernel
@no_type_check
def _blend(fraction, free, cells, smooth, slope):
    """Turns places in a cell into weights of its upper corners, and finds their derivatives by the point."""
    number = fraction.dtype.type
    one, two, three, six, scale = number(1), number(2), number(3), number(6), number(cells)
    for i in range(3 * BLOCK):
        slope[i] = scale * free[i]
    if smooth:
        for i in range(3 * BLOCK):
            x = fraction[i]
            slope[i] *= six * x * (one - x)
            fraction[i] = x * x * (three - two * x)


@kernel
@no_type_check
def _corner_weights(fraction, lane):
    x1, y1, z1 = fraction[lane], fraction[lane + LINE], fraction[lane + TWO * LINE]
    one = fraction.dtype.type(1)
    x0, y0, z0 = one - x1, one - y1, one - z1
    a, b, c, d = y0 * z0, y1 * z0, y0 * z1, y1 * z1
    return x0 * a, x1 * a, x0 * b, x1 * b, x0 * c, x1 * c, x0 * d, x1 * d


@kernel
@no_type_check
def _corner_places(places, lane):
    return *_quad(places, lane, LINE), *_quad(places, lane + FOUR * LINE, LINE)


@kernel
@no_type_check
def _face(table, places, lane, feature, x, y):
    """Bilinear blend over the four corners of a face of the cell, and its derivatives by x and y."""
    p00, p10, p01, p11 = _quad(places, lane, LINE)
    v00, v01 = table[p00 + feature], table[p01 + feature]
    dx0, dx1 = table[p10 + feature] - v00, table[p11 + feature] - v01
    v0, v1 = v00 + x * dx0, v01 + x * dx1
    return v0 + y * (v1 - v0), dx0 + y * (dx1 - dx0), v1 - v0


@kernel
@no_type_check
def _face_backward(grad_table, places, lane, feature, x, y, grad, grad_dx, grad_dy):
    p00, p10, p01, p11 = _quad(places, lane, LINE)
    grad1 = y * grad + grad_dy
    grad0 = grad - grad1
    grad11 = x * grad1 + y * grad_dx
    grad10 = x * grad0 + (grad_dx - y * grad_dx)
    grad_table[p00 + feature] += grad0 - grad10
    grad_table[p10 + feature] += grad10
    grad_table[p01 + feature] += grad1 - grad11
    grad_table[p11 + feature] += grad11


# --- rows of lanes


@kernel
@no_type_check
def _load(samples, begin, rows):
    """Turns a block of samples into rows, with zeros after the last sample."""
    width, count = samples.shape[1], min(len(samples) - begin, BLOCK)
    for lane in range(count):
        for i in range(width):
            rows[i * BLOCK + lane] = samples[begin + lane, i]
    for i in range(width):
        for lane in range(count, BLOCK):
            rows[i * BLOCK + lane] = 0


@kernel
@no_type_check
def _store(rows, begin, samples):
    for lane in range(min(len(samples) - begin, BLOCK)):
        for i in range(samples.shape[1]):
            samples[begin + lane, i] = rows[i * BLOCK + lane]


@kernel
@no_type_check
def _relu(rows):
    zero = rows.dtype.type(0)
    for i in range(len(rows)):
        rows[i] = zero if rows[i] < zero else rows[i]


@kernel
@no_type_check
def _mask(rows, units):
    zero = rows.dtype.type(0)
    for i in range(len(rows)):
        rows[i] = rows[i] if units[i] > zero else zero


@kernel
@no_type_check
def _active_weights(units, head):
    """Replaces each unit's activation by its weight for output 0 where the unit is active, else by 0."""
    zero = units.dtype.type(0)
    for unit in range(head.shape[1]):
        for lane in range(BLOCK):
            units[unit * BLOCK + lane] = head[0, unit] if units[unit * BLOCK + lane] > zero else zero


@kernel
@no_type_check
def _add_product(left, left_row, right, right_row, target, target_row):
    for lane in range(BLOCK):
        target[target_row * BLOCK + lane] += left[left_row * BLOCK + lane] * right[right_row * BLOCK + lane]


@kernel
@no_type_check
def _combine(weights, row_step, column_step, num_rows, num_columns, source, target):
    """``target = weights @ source``, lane by lane; ``weights[r, c]`` stands at ``r * row_step + c * column_step``."""
    row_step, column_step, zero = np.uint64(row_step), np.uint64(column_step), target.dtype.type(0)
    for row in range(ZERO, np.uint64(num_rows), FOUR):
        for i in range(row * LINE, (row + FOUR) * LINE):
            target[i] = zero
        for column in range(ZERO, np.uint64(num_columns), FOUR):
            at = row * row_step + column * column_step
            a0, a1, a2, a3 = _quad(weights, at, column_step)
            b0, b1, b2, b3 = _quad(weights, at + row_step, column_step)
            c0, c1, c2, c3 = _quad(weights, at + TWO * row_step, column_step)
            d0, d1, d2, d3 = _quad(weights, at + THREE * row_step, column_step)
            for lane in range(LINE):
                x0, x1, x2, x3 = _quad(source, column * LINE + lane, LINE)
                i = row * LINE + lane
                target[i] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                target[i + LINE] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                target[i + TWO * LINE] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                target[i + THREE * LINE] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@kernel
@no_type_check
def _correlate(left, right, target):
    """Adds ``left @ right^T``, sums over the lanes, to ``target``."""
    num_columns = np.uint64(len(right)) // LINE
    for row in range(ZERO, np.uint64(len(left)) // LINE, FOUR):
        for column in range(ZERO, num_columns, FOUR):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = left.dtype.type(0)
            c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = left.dtype.type(0)
            for lane in range(LINE):
                x0, x1, x2, x3 = _quad(left, row * LINE + lane, LINE)
                y0, y1, y2, y3 = _quad(right, column * LINE + lane, LINE)
                a0, a1, a2, a3 = a0 + x0 * y0, a1 + x0 * y1, a2 + x0 * y2, a3 + x0 * y3
                b0, b1, b2, b3 = b0 + x1 * y0, b1 + x1 * y1, b2 + x1 * y2, b3 + x1 * y3
                c0, c1, c2, c3 = c0 + x2 * y0, c1 + x2 * y1, c2 + x2 * y2, c3 + x2 * y3
                d0, d1, d2, d3 = d0 + x3 * y0, d1 + x3 * y1, d2 + x3 * y2, d3 + x3 * y3
            at = row * num_columns + column
            _add_quad(target, at, a0, a1, a2, a3)
            _add_quad(target, at + num_columns, b0, b1, b2, b3)
            _add_quad(target, at + TWO * num_columns, c0, c1, c2, c3)
            _add_quad(target, at + THREE * num_columns, d0, d1, d2, d3)


@kernel
@no_type_check
def _quad(values, at, step):
    return values[at], values[at + step], values[at + TWO * step], values[at + THREE * step]


@kernel
@no_type_check
def _add_quad(target, at, x0, x1, x2, x3):
    target[at] += x0
    target[at + ONE] += x1
    target[at + TWO] += x2
    target[at + THREE] += x3
