"""Whether a mesh is fit for use: closed, in one piece, without slivers, its texture well used."""

from dataclasses import dataclass

import numpy as np
import torch
import trimesh

from raydream.assets.asset import Asset
from raydream.coordinates import tight_box
from raydream.types import Backend

_WELD = 1e-6  # of the longest side: UV seams split vertices, which leaves no hole
_UV_PX = 512


@dataclass(frozen=True)
class MeshChecks:
    """``watertight``: every edge belongs to exactly two faces. What stands in the way are ``boundary_edges`` (of an odd
    number of faces: a hole) and ``crossed_edges`` (of four or more: surfaces that touch). ``degenerate_faces`` have no
    area or, after welding, a corner twice. ``components`` share no vertex; the largest has ``largest_share`` of the
    area. ``uv_coverage`` is the share of the texture that faces lie on (None: no texture), ``size`` the extents in
    the file's units.
    """

    vertices: int
    faces: int
    watertight: bool
    boundary_edges: int
    crossed_edges: int
    components: int
    largest_share: float
    degenerate_faces: int
    uv_coverage: float | None
    size: tuple[float, float, float]
    file_bytes: int


def check_mesh(asset: Asset, file_bytes: int, backend: Backend) -> MeshChecks:
    """All checks of one mesh. Vertices nearer to each other than a millionth of its size count as one."""
    box = tight_box(asset.vertices.double())
    longest = float(box.extents.max())
    cells = np.round((asset.vertices.double() - box.minimum).cpu().numpy() / (longest * _WELD)).astype(np.int64)
    _, first, welded = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    points = asset.vertices.double().cpu().numpy()[first]
    faces = welded.reshape(-1)[asset.faces.cpu().numpy()]
    area = trimesh.triangles.area(points[faces])
    twice = (faces[:, 0] == faces[:, 1]) | (faces[:, 1] == faces[:, 2]) | (faces[:, 2] == faces[:, 0])
    degenerate = twice | (area <= 1e-14 * longest**2)
    solid = trimesh.Trimesh(points, faces[~degenerate], process=False)
    shared = np.bincount(solid.edges_unique_inverse)
    labels = trimesh.graph.connected_component_labels(solid.edges_unique, node_count=len(points))
    shares = np.bincount(labels[solid.faces[:, 0]], weights=solid.area_faces)
    return MeshChecks(
        len(points),
        len(faces),
        bool((shared == 2).all()),
        int((shared % 2 == 1).sum()),
        int(((shared % 2 == 0) & (shared > 2)).sum()),
        int((shares > 0).sum()),
        float(shares.max() / shares.sum()),
        int(degenerate.sum()),
        _uv_coverage(asset, backend),
        tuple(round(side, 6) for side in box.extents.tolist()),  # type: ignore[arg-type]
        file_bytes,
    )


def _uv_coverage(asset: Asset, backend: Backend) -> float | None:
    """Faces drawn flat into the unit square of the texture."""
    textured = asset.face_texture >= 0
    if not textured.any():
        return None
    uv = asset.corner_uv[textured].reshape(-1, 2)
    flat = torch.stack([uv[:, 0] * 2 - 1, uv[:, 1] * 2 - 1, torch.zeros(len(uv)), torch.ones(len(uv))], dim=-1)
    faces = torch.arange(len(uv)).view(-1, 3).to(asset.faces.dtype)
    drawn = backend.rasterize(flat[None].to(asset.vertices.dtype), faces, _UV_PX, _UV_PX)
    return float((drawn.face >= 0).float().mean())
