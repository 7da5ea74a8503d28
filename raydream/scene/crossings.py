"""Where a mesh goes through itself: pairs of faces that cross, and faces that lie inside another piece.

Signs of volumes are those of float64 with Shewchuk's bound of its rounding (1997, "Adaptive precision floating-point
arithmetic", for orient3d): below the bound four points count as lying in one plane. So faces that touch with a corner
are no pair, nor are those that cross by less than rounding; two whose rims cross each other are one.
"""

import math
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numba import njit

# No fastmath: a sign must be the sign. no_type_check keeps jaxtyping's import hook from wrapping what numba compiles.
exact_kernel = njit(nogil=True, cache=True, error_model="numpy")
_ROUNDING = 7.8e-16  # of the sum of the absolute products behind a volume
_ENCLOSED = 0.75  # of a full turn: what lies on another piece has half of one


def crossing_faces(
    points: Float[np.ndarray, "vertex 3"], faces: Int[np.ndarray, "face 3"]
) -> Bool[np.ndarray, " face"]:
    """Which faces another one goes through, or lies upon in the same plane. Faces that share a corner by its index may
    meet there, and along an edge whose ends they share.
    """
    if not len(faces):
        return np.zeros(0, dtype=bool)
    points, corners = np.ascontiguousarray(points, np.float64), points[faces].astype(np.float64)
    lower, upper = corners.min(1), corners.max(1)
    order = np.argsort(_morton((lower + upper) / 2), kind="stable")
    crossed = np.zeros(len(faces), dtype=bool)
    found = np.zeros(len(faces), dtype=bool)
    _find_crossings(points, faces[order].astype(np.int64), *_tree(lower[order], upper[order]), found)
    crossed[order] = found
    return crossed


def turns_around(
    places: Float[np.ndarray, "place 3"],
    own_piece: Int[np.ndarray, " place"],
    points: Float[np.ndarray, "vertex 3"],
    faces: Int[np.ndarray, "face 3"],
    piece: Int[np.ndarray, " face"],
) -> Bool[np.ndarray, " place"]:
    """Whether some piece other than its own encloses each place: by the solid angle of its faces, so that a hole in it
    counts as much as it lets see.
    """
    turns = np.zeros((len(places), int(piece.max()) + 1))
    _add_solid_angles(places.astype(np.float64), points[faces].astype(np.float64), piece.astype(np.int64), turns)
    turns[np.arange(len(places)), own_piece] = 0
    return np.abs(turns).max(-1) > _ENCLOSED


def _morton(places: Float[np.ndarray, "face 3"]) -> Int[np.ndarray, " face"]:
    """Places that are close in space are mostly close in this order."""
    low = places.min(0)
    size = float((places - low).max()) or 1.0
    code = np.zeros(len(places), dtype=np.int64)
    cell = ((places - low) / size * 1023).astype(np.int64)
    for bit in range(10):
        for axis in range(3):
            code |= ((cell[:, axis] >> bit) & 1) << (3 * bit + axis)
    return code


def _tree(
    lower: Float[np.ndarray, "face 3"], upper: Float[np.ndarray, "face 3"]
) -> tuple[Float[np.ndarray, "node 3"], Float[np.ndarray, "node 3"]]:
    """The boxes of a full binary tree: node ``i`` has the children ``2 i`` and ``2 i + 1``, leaves come last."""
    width = 1 << (len(lower) - 1).bit_length()
    low, high = np.full((2 * width, 3), np.inf), np.full((2 * width, 3), -np.inf)
    low[width : width + len(lower)], high[width : width + len(lower)] = lower, upper
    while width > 1:
        children = slice(width, 2 * width)
        width //= 2
        low[width : 2 * width] = low[children].reshape(width, 2, 3).min(1)
        high[width : 2 * width] = high[children].reshape(width, 2, 3).max(1)
    return low, high


@exact_kernel
@no_type_check
def _find_crossings(points, faces, low, high, found):
    width = len(low) // 2
    stack = np.empty(64, np.int64)
    for first in range(len(faces)):
        stack[0], size = 1, 1
        while size > 0:
            size -= 1
            node = stack[size]
            if not _boxes_meet(low, high, width + first, node):
                continue
            if node < width:
                stack[size], stack[size + 1] = 2 * node, 2 * node + 1
                size += 2
            elif node - width > first and _cross(points, faces, first, node - width):
                found[first] = found[node - width] = True


@exact_kernel
@no_type_check
def _boxes_meet(low, high, one, other):
    for axis in range(3):  # noqa: SIM110 (numba knows no generators)
        if low[one, axis] > high[other, axis] or high[one, axis] < low[other, axis]:
            return False
    return True


