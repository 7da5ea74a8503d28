"""Numba z-buffer; its plain torch twin is in ``reference.py``."""

import math
from typing import no_type_check

import numpy as np
from numba import njit

# No fastmath: which face a pixel sees must be the reference's choice. no_type_check keeps jaxtyping's import hook from
# wrapping what numba has to compile.
exact_kernel = njit(nogil=True, cache=True, error_model="numpy")
_FEW_PIXELS, _FAR_PIXELS = 4, 1e5  # a face's rows are narrowed from the first on, and as long as it reaches no farther


@exact_kernel
@no_type_check
def rasterize(clip, faces, face, barycentric, depth):
    """Fills ``face`` [view, h, w], ``barycentric`` and ``depth``; all views share the mesh.

    Faces come in the order of their indices and win only where strictly nearer: a tie goes to the lower index.
    """
    num_views, num_vertices, _ = clip.shape
    _, height, width = face.shape
    x, y, w = np.empty(num_vertices, clip.dtype), np.empty(num_vertices, clip.dtype), np.empty(num_vertices, clip.dtype)
    # one view's buffers stay in the cache; what is asked for is written once, in the end
    nearest, seen = np.empty((height, width), clip.dtype), np.empty((height, width), np.int32)
    for view in range(num_views):
        _project(clip[view], width, height, x, y, w)
        nearest[:] = math.inf
        for index in range(len(faces)):
            a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
            if w[a] > 0 and w[b] > 0 and w[c] > 0:
                _draw(x, y, w, a, b, c, index, nearest, seen)
        _weigh(x, y, w, faces, nearest, seen, face[view], barycentric[view], depth[view])


@exact_kernel
@no_type_check
def _draw(x, y, w, a, b, c, index, nearest, seen):
    """Puts a face where it is strictly nearer than what is there."""
    height, width = nearest.shape
    left, right = _pixel_span(x[a], x[b], x[c], width)
    top, bottom = _pixel_span(y[a], y[b], y[c], height)
    size = max(abs(x[a]), abs(x[b]), abs(x[c]), abs(y[a]), abs(y[b]), abs(y[c]))
    narrows = right - left > _FEW_PIXELS and size < _FAR_PIXELS
    for row in range(top, bottom):
        first, last = _row_span(x, y, a, b, c, row, left, right) if narrows else (left, right)
        for column in range(first, last):
            area0, area1, area2 = _areas(x, y, a, b, c, row, column)
            if min(area0, area1, area2) >= 0 or max(area0, area1, area2) <= 0:
                total = area0 + area1 + area2
                if total != 0:
                    distance = total / (area0 / w[a] + area1 / w[b] + area2 / w[c])
                    if distance < nearest[row, column]:
                        nearest[row, column], seen[row, column] = distance, index


@exact_kernel
@no_type_check
def _row_span(x, y, a, b, c, row, left, right):
    """The pixels of a row that a face can reach, with some to spare at either end: which of them it covers is not
    decided here. Coordinates below ``_FAR_PIXELS`` cross a row at points that are exact to a hundredth of a pixel.
    """
    half = x.dtype.type(0.5)
    centre = x.dtype.type(row) + half
    low, high = x.dtype.type(math.inf), x.dtype.type(-math.inf)
    low, high = _widen(x[a], y[a], x[b], y[b], centre, low, high)
    low, high = _widen(x[b], y[b], x[c], y[c], centre, low, high)
    low, high = _widen(x[c], y[c], x[a], y[a], centre, low, high)
    if low > high:
        return left, right
    return max(left, np.int64(low - half)), min(right, np.int64(high + half) + 1)


@exact_kernel
@no_type_check
def _widen(x0, y0, x1, y1, centre, low, high):
    """The interval with the point at which an edge crosses the row, if it does."""
    if (y0 <= centre) != (y1 <= centre):
        crossing = x0 + (centre - y0) * (x1 - x0) / (y1 - y0)
        return min(low, crossing), max(high, crossing)
    return low, high


@exact_kernel
@no_type_check
def _project(clip, width, height, x, y, w):
    """Pixel coordinates of vertices, row 0 at the top; ``w`` is 0 where they are not finite, which drops the face."""
    half = clip.dtype.type(0.5)
    scale_x, scale_y = clip.dtype.type(width), clip.dtype.type(height)
    for i in range(len(clip)):
        w[i] = clip[i, 3]
        x[i] = (clip[i, 0] / w[i] * half + half) * scale_x
        y[i] = (half - clip[i, 1] / w[i] * half) * scale_y
        if not (math.isfinite(x[i]) and math.isfinite(y[i]) and math.isfinite(w[i])):
            w[i] = 0


@exact_kernel
@no_type_check
def _pixel_span(a, b, c, num_pixels):
    """The pixels whose centres lie between the extremes of three coordinates: the first, and one past the last."""
    half = type(a)(0.5)
    first = min(max(math.ceil(min(a, b, c) - half), 0), num_pixels)
    last = min(max(math.floor(max(a, b, c) - half), -1), num_pixels - 1)
    return np.int64(first), np.int64(last) + 1


@exact_kernel
@no_type_check
def _areas(x, y, a, b, c, row, column):
    """Edge functions at the pixel's centre, opposite to each corner (see ``_perspective_weights`` in the reference)."""
    half = x.dtype.type(0.5)
    centre_x, centre_y = x.dtype.type(column) + half, x.dtype.type(row) + half
    x0, y0, x1, y1, x2, y2 = (
        x[a] - centre_x,
        y[a] - centre_y,
        x[b] - centre_x,
        y[b] - centre_y,
        x[c] - centre_x,
        y[c] - centre_y,
    )
    return x1 * y2 - y1 * x2, x2 * y0 - y2 * x0, x0 * y1 - y0 * x1


@exact_kernel
@no_type_check
def _weigh(x, y, w, faces, nearest, seen, face, barycentric, depth):
    """What is seen at each pixel, with its perspective-correct barycentrics; -1 where there is nothing."""
    height, width = face.shape
    face[:], barycentric[:], depth[:] = -1, 0, 0
    for row in range(height):
        for column in range(width):
            if nearest[row, column] == math.inf:
                continue
            index = np.int64(seen[row, column])
            face[row, column], depth[row, column] = index, nearest[row, column]
            a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
            area0, area1, area2 = _areas(x, y, a, b, c, row, column)
            scaled0, scaled1, scaled2 = area0 / w[a], area1 / w[b], area2 / w[c]
            normalizer = scaled0 + scaled1 + scaled2
            barycentric[row, column, 0] = scaled0 / normalizer
            barycentric[row, column, 1] = scaled1 / normalizer
            barycentric[row, column, 2] = scaled2 / normalizer
