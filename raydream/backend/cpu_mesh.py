"""Numba kernels of meshes that are optimised: interpolation, and gradients of places; twins in ``reference.py``.

Every sum has one order. Gradients go to pixel coordinates and ``w`` of vertices first, and from there to clip space.
"""

import math
from typing import no_type_check

import numpy as np

from raydream.backend.cpu_raster import exact_kernel, project


@exact_kernel
@no_type_check
def rasterize_backward(clip, faces, face, barycentric, depth, grad_barycentric, grad_depth, grad_clip):
    """Fills ``grad_clip``. With areas e_i and s_i = e_i / w_i, barycentrics are s_i / N and the depth is sum(e_i) /
    N, where N = sum(s_i).
    """
    num_views, num_vertices, _ = clip.shape
    _, height, width = face.shape
    places, grad = np.empty((3, num_vertices), clip.dtype), np.empty((num_vertices, 3), clip.dtype)
    half = clip.dtype.type(0.5)
    for view in range(num_views):
        project(clip[view], width, height, places)
        grad[:] = 0
        for row in range(height):
            for column in range(width):
                index = face[view, row, column]
                if index < 0:
                    continue
                g0, g1 = grad_barycentric[view, row, column, 0], grad_barycentric[view, row, column, 1]
                g2 = grad_barycentric[view, row, column, 2]
                slope = grad_depth[view, row, column]
                if g0 == 0 and g1 == 0 and g2 == 0 and slope == 0:
                    continue
                b0, b1 = barycentric[view, row, column, 0], barycentric[view, row, column, 1]
                b2 = barycentric[view, row, column, 2]
                a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
                centre_x, centre_y = clip.dtype.type(column) + half, clip.dtype.type(row) + half
                x0, y0, w0 = places[0, a] - centre_x, places[1, a] - centre_y, places[2, a]
                x1, y1, w1 = places[0, b] - centre_x, places[1, b] - centre_y, places[2, b]
                x2, y2, w2 = places[0, c] - centre_x, places[1, c] - centre_y, places[2, c]
                scale = 1 / ((x1 * y2 - y1 * x2) / w0 + (x2 * y0 - y2 * x0) / w1 + (x0 * y1 - y0 * x1) / w2)
                mean = g0 * b0 + g1 * b1 + g2 * b2 + slope * depth[view, row, column]
                s0, s1, s2 = (g0 - mean) / w0, (g1 - mean) / w1, (g2 - mean) / w2
                e0, e1, e2 = (s0 + slope) * scale, (s1 + slope) * scale, (s2 + slope) * scale
                grad[a, 0] += y1 * e2 - y2 * e1
                grad[a, 1] += x2 * e1 - x1 * e2
                grad[a, 2] -= s0 * b0
                grad[b, 0] += y2 * e0 - y0 * e2
                grad[b, 1] += x0 * e2 - x2 * e0
                grad[b, 2] -= s1 * b1
                grad[c, 0] += y0 * e1 - y1 * e0
                grad[c, 1] += x1 * e0 - x0 * e1
                grad[c, 2] -= s2 * b2
        _to_clip(places, grad, width, height, grad_clip[view])


@exact_kernel
@no_type_check
def _to_clip(places, grad, width, height, grad_clip):
    half = grad.dtype.type(0.5)
    across, down = half * grad.dtype.type(width), half * grad.dtype.type(height)
    for i in range(len(grad)):
        w = places[2, i]
        if w > 0:
            grad_clip[i, 0], grad_clip[i, 1], grad_clip[i, 2] = grad[i, 0] * across / w, -grad[i, 1] * down / w, 0
            turned = grad[i, 0] * (places[0, i] - across) + grad[i, 1] * (places[1, i] - down)
            grad_clip[i, 3] = grad[i, 2] - turned / w
        else:
            grad_clip[i] = 0


@exact_kernel
@no_type_check
def interpolate(values, faces, face, barycentric, image):
    """Fills ``image`` [pixel, channel]; pixels of all views in a row."""
    for pixel in range(len(face)):
        index = face[pixel]
        if index < 0:
            for k in range(values.shape[1]):
                image[pixel, k] = 0
            continue
        a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
        b0, b1, b2 = barycentric[pixel, 0], barycentric[pixel, 1], barycentric[pixel, 2]
        for k in range(values.shape[1]):
            image[pixel, k] = b0 * values[a, k] + b1 * values[b, k] + b2 * values[c, k]


