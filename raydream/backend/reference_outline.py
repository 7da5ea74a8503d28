"""Where vertices are in the image, and blending across the outlines of a mesh: a part of ``reference.py``.

Along an edge that is closer to a column than to a row, ``u`` is x and ``v`` is y: it passes between neighbours of a
row; else the other way about. What it passes is a slot, ``pixel * 2`` for the pixel and its right neighbour, one more
for the pixel and its lower one.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from raydream.types import Fragments, MeshEdges


def project(
    clip: Float[Tensor, "view vertex 4"], height_px: int, width_px: int
) -> tuple[Float[Tensor, "view vertex 3"], Bool[Tensor, "view vertex"]]:
    """Pixel coordinates and ``w``; and whether a vertex is before the camera and finite. Where it is not, the place is
    any, without a gradient.
    """

    def places(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return torch.stack(((x / w * 0.5 + 0.5) * width_px, (0.5 - y / w * 0.5) * height_px, w), dim=-1)

    x, y, _, w = clip.unbind(-1)
    usable = places(x.detach(), y.detach(), w.detach()).isfinite().all(-1) & (w > 0)
    return places(torch.where(usable, x, 0), torch.where(usable, y, 0), torch.where(usable, w, 1)), usable


def antialias(
    image: Float[Tensor, "view h w channel"],
    clip: Float[Tensor, "view vertex 4"],
    edges: MeshEdges,
    fragments: Fragments,
) -> Float[Tensor, "view h w channel"]:
    """See ``Backend.antialias``."""
    num_views, height_px, width_px, _ = image.shape
    places, usable = project(clip, height_px, width_px)
    depth = torch.where(fragments.face < 0, torch.inf, fragments.depth.detach()).flatten()
    flat = total = image.flatten(0, 2)
    for view in range(num_views):
        own = depth[view * height_px * width_px :][: height_px * width_px]
        slot, edge = _outline(places[view].detach(), usable[view], edges, own, height_px, width_px)
        if not len(slot):
            continue
        pixel, down = slot // 2, slot % 2 == 1
        neighbour = pixel + torch.where(down, width_px, 1)
        u, _ = _pass(places[view][edges.vertices[edge]], down, pixel, width_px)
        beyond = u - torch.where(down, pixel // width_px, pixel % width_px) - 0.5
        lower = own[pixel] < own[neighbour]  # the nearer is inside
        inside, outside = torch.where(lower, pixel, neighbour), torch.where(lower, neighbour, pixel)
        alpha = torch.where(lower, beyond, 1 - beyond) - 0.5
        first = view * height_px * width_px
        difference = flat[first + inside] - flat[first + outside]
        total = total.index_add(0, first + torch.where(alpha > 0, outside, inside), alpha[:, None] * difference)
    return total.view(image.shape)


def _outline(
    places: Float[Tensor, "vertex 3"],
    usable: Bool[Tensor, " vertex"],
    edges: MeshEdges,
    depth: Float[Tensor, " pixel"],
    height_px: int,
    width_px: int,
) -> tuple[Int[Tensor, " slot"], Int[Tensor, " slot"]]:
    """The slots that an outline passes, and the edge that does so farthest out."""
    edge, side = _one_sided(places, usable, edges)
    a, b = places[edges.vertices[edge]].unbind(1)
    down = (b - a)[:, 1].abs() < (b - a)[:, 0].abs()
    v = torch.where(down[:, None], torch.stack((a[:, 0], b[:, 0]), 1), torch.stack((a[:, 1], b[:, 1]), 1))
    num_lines = torch.where(down, width_px, height_px)
    first, end = (torch.minimum((v_end - 0.5).ceil().clamp(min=0), num_lines).long() for v_end in v.aminmax(dim=1))
    repeats = end - first
    which = torch.arange(len(edge), device=edge.device).repeat_interleave(repeats)
    line = torch.arange(len(which), device=edge.device) - (repeats.cumsum(0) - repeats - first)[which]
    edge, side, down = edge[which], side[which], down[which]

    pixel = torch.where(down, line, line * width_px)
    corners = places[edges.vertices[edge]]
    u, edge_depth = _pass(corners, down, pixel, width_px)
    before = (u - 0.5).floor()
    fits = (before >= 0) & (before + 1 < torch.where(down, height_px, width_px))
    before = torch.where(fits, before, 0)
    beyond = u - before - 0.5
    pixel = pixel + before.long() * torch.where(down, width_px, 1)
    neighbour = torch.where(fits, pixel + torch.where(down, width_px, 1), 0)
    along = torch.where(down, corners[:, 1, 0] - corners[:, 0, 0], corners[:, 0, 1] - corners[:, 1, 1])
    lower = side * along < 0  # inside is where u is less
    inside, outside = torch.where(lower, pixel, neighbour), torch.where(lower, neighbour, pixel)
    inside, outside = depth[inside], depth[outside]
    passes = fits & (edge_depth < outside) & (inside + inside < edge_depth + outside) & (inside < torch.inf)
    gap = torch.where(lower, 1 - beyond, beyond)
    slot, gap, edge = (part[passes] for part in (pixel * 2 + down, gap, edge))
    least = gap.new_full((2 * height_px * width_px,), torch.inf).scatter_reduce(0, slot, gap, "amin")
    slot, edge = slot[gap == least[slot]], edge[gap == least[slot]]
    lowest = edge.new_full((2 * height_px * width_px,), len(edges.counts)).scatter_reduce(0, slot, edge, "amin")
    (slot,) = (lowest < len(edges.counts)).nonzero(as_tuple=True)
    return slot, lowest[slot]


def _one_sided(
    places: Float[Tensor, "vertex 3"], usable: Bool[Tensor, " vertex"], edges: MeshEdges
) -> tuple[Int[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """The edges with all faces that are seen on one side, and which: the sign of the area that each makes with it."""
    edge = torch.arange(len(edges.counts), device=places.device).repeat_interleave(edges.counts)
    a, b = edges.vertices[edge].unbind(1)
    x, y = (places[edges.opposite] - places[a])[:, :2].unbind(1)
    dx, dy = (places[b] - places[a])[:, :2].unbind(1)
    side = torch.where(usable[a] & usable[b] & usable[edges.opposite], (dx * y - dy * x).sign(), 0)
    none = side.new_zeros(len(edges.counts))
    least, most = (none.scatter_reduce(0, edge, side, how) for how in ("amin", "amax"))
    (chosen,) = (least * most == 0).logical_and(least + most != 0).nonzero(as_tuple=True)
    return chosen, (least + most)[chosen]


def _pass(
    corners: Float[Tensor, "slot 2 3"], down: Bool[Tensor, " slot"], pixel: Int[Tensor, " slot"], width_px: int
) -> tuple[Float[Tensor, " slot"], Float[Tensor, " slot"]]:
    """Where the edge crosses the line through pixel centres, and its depth there."""
    x, y, w = corners.unbind(-1)
    (ua, ub), (va, vb) = torch.where(down[:, None], y, x).unbind(1), torch.where(down[:, None], x, y).unbind(1)
    line = torch.where(down, pixel % width_px, pixel // width_px).to(x.dtype) + 0.5
    slope = (ub - ua) / (vb - va)
    part = (line - va) / (vb - va)
    return ua + (line - va) * slope, 1 / ((1 - part) / w[:, 0] + part / w[:, 1])
