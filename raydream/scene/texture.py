"""From a bare mesh to a textured one: cut and unfold its surface, then ask the scene for the colour of every texel."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import xatlas
from jaxtyping import Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F

from raydream.types import Mesh

CHUNK_SIZE = 16_384
GUTTER_PX = 4  # xatlas overshoots the size it is asked for by up to 1.4, and two charts reach for their texels
REACH_PX = 1.5
MANY_FACES, FACES_AT_ONCE = 16_384, 4_096  # a mesh of more than the first is unwrapped in parts of the second

ColorFunction = Callable[[Tensor, Tensor], Tensor]


def bake_texture(mesh: Mesh, color_fn: ColorFunction, texture_size_px: int = 512) -> Mesh:
    """The mesh with a square texture in place of vertex colours; its vertices are doubled along the cuts.

    ``color_fn`` maps points of the surface in the world, ``[sample, 3]``, and the outward unit normals there,
    ``[sample, 3]`` (on the CPU, at most 16,384 at once), to colours ``[sample, 3]`` on any device: sRGB in [0, 1], as
    rendered. ``uv`` is OpenGL's: (0, 0) is the lower left corner of the picture, whose first row is the top one. The
    gutter between the charts is filled by the nearest texel, so no seam shows.
    """
    vertices = mesh.vertices.detach().cpu().numpy().astype(np.float32)
    sources, faces, uv = _unwrap(vertices, mesh.faces.cpu().numpy(), texture_size_px)
    normals = vertex_normals(vertices, mesh.faces.cpu().numpy())
    values = np.concatenate([vertices, normals], axis=-1).astype(np.float32)[sources]
    texel, values = surface_points(values, faces, uv, texture_size_px)
    position, normal = torch.from_numpy(values).split(3, dim=-1)
    up = torch.tensor([0.0, 1.0, 0.0])  # where the normals of a fold cancel
    normal = F.normalize(torch.where(normal.norm(dim=-1, keepdim=True) > 1e-6, normal, up), dim=-1)
    colors = np.zeros((texture_size_px * texture_size_px, 3), dtype=np.float32)
    for start in range(0, len(texel), CHUNK_SIZE):
        chunk = slice(start, start + CHUNK_SIZE)
        with torch.no_grad():
            colors[texel[chunk]] = color_fn(position[chunk], normal[chunk]).float().cpu().numpy()
    return Mesh(
        vertices=torch.from_numpy(vertices[sources]),
        faces=torch.from_numpy(faces),
        uv=torch.from_numpy(uv),
        texture=torch.from_numpy(fill_gaps(colors, texel, texture_size_px)).clamp(0, 1),
    )


def fill_gaps(
    colors: Float[np.ndarray, "texels 3"], texel: Int[np.ndarray, " texel"], size_px: int
) -> Float[np.ndarray, "h w 3"]:
    """A texture that is known at some texels: the others take the nearest one's, so that no filter of a viewer, however
    small it shows the texture, mixes a background in.
    """
    empty = np.ones(len(colors), dtype=bool)
    empty[texel] = False
    side = (size_px, size_px)
    rows, columns = distance_transform_edt(empty.reshape(side), return_distances=False, return_indices=True)
    return colors.reshape(*side, 3)[rows, columns]


def vertex_normals(
    vertices: Float[np.ndarray, "vertex 3"], faces: Int[np.ndarray, "face 3"]
) -> Float[np.ndarray, "vertex 3"]:
    """Unit normals, averaged by area over all faces at a point, also those across a cut of the texture."""
    points, point = np.unique(vertices, axis=0, return_inverse=True)
    corner = point.reshape(-1)[faces]
    a, b, c = points.astype(np.float64)[corner].transpose(1, 0, 2)
    normals = np.zeros(points.shape)
    np.add.at(normals, corner, np.cross(b - a, c - a)[:, None])
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = np.where(length > 0, normals / np.where(length > 0, length, 1), (0.0, 1.0, 0.0))
    return normals[point.reshape(-1)]


def _unwrap(
    vertices: Float[np.ndarray, "vertex 3"], faces: Int[np.ndarray, "face 3"], texture_size_px: int
) -> tuple[Int[np.ndarray, " corner"], Int[np.ndarray, "face 3"], Float[np.ndarray, "corner 2"]]:
    """The source of each vertex of the cut mesh, its faces (in the old order) and its texture coordinates."""
    everything = np.arange(len(faces))
    parts = [everything] if len(faces) <= MANY_FACES else _parts(vertices[faces].mean(1), everything)
    used = [np.unique(faces[part], return_inverse=True) for part in parts]
    atlas = xatlas.Atlas()
    for vertex, renumbered in used:
        atlas.add_mesh(vertices[vertex], renumbered.reshape(-1, 3).astype(np.uint32))
    packing = xatlas.PackOptions()
    packing.resolution = texture_size_px
    packing.padding = GUTTER_PX
    packing.bilinear = True
    atlas.generate(pack_options=packing)
    sources, cut_faces, uvs, num_corners = [], np.empty_like(faces), [], 0
    for index, (part, (vertex, _)) in enumerate(zip(parts, used)):
        source, cut, uv = atlas[index]
        sources.append(vertex[source.astype(np.int64)])
        cut_faces[part] = cut.astype(np.int64) + num_corners
        uvs.append(uv)
        num_corners += len(uv)
    return np.concatenate(sources), cut_faces, np.concatenate(uvs)


def _parts(
    middle: Float[np.ndarray, "face 3"], faces: Int[np.ndarray, " part"]
) -> list[Int[np.ndarray, " smaller_part"]]:
    """Halves of halves across the longest side: xatlas takes long for large meshes, and ends its process for some (a
    fault of memory at a sphere of 81,920 faces, which it unwraps in parts in less time than one of 20,480 whole).
    """
    if len(faces) <= FACES_AT_ONCE:
        return [faces]
    side = np.ptp(middle[faces], axis=0).argmax()
    order = faces[np.argsort(middle[faces, side], kind="stable")]
    half = len(order) // 2
    return _parts(middle, order[:half]) + _parts(middle, order[half:])


def surface_points(
    values: Float[np.ndarray, "corner channel"],
    faces: Int[np.ndarray, "face 3"],
    uv: Float[np.ndarray, "corner 2"],
    size_px: int,
) -> tuple[Int[np.ndarray, " texel"], Float[np.ndarray, "texel channel"]]:
    """The texels that a viewer may mix into a chart, as flat indices, and ``values`` at the point that each one shows.

    These are the texels whose centre a face covers and, for the bilinear filter, those that it misses by at most
    ``REACH_PX``; they show the closest point of the closest face.
    """
    corners = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=-1)[faces].astype(np.float64) * size_px - 0.5
    texels, distances, points = [], [], []
    for face, column, row in _candidates(corners, size_px):
        share, distance = _closest_in_triangle(np.stack([column, row], axis=-1).astype(np.float64), corners[face])
        near = distance <= REACH_PX
        texels.append((row * size_px + column)[near])
        distances.append(distance[near])
        points.append((share[near, :, None] * values[faces[face[near]]]).sum(1).astype(np.float32))
    texel, distance = np.concatenate(texels), np.concatenate(distances)
    order = np.argsort(distance, kind="stable")
    texel, first = np.unique(texel[order], return_index=True)
    return texel, np.concatenate(points)[order[first]]


def _candidates(
    corners: Float[np.ndarray, "face 3 2"], size_px: int
) -> Iterator[tuple[Int[np.ndarray, " texel"], Int[np.ndarray, " texel"], Int[np.ndarray, " texel"]]]:
    """(face, column, row) of every texel in or near the bounding box of every face, about a million at a time."""
    first = np.ceil(corners.min(1) - REACH_PX).astype(np.int64).clip(0)
    last = np.floor(corners.max(1) + REACH_PX).astype(np.int64).clip(max=size_px - 1)
    width, height = (last - first + 1).clip(0).T
    area = width * height
    batch = np.cumsum(area) // 1_000_000
    for face in np.split(np.arange(len(corners)), np.flatnonzero(np.diff(batch)) + 1):
        owner = np.repeat(face, area[face])
        rank = np.arange(len(owner)) - np.repeat(np.cumsum(area[face]) - area[face], area[face])
        yield owner, first[owner, 0] + rank % width[owner], first[owner, 1] + rank // width[owner]


def _closest_in_triangle(
    point: Float[np.ndarray, "texel 2"], corners: Float[np.ndarray, "texel 3 2"]
) -> tuple[Float[np.ndarray, "texel 3"], Float[np.ndarray, " texel"]]:
    """Barycentric coordinates of the triangle's closest point to each given one, and the distance (0 inside)."""
    following = np.roll(corners, -1, axis=1)
    edge, offset = following - corners, point[:, None] - corners
    along = (edge * offset).sum(-1) / np.maximum((edge * edge).sum(-1), 1e-12)
    along = along.clip(0, 1)
    gap = np.linalg.norm(offset - along[..., None] * edge, axis=-1)
    rows, closest = np.arange(len(point)), gap.argmin(-1)
    share = np.zeros((len(point), 3))
    share[rows, closest] = 1 - along[rows, closest]
    share[rows, (closest + 1) % 3] = along[rows, closest]
    # Twice the area between the point and each edge: the weight of the corner across from it.
    area = edge[..., 0] * offset[..., 1] - edge[..., 1] * offset[..., 0]
    total = area.sum(-1, keepdims=True)
    inside = ((area * total >= 0).all(-1)) & (np.abs(total[:, 0]) > 1e-12)
    share[inside] = np.roll(area, 2, axis=1)[inside] / total[inside]
    return share, np.where(inside, 0.0, gap.min(-1))