@exact_kernel
@no_type_check
def interpolate_backward(values, faces, face, barycentric, grad_image, grad_values, grad_barycentric):
    """Adds to ``grad_values`` and fills ``grad_barycentric``."""
    for pixel in range(len(face)):
        index = face[pixel]
        if index < 0:
            grad_barycentric[pixel] = 0
            continue
        a, b, c = np.uint64(faces[index, 0]), np.uint64(faces[index, 1]), np.uint64(faces[index, 2])
        b0, b1, b2 = barycentric[pixel, 0], barycentric[pixel, 1], barycentric[pixel, 2]
        g0 = g1 = g2 = values.dtype.type(0)
        for k in range(values.shape[1]):
            grad = grad_image[pixel, k]
            g0, g1, g2 = g0 + grad * values[a, k], g1 + grad * values[b, k], g2 + grad * values[c, k]
            grad_values[a, k] += b0 * grad
            grad_values[b, k] += b1 * grad
            grad_values[c, k] += b2 * grad
        grad_barycentric[pixel, 0], grad_barycentric[pixel, 1], grad_barycentric[pixel, 2] = g0, g1, g2


@exact_kernel
@no_type_check
def find_outline(clip, edges, opposite, starts, counts, face, depth):
    """Which edge passes each pair of neighbours farthest out, of those that are an outline there: for all views, rows
    of inside pixel, outside pixel, edge and view; and the gaps left to the outside pixels' centres.
    """
    num_views, num_vertices, _ = clip.shape
    _, height, width = face.shape
    places = np.empty((3, num_vertices), clip.dtype)
    own, chosen = np.empty(height * width, clip.dtype), np.empty(len(edges), np.int32)
    sides = np.empty(len(edges), np.int8)
    found, gaps = np.empty((1024, 4), np.int64), np.empty(1024, clip.dtype)
    at, count = np.full(2 * height * width, -1, np.int32), 0
    for view in range(num_views):
        project(clip[view], width, height, places)
        for pixel in range(height * width):
            row, column = pixel // width, pixel % width
            own[pixel] = depth[view, row, column] if face[view, row, column] >= 0 else math.inf
        begin = count
        for k in range(_find_one_sided(places, edges, opposite, starts, counts, chosen, sides)):
            found, gaps, count = _follow(
                places, edges, chosen[k], sides[k], own, width, height, at, found, gaps, count, view
            )
        for k in range(begin, count):
            inside, outside = found[k, 0] % (height * width), found[k, 1] % (height * width)
            for down in range(2):
                at[2 * inside + down] = at[2 * outside + down] = -1
    return found[:count], gaps[:count]


@exact_kernel
@no_type_check
def _find_one_sided(places, edges, opposite, starts, counts, chosen, sides):
    """The edges with all faces that are seen on one side, and on which: 1 or -1; how many they are."""
    count = 0
    for edge in range(len(edges)):
        a, b = np.uint64(edges[edge, 0]), np.uint64(edges[edge, 1])
        x, y = places[0, a], places[1, a]
        dx, dy = places[0, b] - x, places[1, b] - y
        least = most = 0
        for k in range(starts[edge], starts[edge] + counts[edge]):
            corner = np.uint64(opposite[np.uint64(k)])
            area = dx * (places[1, corner] - y) - dy * (places[0, corner] - x)
            seen = places[2, corner] > 0
            least -= seen & (area < 0)
            most += seen & (area > 0)
        one_sided = (least == 0) != (most == 0)
        drawn = (places[2, a] > 0) & (places[2, b] > 0) & one_sided
        chosen[count], sides[count] = edge, 1 if most > 0 else -1
        count += drawn
    return count


