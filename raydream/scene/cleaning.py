"""Clean geometry: what nobody sees thrown away, few faces, two of them at every edge, closed solids."""

import fast_simplification
import manifold3d
import numpy as np
import torch
import trimesh
from jaxtyping import Bool, Float, Int

from raydream.scene.crossings import turns_around
from raydream.types import Mesh

Points = Float[np.ndarray, "vertex 3"]
Faces = Int[np.ndarray, "face 3"]
KeptFaces = Int[np.ndarray, "kept_face 3"]
Changed = tuple[Float[np.ndarray, "kept_vertex 3"], KeptFaces]

_STEP_APART = 1e-5
_WITNESSES = 8  # vertices of a piece: inside another where most of them are


def decimate_mesh(mesh: Mesh, max_faces: int) -> Mesh:
    """The mesh with about ``max_faces`` at most, in float32, vertices and faces alone. Quadric decimation may lay two
    sheets upon each other, where four faces then meet at an edge; there it is mended as ``mend_edges`` can.
    """
    vertices, faces = mesh.vertices.numpy(), mesh.faces.numpy()
    if len(faces) > max_faces:
        vertices, faces = fast_simplification.simplify(vertices, faces, target_count=max_faces)
    vertices, faces = mend_edges(*compact(vertices, faces))
    return Mesh(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces.astype(np.int64)))


def mend_edges(vertices: Points, faces: Faces) -> Changed:
    """Unchanged where no edge belongs to more than two faces, or where manifold3d finds no way to part or close them:
    it needs a surface whose faces at each edge go one way as often as the other.
    """
    if not _has_crowded_edge(faces):
        return vertices, faces
    solid = _solid(vertices, faces)
    if solid.status() != manifold3d.Error.NoError or solid.is_empty():
        return vertices, faces
    mended = _apart(*_arrays(solid))
    return (vertices, faces) if _has_crowded_edge(_welded(*mended)[1]) else mended


def _apart(vertices: Points, faces: Faces) -> tuple[Points, Faces]:
    """What manifold3d parts it leaves in the same place, where whoever welds vertices finds the edge again: each of
    several vertices in one place moves into its own piece by a hundred-thousandth of the mesh.
    """
    _, place, count = np.unique(vertices, axis=0, return_inverse=True, return_counts=True)
    doubled = count[place.reshape(-1)] > 1
    normals = trimesh.Trimesh(vertices, faces, process=False).vertex_normals
    step = _STEP_APART * float(np.ptp(vertices, axis=0).max())
    return np.where(doubled[:, None], vertices - step * normals, vertices).astype(vertices.dtype), faces


def close_mesh(mesh: Mesh) -> Mesh | None:
    """The solid within a mesh by manifold3d: every edge has two faces, pieces that overlap are one, hollows are filled.
    None where the mesh is no boundary of a solid, for one as it has holes.
    """
    solid = _solid(mesh.vertices.numpy(), mesh.faces.numpy())
    if solid.status() != manifold3d.Error.NoError or solid.volume() <= 0:
        return None
    outer = [piece for piece in solid.decompose() if piece.volume() > 0]
    vertices, faces = _arrays(manifold3d.Manifold.batch_boolean(outer, manifold3d.OpType.Add))
    faces = drop_unseen_pieces(vertices, faces, 0.0)
    vertices, faces = compact(vertices, faces)
    return Mesh(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces.astype(np.int64)))


def drop_unseen_pieces(vertices: Points, faces: Faces, debris_share: float) -> KeptFaces:
    """Without cavities and what else lies inside another piece, which no camera sees, and without pieces of less than a
    share of the faces; the largest piece always stays.

    Every piece is closed, so a cavity is one whose signed volume is negative: its faces look inwards.
    """
    piece = _pieces(vertices, faces)
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    volume = np.bincount(piece, weights=(a * np.cross(b, c)).sum(-1))
    num_faces = np.bincount(piece) * (volume > 0)
    kept = (num_faces >= max(1.0, debris_share * num_faces.sum()))[piece] | (piece == num_faces.argmax())
    faces, piece = faces[kept], piece[kept]
    return faces[~_enclosed(vertices, faces, piece)]


def keep_largest_piece(mesh: Mesh) -> Mesh:
    """The piece with the largest area alone."""
    vertices, faces = mesh.vertices.numpy(), mesh.faces.numpy()
    piece = _pieces(vertices, faces)
    area = np.bincount(piece, weights=trimesh.triangles.area(vertices[faces]))
    vertices, faces = compact(vertices, faces[piece == area.argmax()])
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(faces))


def compact(vertices: Points, faces: Faces) -> Changed:
    """Only the vertices that a face uses."""
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[used], renumbered.reshape(faces.shape)


def _enclosed(vertices: Points, faces: Faces, piece: Int[np.ndarray, " face"]) -> Bool[np.ndarray, " face"]:
    names, piece = np.unique(piece, return_inverse=True)
    if len(names) < 2:
        return np.zeros(len(faces), dtype=bool)
    order = np.argsort(piece, kind="stable")
    first = np.searchsorted(piece[order], np.arange(len(names)))
    count = np.bincount(piece)
    rank = (np.arange(_WITNESSES)[None] * count[:, None]) // _WITNESSES
    witness = order[(first[:, None] + rank).reshape(-1)]
    inside = turns_around(vertices[faces[witness, 0]], piece[witness], vertices, faces, piece)
    return (inside.reshape(len(names), _WITNESSES).mean(-1) > 0.5)[piece]


def _pieces(vertices: Points, faces: Faces) -> Int[np.ndarray, " face"]:
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    return trimesh.graph.connected_component_labels(edges, node_count=len(vertices))[faces[:, 0]]


def _has_crowded_edge(faces: Faces) -> bool:
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).astype(np.int64), axis=1)
    _, count = np.unique(edges[:, 0] * (int(faces.max()) + 1) + edges[:, 1], return_counts=True)
    return bool((count > 2).any())


def _welded(vertices: Points, faces: Faces) -> Changed:
    points, place = np.unique(vertices, axis=0, return_inverse=True)
    return points, place.reshape(-1)[faces]


def _solid(vertices: Points, faces: Faces) -> manifold3d.Manifold:
    mesh = manifold3d.Mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    mesh.merge()  # vertices in one place along open edges, as the cuts of a texture leave them
    return manifold3d.Manifold(mesh)


def _arrays(solid: manifold3d.Manifold) -> Changed:
    mesh = solid.to_mesh()
    return np.array(mesh.vert_properties[:, :3]), np.array(mesh.tri_verts).astype(np.int64)
