"""Whether a mesh is fit for use: closed, in one piece, not through itself, without slivers, its texture well used."""

from dataclasses import dataclass

import numpy as np
import trimesh
from jaxtyping import Float, Int

from raydream.assets.asset import Asset
from raydream.coordinates import tight_box
from raydream.scene.crossings import crossing_faces, turns_around
from raydream.scene.uv_checks import UvChecks, check_uv
from raydream.types import Backend

_WELD = 1e-6  # of the longest side: UV seams split vertices, which leaves no hole
_MAX_PLACES = 2048
_MAX_VIEWS = 200_000_000  # of a face from a place: some seconds


@dataclass(frozen=True)
class MeshChecks:
    """``watertight``: every edge belongs to exactly two faces. What stands in the way are ``boundary_edges`` (of an odd
    number of faces: a hole) and ``crossed_edges`` (of four or more: surfaces that touch); ``non_manifold_edges`` belong
    to three or more. ``crossing_faces`` go through another one (``crossings.py`` has the limits).

    ``degenerate_faces`` have no area or, after welding, a corner twice. ``components`` share no vertex; the largest has
    ``largest_share`` of the area, and ``inner_share`` of it lies inside another component, where nobody sees it (at
    2,048 places at most; what one component hides of itself is not counted). ``uv`` is None where there is no texture,
    ``size`` the extents in the file's units.
    """

    vertices: int
    faces: int
    watertight: bool
    boundary_edges: int
    crossed_edges: int
    non_manifold_edges: int
    crossing_faces: int
    components: int
    largest_share: float
    inner_share: float
    degenerate_faces: int
    uv: UvChecks | None
    size: tuple[float, float, float]
    file_bytes: int

    def figures(self) -> dict[str, float | int | str]:
        """What the report of a run says of a particle's mesh."""
        found: dict[str, float | int | str] = {
            "watertight": "yes" if self.watertight else f"no: {self.boundary_edges} open edges",
            "components": self.components,
            "non-manifold edges": self.non_manifold_edges,
            "faces through others": self.crossing_faces,
            "hidden inside": f"{self.inner_share:.1%} of the area",
        }
        return found if self.uv is None else found | self.uv.figures()


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
    _, piece = np.unique(labels[solid.faces[:, 0]], return_inverse=True)
    return MeshChecks(
        len(points),
        len(faces),
        bool((shared == 2).all()),
        int((shared % 2 == 1).sum()),
        int(((shared % 2 == 0) & (shared > 2)).sum()),
        int((shared > 2).sum()),
        int(crossing_faces(points, solid.faces).sum()),
        int((shares > 0).sum()),
        float(shares.max() / shares.sum()),
        _inner_share(points, np.asarray(solid.faces), np.asarray(solid.area_faces), piece),
        int(degenerate.sum()),
        check_uv(asset, backend),
        tuple(round(side, 6) for side in box.extents.tolist()),  # type: ignore[arg-type]
        file_bytes,
    )


def _inner_share(
    points: Float[np.ndarray, "vertex 3"],
    faces: Int[np.ndarray, "face 3"],
    area: Float[np.ndarray, " face"],
    piece: Int[np.ndarray, " face"],
) -> float:
    """By the middles of faces, as many of each size as there is area of it."""
    if piece.max(initial=0) == 0:
        return 0.0
    num_places = max(1, min(_MAX_PLACES, _MAX_VIEWS // len(faces)))
    until = np.cumsum(area)
    chosen = np.searchsorted(until, (np.arange(num_places) + 0.5) / num_places * until[-1])
    inside = turns_around(points[faces[chosen]].mean(1), piece[chosen], points, faces, piece)
    return float(inside.mean())
