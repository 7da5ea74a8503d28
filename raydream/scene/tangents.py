"""The space that a normal map is written in, at each vertex: glTF's default, MikkTSpace.

That asks for the mean of the faces' tangents at a vertex, each laid into the plane across the normal and weighted by
the face's angle there (Mikkelsen, 2008), over the faces that share the vertex and the direction of the texture. Here
faces that meet at a vertex by index lie in one chart, so they are that group. ``tangent``: along growing u; the
bitangent, along growing v (upwards in a picture), is ``cross(normal, tangent) * sign``.
"""

import numpy as np
from jaxtyping import Float, Int

_TINY = 1e-20


def vertex_tangents(
    vertices: Float[np.ndarray, "vertex 3"],
    normals: Float[np.ndarray, "vertex 3"],
    faces: Int[np.ndarray, "face 3"],
    uv: Float[np.ndarray, "vertex 2"],
) -> Float[np.ndarray, "vertex 4"]:
    """The unit tangent at each vertex, across its normal, and the sign of the bitangent."""
    corner, place = vertices[faces].astype(np.float64), uv[faces].astype(np.float64)
    edge, step = corner[:, 1:] - corner[:, :1], place[:, 1:] - place[:, :1]
    turn = np.sign(step[:, 0, 0] * step[:, 1, 1] - step[:, 0, 1] * step[:, 1, 0])
    along = (edge[:, 0] * step[:, 1, 1:] - edge[:, 1] * step[:, 0, 1:]) * turn[:, None]
    tangent, sign = np.zeros((len(vertices), 3)), np.zeros(len(vertices))
    for index in range(3):
        vertex = faces[:, index]
        normal = normals[vertex].astype(np.float64)
        flat = _unit(_across(along, normal))
        first, second = (_unit(_across(corner[:, (index + k) % 3] - corner[:, index], normal)) for k in (1, 2))
        angle = np.arccos((first * second).sum(-1).clip(-1, 1)) * (turn != 0)
        np.add.at(tangent, vertex, flat * angle[:, None])
        np.add.at(sign, vertex, turn * angle)
    any_way = _across(np.eye(3)[np.abs(normals).argmin(1)], normals.astype(np.float64))
    lost = np.linalg.norm(tangent, axis=-1, keepdims=True) < 1e-9
    tangent = _unit(np.where(lost, any_way, tangent))
    return np.concatenate([tangent, np.where(sign < 0, -1.0, 1.0)[:, None]], axis=-1)


def _across(vector: Float[np.ndarray, "n 3"], normal: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return vector - (vector * normal).sum(-1, keepdims=True) * normal


def _unit(vector: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), _TINY)
