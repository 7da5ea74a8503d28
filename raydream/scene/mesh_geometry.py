"""What follows from the vertices and faces of a closed surface, differentiable by its vertices."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raydream.types import Mesh


def face_areas(mesh: Mesh) -> Float[Tensor, "face 3"]:
    """For each face its outward normal, as long as twice its area."""
    a, b, c = (mesh.vertices.index_select(0, mesh.faces[:, corner]) for corner in range(3))
    return torch.linalg.cross(b - a, c - a)


def smooth_normals(mesh: Mesh) -> Float[Tensor, "vertex 3"]:
    """Unit normals of the vertices: the mean of their faces, weighted by area."""
    areas, total = face_areas(mesh), torch.zeros_like(mesh.vertices)
    for corner in range(3):
        total = total.index_add(0, mesh.faces[:, corner], areas)
    return F.normalize(total, dim=-1, eps=1e-20)


def face_pairs(mesh: Mesh) -> Int[Tensor, "edge 2"]:
    """The two faces at each edge of a closed surface."""
    ends = torch.cat([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    low, high = ends.min(-1).values, ends.max(-1).values
    order = (low * len(mesh.vertices) + high).argsort(stable=True)
    return (order % len(mesh.faces)).view(-1, 2)


def normal_consistency(mesh: Mesh) -> Float[Tensor, ""]:
    """How much a surface is creased: the mean over its edges of one minus the cosine between the two faces' normals."""
    normals = F.normalize(face_areas(mesh), dim=-1, eps=1e-20)
    one, other = face_pairs(mesh).unbind(-1)
    return (1 - (normals.index_select(0, one) * normals.index_select(0, other)).sum(-1)).mean()


def laplacian(mesh: Mesh) -> Float[Tensor, ""]:
    """How uneven a surface is: the mean over its vertices of the squared distance to the mean of their neighbours."""
    vertices, faces = mesh.vertices, mesh.faces
    total, count = torch.zeros_like(vertices), vertices.new_zeros(len(vertices), 1)
    ones = vertices.new_ones(len(faces), 1)
    for corner in range(3):  # on a closed surface each neighbour comes next in one face and before in another
        here, following = faces[:, corner], faces[:, (corner + 1) % 3]
        total = total.index_add(0, here, vertices.index_select(0, following))
        count = count.index_add(0, here, ones)
    return (total / count.clamp(min=1) - vertices).square().sum(-1).mean()
