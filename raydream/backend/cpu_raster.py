"""Numba z-buffer; its plain torch twin is in ``reference.py``."""

import math
from typing import no_type_check

import numpy as np
from numba import njit

# No fastmath: which face a pixel sees must be the reference's choice. no_type_check keeps jaxtyping's import hook from
# wrapping what numba has to compile.
exact_kernel = njit(nogil=True, cache=True, error_model="numpy")
BLOCK = 8
"""Pixels of a row that are looked at together: a loop of that length becomes vector instructions."""
_FAR_PIXELS = 1e5  # a face's rows are narrowed as long as it reaches no farther
_FEW_PIXELS = 3  # seen of a face in a row are weighed one by one


@exact_kernel
@no_type_check
def rasterize(clip, faces, face, barycentric, depth):
    """Fills ``face`` [view, h, w], ``barycentric`` and ``depth``; all views share the mesh, whose ``faces`` are int32.

    Faces come in the order of their indices and win only where strictly nearer: a tie goes to the lower index.
    """
    num_views, num_vertices, _ = clip.shape
    _, height, width = face.shape
    places, cells = np.empty((3, num_vertices), clip.dtype), np.empty((2, num_vertices), np.int32)
    drawn = np.empty(len(faces), np.int32)
    centres = np.arange(max(width, height) + BLOCK).astype(clip.dtype) + clip.dtype.type(0.5)
    # one view's buffers stay in the cache; what is asked for is written once, in the end
    nearest, seen = np.empty(height * width + BLOCK, clip.dtype), np.empty(height * width + BLOCK, np.int32)
    for view in range(num_views):
        project(clip[view], width, height, places)
        _find_cells(places[0], width, cells[0])
        _find_cells(places[1], height, cells[1])
        nearest[:] = math.inf
        for index in drawn[: _find_drawn(faces, cells, drawn)]:
            _draw(places, faces, index, width, height, centres, nearest, seen)
        for row in range(height):
            own = slice(row * width, (row + 1) * width)
            images = face[view, row], barycentric[view, row], depth[view, row]
            _weigh(places, faces, centres, centres[row], nearest[own], seen[own], *images)


@exact_kernel
@no_type_check
def project(clip, width, height, places):
    """Pixel coordinates and ``w`` of vertices, row 0 at the top; ``w`` is 0 where they are not finite, which drops the
    face.
    """
    half = clip.dtype.type(0.5)
    scale_x, scale_y = clip.dtype.type(width), clip.dtype.type(height)
    for number in range(len(clip)):
        i = np.uint64(number)
        w = clip[i, 3]
        x = (clip[i, 0] / w * half + half) * scale_x
        y = (half - clip[i, 1] / w * half) * scale_y
        # of what is not finite, a difference from itself is not 0
        finite = (x - x == 0) & (y - y == 0) & (w - w == 0)
        places[0, i], places[1, i] = x if finite else half, y if finite else half
        places[2, i] = w if finite else half * 0


@exact_kernel
@no_type_check
def _find_cells(coordinates, num_pixels, cells):
    """The number of pixel centres before a coordinate, or a number of the vertex's own if it lies on one."""
    half, limit = coordinates.dtype.type(0.5), coordinates.dtype.type(num_pixels)
    for number in range(len(coordinates)):
        i = np.uint64(number)
        from_first = coordinates[i] - half
        inside = from_first if from_first > -half else -half
        before = np.ceil(inside if inside < limit else limit)
        cells[i] = np.int32(~number) if before == from_first else np.int32(before)


@exact_kernel
@no_type_check
def _find_drawn(faces, cells, drawn):
    """The faces with room for a pixel's centre between their extremes, which few of a fine mesh have; how many."""
    count = 0
    for index in range(len(faces)):
        a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
        across = (cells[0, a] ^ cells[0, b]) | (cells[0, b] ^ cells[0, c])
        down = (cells[1, a] ^ cells[1, b]) | (cells[1, b] ^ cells[1, c])
        drawn[count] = index
        count += (across != 0) & (down != 0)
    return count


