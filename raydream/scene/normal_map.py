"""The form that decimation took away, as a texture of normals."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.spatial import cKDTree

from raydream.scene.tangents import vertex_tangents
from raydream.scene.texture import fill_gaps, surface_points, vertex_normals
from raydream.types import Mesh

_NEIGHBOURS = 4
_ROUNDS = 3
_CHUNK_SIZE = 65_536


def bake_normals(mesh: Mesh, fine: Mesh) -> Mesh:
    """A textured mesh with a normal map of its texture's size: at each texel the smoothed normal of the fine mesh
    nearby, from its four nearest vertices that face the same way, the nearer the more.
    """
    assert mesh.uv is not None
    assert mesh.texture is not None
    size_px = mesh.texture.shape[0]
    vertices, faces, uv = mesh.vertices.numpy(), mesh.faces.numpy(), mesh.uv.numpy()
    normals = vertex_normals(vertices, faces)
    tangents = vertex_tangents(vertices, normals, faces, uv)
    values = np.concatenate([vertices, normals, tangents], axis=-1).astype(np.float32)
    texel, values = surface_points(values, faces, uv, size_px)
    fine_vertices, fine_faces = fine.vertices.numpy(), fine.faces.numpy()
    tree, fine_normals = cKDTree(fine_vertices), _smooth_normals(fine_vertices, fine_faces)
    colors = np.zeros((size_px * size_px, 3), dtype=np.float32)
    for start in range(0, len(texel), _CHUNK_SIZE):
        place, normal, tangent, sign = np.split(values[start : start + _CHUNK_SIZE], (3, 6, 9), axis=-1)
        distance, nearest = tree.query(place, k=min(_NEIGHBOURS, len(fine_vertices)))
        seen = fine_normals[nearest]
        weight = ((seen * normal[:, None]).sum(-1) > 0) / (distance.astype(np.float32) + 1e-6)
        found = (seen * weight[..., None]).sum(1)
        found = np.where((found * normal).sum(-1, keepdims=True) > 0, found, normal)
        bitangent = np.cross(normal, tangent) * np.sign(sign)
        # a viewer adds these three as they are between vertices, so neither is made a unit vector
        frame = np.stack([tangent, bitangent, normal], axis=-1)
        colors[texel[start : start + _CHUNK_SIZE]] = _outwards(np.linalg.solve(frame, found[..., None])[..., 0])
    filled = fill_gaps(colors, texel, size_px)
    return replace(mesh, normal_map=torch.from_numpy(filled))


def _smooth_normals(
    vertices: Float[np.ndarray, "vertex 3"], faces: Int[np.ndarray, "face 3"]
) -> Float[np.ndarray, "vertex 3"]:
    """Without the stairs of the grid that the fine mesh was made on, by means over neighbours: measured on a sphere
    with waves of 40 voxels, three rounds take its error from 7.8 to 2.4 degrees, and more hardly change it.
    """
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    size = (len(vertices), len(vertices))
    near = sparse.coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=size).tocsr()
    near = near + near.T + 2 * sparse.eye(len(vertices))
    normals = vertex_normals(vertices, faces)
    for _ in range(_ROUNDS):
        normals = near @ normals
        normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-20)
    return normals.astype(np.float32)


def _outwards(vector: Float[np.ndarray, "texel 3"]) -> Float[np.ndarray, "texel 3"]:
    vector = np.where(vector[:, 2:] > 0, vector, (0.0, 0.0, 1.0))  # a map holds what faces outwards
    return (vector / np.linalg.norm(vector, axis=-1, keepdims=True)).astype(np.float32)
