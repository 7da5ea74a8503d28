"""The kernels in plain torch: the truth that every other backend is measured against.

Written to be read and differentiated by autograd, on any device, in float32 and float64. Where another backend must
take the same decision (which cell, which face), the order of the floating point operations here is part of the
contract.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad, relu

from raydream.backend.layout import HASH_PRIMES, is_dense
from raydream.backend.reference_outline import antialias, project
from raydream.types import Fragments, HashGridLayout, Rays, RaySamples

RASTERIZE_CHUNK = 1 << 22
"""Pairs of face and pixel looked at together: bounds memory to some hundred MB."""


def hash_grid(
    points: Float[Tensor, "sample 3"], table: Float[Tensor, "entry feature"], layout: HashGridLayout
) -> Float[Tensor, "sample width"]:
    """Features of points (clamped to [0, 1]), level by level; differentiable by the table."""
    features = []
    for level in range(layout.num_levels):
        index, fraction = _cell_corners(points.detach(), layout, level)
        weight = _along_axes(_blend(fraction, layout)).prod(-1)
        features.append((table[index] * weight[..., None]).sum(1))
    return torch.cat(features, dim=-1)


def hash_grid_jacobian(
    points: Float[Tensor, "sample 3"], table: Float[Tensor, "entry feature"], layout: HashGridLayout
) -> tuple[Float[Tensor, "sample width"], Float[Tensor, "sample 3 width"]]:
    """Features and their derivatives by the point's coordinates; zero along an axis where clamping holds the point."""
    features, jacobians = [], []
    free = (points >= 0) & (points <= 1)
    sign = 2 * _corner_bits(points.device).to(points.dtype) - 1
    for level, resolution in enumerate(layout.resolutions):
        index, fraction = _cell_corners(points.detach(), layout, level)
        x, y, z = _along_axes(_blend(fraction, layout)).unbind(-1)
        steepness = free * resolution * _blend_slope(fraction, layout)
        slope = sign * torch.stack((y * z, x * z, x * y), dim=-1) * steepness[:, None]
        corner_features = table[index]
        features.append((corner_features * (x * y * z)[..., None]).sum(1))
        jacobians.append(torch.einsum("ncf,ncd->ndf", corner_features, slope))
    return torch.cat(features, dim=-1), torch.cat(jacobians, dim=-1)


def _corner_bits(device: torch.device) -> Int[Tensor, "8 3"]:
    corner = torch.arange(8, device=device)
    return torch.stack((corner & 1, corner >> 1 & 1, corner >> 2), dim=-1)


def _along_axes(fraction: Float[Tensor, "sample 3"]) -> Float[Tensor, "sample 8 3"]:
    """Weight of each corner of the cell along each axis; their product is the corner's weight."""
    upper = _corner_bits(fraction.device).bool()
    return torch.where(upper, fraction[:, None], 1 - fraction[:, None])


def _blend(fraction: Float[Tensor, "sample 3"], layout: HashGridLayout) -> Float[Tensor, "sample 3"]:
    """Weight of the upper corners at these places in a cell (tiny-cuda-nn's formula for smoothstep)."""
    return fraction**2 * (3 - 2 * fraction) if layout.interpolation == "smoothstep" else fraction


def _blend_slope(fraction: Float[Tensor, "sample 3"], layout: HashGridLayout) -> Float[Tensor, "sample 3"]:
    return 6 * fraction * (1 - fraction) if layout.interpolation == "smoothstep" else torch.ones_like(fraction)


def _cell_corners(
    points: Float[Tensor, "sample 3"], layout: HashGridLayout, level: int
) -> tuple[Int[Tensor, "sample 8"], Float[Tensor, "sample 3"]]:
    """Table rows of the cell's eight corners, and the place of the point in its cell."""
    resolution = layout.resolutions[level]
    scaled = points.clamp(0, 1) * resolution
    cell = scaled.floor().clamp(max=resolution - 1)
    x, y, z = (cell.long()[:, None] + _corner_bits(points.device)).unbind(-1)
    if is_dense(layout, level):
        row = x + (resolution + 1) * (y + (resolution + 1) * z)
    else:
        mask = layout.offsets[level + 1] - layout.offsets[level] - 1
        row = (x * HASH_PRIMES[0] ^ y * HASH_PRIMES[1] ^ z * HASH_PRIMES[2]) & mask
    return layout.offsets[level] + row, scaled - cell