@exact_kernel
@no_type_check
def _draw(places, faces, index, width, height, centres, nearest, seen):
    """Puts a face where it is strictly nearer than what is there."""
    a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
    xa, ya, wa = places[0, a], places[1, a], places[2, a]
    xb, yb, wb = places[0, b], places[1, b], places[2, b]
    xc, yc, wc = places[0, c], places[1, c], places[2, c]
    if not (wa > 0 and wb > 0 and wc > 0):
        return
    left, right = _pixel_span(xa, xb, xc, width)
    top, bottom = _pixel_span(ya, yb, yc, height)
    size = max(abs(xa), abs(xb), abs(xc), abs(ya), abs(yb), abs(yc))
    narrows = right - left > BLOCK and size < _FAR_PIXELS
    first, last = left, right
    for row in range(top, bottom):
        y0, y1, y2 = ya - centres[row], yb - centres[row], yc - centres[row]
        if narrows:
            first, last = _row_span(xa, ya, xb, yb, xc, yc, centres[row], left, right)
        own, limit = row * width + first, centres[last]
        whole = (last - first + BLOCK - 1) // BLOCK * BLOCK
        for k in range(whole):  # in whole blocks, for what is left over would be done one by one
            column, pixel = np.uint64(first + k), np.uint64(own + k)
            x0, x1, x2 = xa - centres[column], xb - centres[column], xc - centres[column]
            area0, area1, area2 = x1 * y2 - y1 * x2, x2 * y0 - y2 * x0, x0 * y1 - y0 * x1
            inside = ((area0 >= 0) & (area1 >= 0) & (area2 >= 0)) | ((area0 <= 0) & (area1 <= 0) & (area2 <= 0))
            total = area0 + area1 + area2
            distance = total / (area0 / wa + area1 / wb + area2 / wc)
            wins = inside & (total != 0) & (distance < nearest[pixel]) & (centres[column] < limit)
            nearest[pixel] = distance if wins else nearest[pixel]
            seen[pixel] = index if wins else seen[pixel]


@exact_kernel
@no_type_check
def _row_span(xa, ya, xb, yb, xc, yc, centre, left, right):
    """The pixels of a row that a face can reach, with some to spare at either end: which of them it covers is not
    decided here. Coordinates below ``_FAR_PIXELS`` cross a row at points that are exact to a hundredth of a pixel.
    """
    half = type(xa)(0.5)
    low, high = type(xa)(math.inf), type(xa)(-math.inf)
    low, high = _widen(xa, ya, xb, yb, centre, low, high)
    low, high = _widen(xb, yb, xc, yc, centre, low, high)
    low, high = _widen(xc, yc, xa, ya, centre, low, high)
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
def _pixel_span(a, b, c, num_pixels):
    """The pixels whose centres lie between the extremes of three coordinates: the first, and one past the last."""
    half = type(a)(0.5)
    first = min(max(math.ceil(min(a, b, c) - half), 0), num_pixels)
    last = min(max(math.floor(max(a, b, c) - half), -1), num_pixels - 1)
    return np.int64(first), np.int64(last) + 1


@exact_kernel
@no_type_check
def _weigh(places, faces, centres, middle, nearest, seen, face, barycentric, depth):
    """What is seen in a row, with its perspective-correct barycentrics; -1 where there is nothing.

    From left to right, so that blocks may write past the end of what they weigh.
    """
    width, first = len(face), 0
    while first < width:
        last = first + 1
        if nearest[first] == math.inf:
            while last < width and nearest[last] == math.inf:
                last += 1
            face[first:last], depth[first:last], barycentric[first:last] = -1, 0, 0
        else:
            index = seen[first]
            while last < width and seen[last] == index and nearest[last] != math.inf:
                last += 1
            a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
            xa, ya, wa = places[0, a], places[1, a] - middle, places[2, a]
            xb, yb, wb = places[0, b], places[1, b] - middle, places[2, b]
            xc, yc, wc = places[0, c], places[1, c] - middle, places[2, c]
            whole = last - first
            if whole > _FEW_PIXELS:  # in whole blocks, too, if the row is long enough
                whole = min((whole + BLOCK - 1) // BLOCK * BLOCK, width - first)
            for k in range(whole):
                column = np.uint64(first + k)
                x0, x1, x2 = xa - centres[column], xb - centres[column], xc - centres[column]
                area0, area1, area2 = x1 * yc - yb * x2, x2 * ya - yc * x0, x0 * yb - ya * x1
                scaled0, scaled1, scaled2 = area0 / wa, area1 / wb, area2 / wc
                normalizer = scaled0 + scaled1 + scaled2
                face[column], depth[column] = index, nearest[column]
                barycentric[column, 0] = scaled0 / normalizer
                barycentric[column, 1] = scaled1 / normalizer
                barycentric[column, 2] = scaled2 / normalizer
        first = last
