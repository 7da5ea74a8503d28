"""Deformable marching tetrahedra (DMTet, arXiv 2111.04276): the surface of signed values at the points of a grid.

Each cell of a box is cut along its diagonal into six tetrahedra (Kuhn), everywhere in the same way, so that neighbours
agree about the faces between them. A corner of a cell is a mask of three bits, one for each axis, and the seven edges
that leave a point of the grid are known by the mask of the corner that they lead to.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from raydream.scene.protocol import EmptyMeshError

# ways from corner 0 to corner 7 along the axes, the two in the middle in such order that the volume is positive
_TETRAHEDRA = ((0, 4, 6, 7), (0, 5, 4, 7), (0, 6, 2, 7), (0, 2, 3, 7), (0, 1, 5, 7), (0, 3, 1, 7))
_EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# By which of four corners are inside (bit 0 is the first): triangles of crossed edges, counter-clockwise from outside.
_TRIANGLES = (
    (),
    ((0, 1, 2),),
    ((0, 4, 3),),
    ((1, 2, 4), (1, 4, 3)),
    ((1, 3, 5),),
    ((0, 5, 2), (0, 3, 5)),
    ((0, 5, 1), (0, 4, 5)),
    ((2, 4, 5),),
    ((2, 5, 4),),
    ((0, 1, 5), (0, 5, 4)),
    ((0, 2, 5), (0, 5, 3)),
    ((1, 5, 3),),
    ((1, 4, 2), (1, 3, 4)),
    ((0, 3, 4),),
    ((0, 2, 1),),
    (),
)
_LEAST = 1e-6  # a value of 0 would put the vertices of several edges onto one point


@dataclass(frozen=True)
class Crossings:
    """Where a surface crosses a grid: an edge from ``inside`` to ``outside``, flat indices of points, is a vertex."""

    inside: Int[Tensor, " vertex"]
    outside: Int[Tensor, " vertex"]
    faces: Int[Tensor, "face 3"]


def marching_tetrahedra(
    values: Float[Tensor, "nx ny nz"], deformation: Float[Tensor, "nx ny nz 3"], lower: Tensor, upper: Tensor
) -> tuple[Float[Tensor, "vertex 3"], Int[Tensor, "face 3"]]:
    """The closed surface around what is above 0, faces counter-clockwise from outside, differentiable by all four.

    Points of the grid fill the box from ``lower`` to ``upper``; ``tanh(deformation)`` moves each by up to half a cell.
    A vertex divides its edge as the values at the ends do. Points on the box's own surface count as outside. Raises
    EmptyMeshError where nothing is above 0.
    """
    crossings = find_crossings(values.detach())
    if not len(crossings.faces):
        raise EmptyMeshError(
            "no surface: the object has vanished from its grid; lower lr_values or raise the weight of what pulls on "
            "it, and go on from a checkpoint before"
        )
    ends = torch.cat([crossings.inside, crossings.outside])
    points = grid_points(ends, values.shape, lower, upper, deformation.reshape(-1, 3).index_select(0, ends))
    value = values.reshape(-1).index_select(0, ends)
    (start, end), (above, below) = points.chunk(2), value.chunk(2)
    below = below.clamp(max=-_LEAST)  # also on the box
    share = (above / (above - below))[:, None]
    return start + share * (end - start), crossings.faces


def grid_points(
    index: Int[Tensor, " point"],
    shape: torch.Size,
    lower: Float[Tensor, "3"],
    upper: Float[Tensor, "3"],
    deformation: Float[Tensor, "point 3"] | None = None,
) -> Float[Tensor, "point 3"]:
    """Where points of a grid lie, by their flat indices."""
    _, ny, nz = shape
    place = torch.stack([index // (ny * nz), index // nz % ny, index % nz], dim=-1).to(lower)
    if deformation is not None:
        place = place + 0.5 * torch.tanh(deformation)
    cells = torch.tensor(shape, device=lower.device, dtype=lower.dtype) - 1
    return lower + place * ((upper - lower) / cells)


@torch.no_grad()
def find_crossings(values: Float[Tensor, "nx ny nz"]) -> Crossings:
    """Vertices and faces of the surface around what is above 0; vertices in the order of their edges."""
    inside = _without_rim(values > 0)
    _, ny, nz = inside.shape
    tables, flat = _tables(ny, nz, values.device), inside.view(-1)
    corner = _mixed_cells(inside)[:, None] + tables.corners
    code = (flat.take(corner).float() @ tables.bits).long().view(-1)  # of each tetrahedron: its corners inside
    tetrahedron, triangle = tables.is_face.index_select(0, code).nonzero(as_tuple=True)
    local = tables.triangles.index_select(0, 2 * code.index_select(0, tetrahedron) + triangle)
    edge = 6 * (tetrahedron % 6)[:, None] + local
    first = corner.view(-1).index_select(0, 8 * (tetrahedron // 6))[:, None] + tables.starts.take(edge)

    # numbers of the crossed edges of all points near the surface; of edges from the rim none is crossed
    near = torch.zeros_like(flat)
    near[corner.view(-1)] = True
    points = near.nonzero().view(-1)
    ends = (points[:, None] + tables.corners[1:]).clamp(max=len(flat) - 1)
    starts_inside = flat.index_select(0, points)
    crossed = flat.take(ends) ^ starts_inside[:, None]
    number = crossed.view(-1).cumsum(0) - 1
    place = torch.empty(len(flat), dtype=torch.long, device=flat.device)
    place[points] = torch.arange(len(points), device=flat.device)
    faces = number.take(7 * place.take(first) + tables.directions.take(edge))

    point = crossed.nonzero(as_tuple=True)[0]
    start, end = points.index_select(0, point), ends[crossed]
    swapped = ~starts_inside.index_select(0, point)
    return Crossings(torch.where(swapped, end, start), torch.where(swapped, start, end), faces)


@dataclass(frozen=True)
class _Tables:
    """``corners`` are steps in flat index from a cell to its corners, ``starts`` those to where an edge of a
    tetrahedron begins; its direction is one less than the mask.
    """

    corners: Int[Tensor, "8"]
    bits: Float[Tensor, "8 6"]
    is_face: Bool[Tensor, "16 2"]
    triangles: Int[Tensor, "32 3"]
    starts: Int[Tensor, "36"]
    directions: Int[Tensor, "36"]


@lru_cache
def _tables(ny: int, nz: int, device: torch.device) -> _Tables:
    step = [(mask >> 2 & 1) * ny * nz + (mask >> 1 & 1) * nz + (mask & 1) for mask in range(8)]
    bits = torch.zeros(8, 6)
    for number, corners in enumerate(_TETRAHEDRA):
        bits[list(corners), number] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    is_face = [[len(triangles) > place for place in range(2)] for triangles in _TRIANGLES]
    padded = [triangle for triangles in _TRIANGLES for triangle in (*triangles, (0, 0, 0), (0, 0, 0))[:2]]
    ends = [(t[a], t[b]) for t in _TETRAHEDRA for a, b in _EDGES]  # one of them is on the way to the other
    starts, directions = [step[min(pair)] for pair in ends], [(a ^ b) - 1 for a, b in ends]
    arrays = torch.tensor(step), bits, *map(torch.tensor, (is_face, padded, starts, directions))
    return _Tables(*(array.to(device) for array in arrays))


def _without_rim(inside: Bool[Tensor, "nx ny nz"]) -> Bool[Tensor, "nx ny nz"]:
    core = torch.zeros_like(inside)
    core[1:-1, 1:-1, 1:-1] = inside[1:-1, 1:-1, 1:-1]
    return core


def _mixed_cells(inside: Bool[Tensor, "nx ny nz"]) -> Int[Tensor, " cell"]:
    """The first corners of all cells that have corners on both sides."""
    some, every = inside, inside
    for axis in range(3):
        length = inside.shape[axis] - 1
        some = some.narrow(axis, 0, length) | some.narrow(axis, 1, length)
        every = every.narrow(axis, 0, length) & every.narrow(axis, 1, length)
    x, y, z = (some & ~every).nonzero(as_tuple=True)
    _, ny, nz = inside.shape
    return (x * ny + y) * nz + z