@exact_kernel
@no_type_check
def _cross(points, faces, first, second):
    a, b, c = faces[first, 0], faces[first, 1], faces[first, 2]
    num_shared = num_level = 0
    for i in range(3):
        corner = faces[second, i]
        shared = corner in (a, b, c)
        num_shared += shared
        num_level += shared or _side(points, a, b, c, corner) == 0
    if num_level == 3:
        return _overlap_in_plane(points, faces, first, second)
    if num_shared > 1:
        return False
    return _edges_hit(points, faces, first, second) or _edges_hit(points, faces, second, first)


@exact_kernel
@no_type_check
def _edges_hit(points, faces, face, target):
    """Whether an edge of ``face`` goes through ``target`` or its rim; one with an end at a corner of both cannot."""
    a, b, c = faces[target, 0], faces[target, 1], faces[target, 2]
    for i in range(3):
        p, q = faces[face, i], faces[face, (i + 1) % 3]
        joined = p in (a, b, c) or q in (a, b, c)
        if not joined and _side(points, a, b, c, p) * _side(points, a, b, c, q) < 0:
            s, t, u = _side(points, p, q, a, b), _side(points, p, q, b, c), _side(points, p, q, c, a)
            if min(s, t, u) >= 0 or max(s, t, u) <= 0:
                return True
    return False


@exact_kernel
@no_type_check
def _side(points, a, b, c, d):
    """The sign of the volume of four points; 0 where rounding may have made it."""
    dx, dy, dz = points[d, 0], points[d, 1], points[d, 2]
    ax, ay, az = points[a, 0] - dx, points[a, 1] - dy, points[a, 2] - dz
    bx, by, bz = points[b, 0] - dx, points[b, 1] - dy, points[b, 2] - dz
    cx, cy, cz = points[c, 0] - dx, points[c, 1] - dy, points[c, 2] - dz
    volume = ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)
    size = abs(ax) * (abs(by * cz) + abs(bz * cy)) + abs(ay) * (abs(bz * cx) + abs(bx * cz))
    size += abs(az) * (abs(bx * cy) + abs(by * cx))
    return 0 if abs(volume) <= _ROUNDING * size else (1 if volume > 0 else -1)


@exact_kernel
@no_type_check
def _overlap_in_plane(points, faces, first, second):
    """Two triangles of one plane have area in common unless the line of an edge has them on either side of it. Looked
    at along the axis on which the first one shows most.
    """
    best, x, y = 0.0, 0, 1
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        area = abs(_area(points, faces[first, 0], faces[first, 1], faces[first, 2], u, v))
        if area > best:
            best, x, y = area, u, v
    for turn in range(2):
        here, there = (first, second) if turn == 0 else (second, first)
        inside = _turn(points, faces[here, 0], faces[here, 1], faces[here, 2], x, y)
        if inside == 0:
            return False  # a face without area has none in common
        for i in range(3):
            a, b = faces[here, i], faces[here, (i + 1) % 3]
            farthest = -1
            for j in range(3):
                farthest = max(farthest, _turn(points, a, b, faces[there, j], x, y) * inside)
            if farthest <= 0:
                return False
    return True


@exact_kernel
@no_type_check
def _area(points, a, b, c, x, y):
    """Twice the area of a triangle as seen along the third axis."""
    left = (points[b, x] - points[a, x]) * (points[c, y] - points[a, y])
    return left - (points[b, y] - points[a, y]) * (points[c, x] - points[a, x])


@exact_kernel
@no_type_check
def _turn(points, a, b, c, x, y):
    area = _area(points, a, b, c, x, y)
    size = abs((points[b, x] - points[a, x]) * (points[c, y] - points[a, y]))
    size += abs((points[b, y] - points[a, y]) * (points[c, x] - points[a, x]))
    return 0 if abs(area) <= _ROUNDING * size else (1 if area > 0 else -1)


@exact_kernel
@no_type_check
def _add_solid_angles(places, corners, piece, turns):
    """Van Oosterom and Strackee (1983), as a share of the full sphere."""
    for index in range(len(places)):
        x, y, z = places[index, 0], places[index, 1], places[index, 2]
        for face in range(len(corners)):
            ax, ay, az = corners[face, 0, 0] - x, corners[face, 0, 1] - y, corners[face, 0, 2] - z
            bx, by, bz = corners[face, 1, 0] - x, corners[face, 1, 1] - y, corners[face, 1, 2] - z
            cx, cy, cz = corners[face, 2, 0] - x, corners[face, 2, 1] - y, corners[face, 2, 2] - z
            a = math.sqrt(ax * ax + ay * ay + az * az)
            b = math.sqrt(bx * bx + by * by + bz * bz)
            c = math.sqrt(cx * cx + cy * cy + cz * cz)
            volume = ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)
            below = a * b * c + (ax * bx + ay * by + az * bz) * c + (bx * cx + by * cy + bz * cz) * a
            below += (cx * ax + cy * ay + cz * az) * b
            turns[index, piece[face]] += math.atan2(volume, below) / (2 * math.pi)