def field(
    points: Float[Tensor, "sample 3"],
    table: Float[Tensor, "entry feature"],
    layout: HashGridLayout,
    hidden: Float[Tensor, "unit width"],
    head: Float[Tensor, "out unit"],
) -> Float[Tensor, "sample out"]:
    """``mlp`` of ``hash_grid``."""
    return mlp(hash_grid(points, table, layout), hidden, head)


def field_gradient(
    points: Float[Tensor, "sample 3"],
    table: Float[Tensor, "entry feature"],
    layout: HashGridLayout,
    hidden: Float[Tensor, "unit width"],
    head: Float[Tensor, "out unit"],
) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample 3"]]:
    """``field``, and the derivative of its output 0 by the point: both differentiable by table, hidden and head."""
    return mlp_gradient(*hash_grid_jacobian(points, table, layout), hidden, head)


def mlp(
    features: Float[Tensor, "sample width"], hidden: Float[Tensor, "unit width"], head: Float[Tensor, "out unit"]
) -> Float[Tensor, "sample out"]:
    """A network with one hidden layer of rectified units and no biases."""
    return linear(relu(linear(features, hidden)), head)


def mlp_gradient(
    features: Float[Tensor, "sample width"],
    jacobian: Float[Tensor, "sample 3 width"],
    hidden: Float[Tensor, "unit width"],
    head: Float[Tensor, "out unit"],
) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample 3"]]:
    """``mlp``, and the derivatives of its output 0 where ``jacobian`` is that of the features."""
    activation = linear(features, hidden)
    slope = ((activation > 0).to(head.dtype) * head[0]) @ hidden
    return linear(relu(activation), head), torch.einsum("sxf,sf->sx", jacobian, slope)


def march(
    rays: Rays, occupancy: Bool[Tensor, "rx ry rz"], radius: float, step_size: float, jitter: Float[Tensor, " ray"]
) -> RaySamples:
    """Intervals of ``step_size`` inside the box whose midpoint lies in an occupied cell.

    ``t_near`` is at least 0; a midpoint at the far side of the box or beyond it is outside.
    """
    near, far = box_span(rays, radius)
    step = torch.tensor(step_size, dtype=near.dtype, device=near.device)
    num_intervals = math.ceil(2 * math.sqrt(3) * radius / step_size) + 1
    k = torch.arange(num_intervals, device=near.device, dtype=near.dtype)
    t_start = near[:, None] + (k + jitter[:, None]) * step
    middle = t_start + 0.5 * step
    inside = middle < far[:, None]
    ray_index, _ = inside.nonzero(as_tuple=True)
    t_start, middle = t_start[inside], middle[inside]

    position = rays.origins[ray_index] + middle[:, None] * rays.directions[ray_index]
    shape = torch.tensor(occupancy.shape, device=near.device)
    scale = torch.tensor(0.5 / radius, dtype=near.dtype, device=near.device)
    cell = ((position * scale + 0.5) * shape.to(near.dtype)).floor().long()
    x, y, z = torch.minimum(cell.clamp(min=0), shape - 1).unbind(-1)
    kept = occupancy[x, y, z]
    ray_index, t_start = ray_index[kept], t_start[kept]
    counts = torch.bincount(ray_index, minlength=near.shape[0])
    return RaySamples(ray_index, t_start, t_start + step, counts.cumsum(0) - counts, counts)


def box_span(rays: Rays, radius: float) -> tuple[Float[Tensor, " ray"], Float[Tensor, " ray"]]:
    """Distances at which rays enter (at least 0) and leave the box; ``near > far`` where they miss it (slab test)."""
    origins, directions = rays.origins, rays.directions
    low = (-radius - origins) / directions
    high = (radius - origins) / directions
    # A ray parallel to a slab is inside it for all t or for none; 0 / 0 on its face would be NaN.
    parallel, between = directions == 0, origins.abs() <= radius
    entry = torch.where(parallel, torch.where(between, -math.inf, math.inf), torch.minimum(low, high))
    leave = torch.where(parallel, torch.where(between, math.inf, -math.inf), torch.maximum(low, high))
    return entry.amax(-1).clamp(min=0), leave.amin(-1)


def prune(
    density: Float[Tensor, " sample"], samples: RaySamples, min_alpha: Float[Tensor, ""], min_transmittance: float
) -> RaySamples:
    """The samples whose alpha is ``min_alpha`` or more and before which ``min_transmittance`` or more is left."""
    least_depth, most_depth = visible_depths(min_alpha, min_transmittance)
    # In float64, where one sum over all rays is as good as one for each; held at what hides everything behind it.
    depth = (density * (samples.t_end - samples.t_start)).double().clamp(max=128)
    before = depth.cumsum(0) - depth
    before = before - before[samples.starts[samples.ray_index]]
    # Compared such that a NaN is kept: what is wrong must show.
    kept = ~((depth < least_depth) | (before > most_depth))
    ray_index = samples.ray_index[kept]
    counts = torch.bincount(ray_index, minlength=len(samples.counts))
    return RaySamples(ray_index, samples.t_start[kept], samples.t_end[kept], counts.cumsum(0) - counts, counts)


