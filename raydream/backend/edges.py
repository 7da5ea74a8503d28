"""The edges of a mesh, which are found once for as long as its faces stay."""

import torch
from jaxtyping import Int
from torch import Tensor

from raydream.types import MeshEdges


def find_edges(faces: Int[Tensor, "face 3"]) -> MeshEdges:
    """Each edge once, by its vertices; what meets there in the order of the faces."""
    pairs = faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2).long().sort(dim=1).values
    opposite = faces[:, [2, 0, 1]].reshape(-1).long()
    most = int(faces.max()) + 1 if len(faces) else 1
    key, order = (pairs[:, 0] * most + pairs[:, 1]).sort(stable=True)
    key, counts = torch.unique_consecutive(key, return_counts=True)
    vertices = torch.stack((key // most, key % most), dim=1)
    return MeshEdges(vertices, opposite[order], counts.cumsum(0) - counts, counts)