@exact_kernel
@no_type_check
def _follow(places, edges, edge, side, own, width, height, at, found, gaps, count, view):
    """Notes the pairs of neighbours that an edge passes."""
    half, one = places.dtype.type(0.5), places.dtype.type(1)
    a, b = edges[edge, 0], edges[edge, 1]
    down = abs(places[1, b] - places[1, a]) < abs(places[0, b] - places[0, a])
    across, along = (1, 0) if down else (0, 1)
    ua, ub, va, vb = places[across, a], places[across, b], places[along, a], places[along, b]
    num_lines, num_places = (width, height) if down else (height, width)
    step, stride = (width, 1) if down else (1, width)
    first = np.int64(min(max(np.ceil(min(va, vb) - half), half * 0), num_lines))
    end = np.int64(min(max(np.ceil(max(va, vb) - half), half * 0), num_lines))
    slope = (ub - ua) / (vb - va)
    lower = side * ((vb - va) if down else (va - vb)) < 0
    for line in range(first, end):
        centre = places.dtype.type(line) + half
        u = ua + (centre - va) * slope
        part = (centre - va) / (vb - va)
        edge_depth = one / ((one - part) / places[2, a] + part / places[2, b])
        before = np.floor(u - half)
        if not (before >= 0 and before + 1 < num_places):
            continue
        beyond = u - before - half
        pixel = line * stride + np.int64(before) * step
        inside, outside = (pixel, pixel + step) if lower else (pixel + step, pixel)
        if not (edge_depth < own[outside] and own[inside] + own[inside] < edge_depth + own[outside]):
            continue
        if own[inside] == math.inf:
            continue
        gap = one - beyond if lower else beyond
        slot = pixel * 2 + down
        k = at[slot]
        if k < 0:
            k = at[slot] = count
            count += 1
            if count > len(found):
                found, gaps = _double(found, gaps)
        elif gaps[k] <= gap:
            continue
        offset = view * height * width
        found[k, 0], found[k, 1], found[k, 2], found[k, 3] = offset + inside, offset + outside, edge, view
        gaps[k] = gap
    return found, gaps, count


@exact_kernel
@no_type_check
def _double(found, gaps):
    more_found, more_gaps = np.empty((2 * len(found), 4), found.dtype), np.empty(2 * len(gaps), gaps.dtype)
    for k in range(len(found)):  # copies of slices take seconds to compile
        more_gaps[k] = gaps[k]
        for part in range(4):
            more_found[k, part] = found[k, part]
    return more_found, more_gaps


@exact_kernel
@no_type_check
def blend(image, found, gaps, blended):
    """Adds to ``blended`` [pixel, channel] what neighbours give each other."""
    for k in range(len(found)):
        inside, outside = found[k, 0], found[k, 1]
        alpha = gaps.dtype.type(0.5) - gaps[k]
        target = outside if alpha > 0 else inside
        for channel in range(image.shape[1]):
            blended[target, channel] += alpha * (image[inside, channel] - image[outside, channel])


@exact_kernel
@no_type_check
def blend_backward(image, found, gaps, clip, edges, height, width, grad_blended, grad_image, grad_clip):
    """Adds to ``grad_image``, and fills ``grad_clip``."""
    num_views, num_vertices, _ = clip.shape
    places, grad = np.empty((3, num_vertices), clip.dtype), np.empty((num_vertices, 3), clip.dtype)
    half, k = clip.dtype.type(0.5), 0
    for view in range(num_views):
        project(clip[view], width, height, places)
        grad[:] = 0
        while k < len(found) and found[k, 3] == view:
            inside, outside, edge = found[k, 0], found[k, 1], found[k, 2]
            alpha, slope = half - gaps[k], half * 0
            target = outside if alpha > 0 else inside
            for channel in range(image.shape[1]):
                upstream = grad_blended[target, channel]
                slope += upstream * (image[inside, channel] - image[outside, channel])
                grad_image[inside, channel] += alpha * upstream
                grad_image[outside, channel] -= alpha * upstream
            slope = slope if inside < outside else -slope
            a, b = edges[edge, 0], edges[edge, 1]
            down = abs(places[1, b] - places[1, a]) < abs(places[0, b] - places[0, a])
            across, along = (1, 0) if down else (0, 1)
            line = inside % width if down else inside % (height * width) // width
            length = places[along, b] - places[along, a]
            part = (clip.dtype.type(line) + half - places[along, a]) / length
            lean = (places[across, b] - places[across, a]) / length
            grad[a, across] += (1 - part) * slope
            grad[b, across] += part * slope
            grad[a, along] -= (1 - part) * lean * slope
            grad[b, along] -= part * lean * slope
            k += 1
        _to_clip(places, grad, width, height, grad_clip[view])