def visible_depths(min_alpha: Float[Tensor, ""], min_transmittance: float) -> tuple[Float[Tensor, ""], float]:
    """The least optical depth of a sample of that alpha, and the greatest through which so much light comes."""
    return -torch.log1p(-min_alpha), -math.log(min_transmittance) if min_transmittance else math.inf


def composite(
    density: Float[Tensor, " sample"], values: Float[Tensor, "sample channel"], samples: RaySamples
) -> tuple[Float[Tensor, "ray channel"], Float[Tensor, " ray"], Float[Tensor, " sample"]]:
    """Accumulated values, opacity, and each sample's weight ``T_i (1 - exp(-density_i delta_i))`` (Max 1995)."""
    longest = max(int(samples.counts.max()), 1) if len(samples.counts) else 1
    owned = torch.arange(longest, device=density.device) < samples.counts[:, None]
    optical_depth = density.new_zeros(owned.shape).masked_scatter(owned, density * (samples.t_end - samples.t_start))
    transmittance = torch.exp(-pad(optical_depth.cumsum(1), (1, -1)))
    padded_weights = transmittance * -torch.expm1(-optical_depth)
    padded_values = values.new_zeros(*owned.shape, values.shape[1]).masked_scatter(owned[..., None], values)
    accumulated = (padded_weights[..., None] * padded_values).sum(1)
    return accumulated, padded_weights.sum(1), padded_weights[owned]


def rasterize(
    clip: Float[Tensor, "view vertex 4"], faces: Int[Tensor, "face 3"], height_px: int, width_px: int
) -> Fragments:
    """The nearest face at each pixel centre; of equally near ones that of the lowest index.

    Faces are two-sided and own their edges; barycentrics and depth are 0 where there is no face.
    """
    corners, spans = face_corners(clip, faces.long(), height_px, width_px)
    face = [_nearest_faces(*view, height_px * width_px, width_px) for view in zip(corners.detach(), spans)]
    return make_fragments(corners, torch.stack(face).view(-1, height_px, width_px))


def face_corners(
    clip: Float[Tensor, "view vertex 4"], faces: Int[Tensor, "face 3"], height_px: int, width_px: int
) -> tuple[Float[Tensor, "view face 3 3"], Int[Tensor, "view face 5"]]:
    """Pixel coordinates and ``w`` of each face's corners; and the first column and row of the pixel centres in its box,
    their numbers, and their product, 0 where the face is not seen.
    """
    places, usable = project(clip, height_px, width_px)
    corners = places[:, faces]
    left, num_columns = _pixel_span(corners[..., 0], width_px)
    top, num_rows = _pixel_span(corners[..., 1], height_px)
    num_pixels = torch.where(usable[:, faces].all(-1), num_columns * num_rows, 0)
    return corners, torch.stack((left, top, num_columns, num_rows, num_pixels), dim=-1)


def make_fragments(corners: Float[Tensor, "view face 3 3"], face: Int[Tensor, "view h w"]) -> Fragments:
    """Barycentrics and depth of the faces that stand at pixels."""
    num_views, height_px, width_px = face.shape
    if not corners.shape[1]:
        nothing = corners.sum()  # with a gradient, if of nothing
        return Fragments(face, nothing.expand(*face.shape, 3), nothing.expand(face.shape))
    view = torch.arange(num_views, device=face.device)[:, None]
    pixel = torch.arange(height_px * width_px, device=face.device).repeat(num_views)
    empty = face < 0
    there = corners[view, face.clamp(min=0).flatten(1)].flatten(0, 1)
    one = torch.eye(3, dtype=corners.dtype, device=corners.device)
    anywhere = torch.stack((one[1], one[2], one.sum(0)), dim=1)  # a face whose gradients are 0, not NaN
    there = torch.where(empty.view(-1, 1, 1), anywhere, there)
    barycentric, depth = _perspective_weights(there, pixel % width_px, pixel // width_px)
    barycentric, depth = barycentric.view(*face.shape, 3), depth.view(face.shape)
    return Fragments(face, barycentric.masked_fill(empty[..., None], 0), depth.masked_fill(empty, 0))


def _nearest_faces(
    corners: Float[Tensor, "face 3 3"], spans: Int[Tensor, "face 5"], num_image_pixels: int, width_px: int
) -> Int[Tensor, " pixel"]:
    left, top, num_columns, _, num_pixels = spans.unbind(-1)
    face = torch.full((num_image_pixels,), -1, device=corners.device)
    depth = corners.new_full((num_image_pixels,), math.inf)
    num_per_chunk = torch.bincount(num_pixels.cumsum(0) // RASTERIZE_CHUNK)
    for chunk in torch.arange(len(corners), device=corners.device).split(num_per_chunk.tolist()):
        repeats = num_pixels[chunk]
        pair_face = chunk.repeat_interleave(repeats)
        place = torch.arange(len(pair_face), device=corners.device)
        place = place - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
        row = top[pair_face] + place // num_columns[pair_face]
        column = left[pair_face] + place % num_columns[pair_face]
        _, distance = _perspective_weights(corners[pair_face], column, row)

        hit = (distance < math.inf).nonzero().squeeze(1)
        pixel, distance, pair_face = (row * width_px + column)[hit], distance[hit], pair_face[hit]
        nearest = depth.scatter_reduce(0, pixel, distance, "amin")
        wins = (distance == nearest[pixel]) & (distance < depth[pixel])
        lowest = torch.full_like(face, len(corners)).scatter_reduce(0, pixel[wins], pair_face[wins], "amin")
        wins &= pair_face == lowest[pixel]
        face[pixel[wins]] = pair_face[wins]
        depth = nearest
    return face


def _pixel_span(
    coordinate: Float[Tensor, "view face 3"], num_pixels: int
) -> tuple[Int[Tensor, "view face"], Int[Tensor, "view face"]]:
    """First pixel whose centre lies between a face's extremes, and the number of such pixels."""
    first = (coordinate.amin(-1) - 0.5).ceil().clamp(0, num_pixels).long()
    last = (coordinate.amax(-1) - 0.5).floor().clamp(-1, num_pixels - 1).long()
    return first, (last - first + 1).clamp(min=0)


def _perspective_weights(
    corners: Float[Tensor, "pair 3 3"], column: Int[Tensor, " pair"], row: Int[Tensor, " pair"]
) -> tuple[Float[Tensor, "pair 3"], Float[Tensor, " pair"]]:
    """Perspective-correct barycentrics and depth of faces at pixel centres; depth is infinite outside a face.

    The edge function is the cross product of two corners seen from the pixel: it changes its sign exactly when the
    corners change places, so that two faces never leave a gap between them.
    """
    x = corners[..., 0] - (column + 0.5).to(corners.dtype)[:, None]
    y = corners[..., 1] - (row + 0.5).to(corners.dtype)[:, None]
    (x0, x1, x2), (y0, y1, y2) = x.unbind(1), y.unbind(1)
    area0, area1, area2 = x1 * y2 - y1 * x2, x2 * y0 - y2 * x0, x0 * y1 - y0 * x1
    area = torch.stack((area0, area1, area2), dim=-1)
    total = area0 + area1 + area2
    inside = ((area >= 0).all(1) | (area <= 0).all(1)) & (total != 0)
    scaled0, scaled1, scaled2 = (area / corners[..., 2]).unbind(1)
    normalizer = scaled0 + scaled1 + scaled2
    weights = torch.stack((scaled0, scaled1, scaled2), dim=-1) / normalizer[:, None]
    return weights, torch.where(inside, total / normalizer, math.inf)


def interpolate(
    values: Float[Tensor, "vertex channel"], faces: Int[Tensor, "face 3"], fragments: Fragments
) -> Float[Tensor, "view h w channel"]:
    """The sum of the corners' values by barycentrics, which are 0 where there is no face."""
    if not len(faces):
        return values[:0].sum().expand(*fragments.face.shape, values.shape[1])
    there = fragments.face >= 0
    corners = values[faces[fragments.face.clamp(min=0).long()].long()]
    corners = torch.where(there[..., None, None], corners, 0)
    return (fragments.barycentric[..., None] * corners).sum(-2)


class ReferenceBackend:
    """The plain torch kernels as a ``Backend``, for every device and dtype."""

    name = "reference"
    field = staticmethod(field)
    field_gradient = staticmethod(field_gradient)
    march = staticmethod(march)
    prune = staticmethod(prune)
    composite = staticmethod(composite)
    rasterize = staticmethod(rasterize)
    interpolate = staticmethod(interpolate)
    antialias = staticmethod(antialias)
