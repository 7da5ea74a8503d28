"""USDZ files as parts: the meshes of their stage at its first moment. Needs usd-core (``pip install 'raydream[usd]'``).

USD files may name others anywhere, which its library opens by itself. So only a package of one layer is read, as an
anonymous layer that names no other; images come from the package, by our own reader.
"""

import os
import posixpath
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from pxr import Sdf, Usd, UsdGeom, UsdShade

from raydream.assets.error import AssetError
from raydream.assets.files import open_archive
from raydream.assets.images import AssetSource
from raydream.assets.parts import Part
from raydream.assets.usd_materials import UsdMaterial, UsdMaterials

_SUFFIXES = (".usd", ".usda", ".usdc")
# What USD raises of a file that lies; its own errors are RuntimeErrors.
_MALFORMED = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


class _Corners:
    """Some corners of a mesh's faces, as indices into all of its corners, and what the mesh tells there."""

    def __init__(
        self, prim: Usd.Prim, corners: np.ndarray, faces: np.ndarray, indices: np.ndarray, source: AssetSource
    ) -> None:
        self._prim, self._source = prim, source
        self._places = {
            "constant": np.zeros_like(corners),
            "uniform": faces,
            "varying": indices[corners],
            "vertex": indices[corners],
            "faceVarying": corners,
        }

    def read(self, name: str, width: int, absent: str) -> np.ndarray | None:
        """``[corner, width]``; None, with a warning, where it does not fit or, if ``absent`` is one, is not there."""
        primvar = UsdGeom.PrimvarsAPI(self._prim).FindPrimvarWithInheritance(name)
        if not primvar or not primvar.HasValue():
            if absent:
                self._source.warn(absent, f"{name} of {self._prim.GetPath()}")
            return None
        values = np.array(primvar.ComputeFlattened(Usd.TimeCode.EarliestTime()), np.float64)
        place = self._places[str(primvar.GetInterpolation())]
        if values.ndim != 2 or values.shape[1] != width or len(values) <= place.max():
            self._source.warn(
                "texcoord_ignored" if width == 2 else "color_ignored", f"{name} of {self._prim.GetPath()}"
            )
            return None
        return values[place]


def load_usdz_parts(data: bytes, source: AssetSource) -> list[Part]:
    """The parts of a USDZ file, y up, without its normals (faces are flat)."""
    package = open_archive(data, source.limits.max_bytes)
    root = next(iter(package.members), "")
    if posixpath.splitext(root)[1].lower() not in _SUFFIXES:
        raise AssetError("malformed", "its first file is no USD layer")
    source = source.inside(replace(package, home=posixpath.dirname(root)))
    try:
        with os.fdopen(os.memfd_create("layer"), "wb") as file:  # USD reads files only, and this one ends with us
            file.write(source.folder.read(posixpath.basename(root), source.limits.max_bytes))
            file.flush()
            layer = _lone_layer(f"/proc/self/fd/{file.fileno()}", posixpath.splitext(root)[1].lower())
            return list(_parts(layer, source))
    except _MALFORMED as error:
        words = " ".join(str(error).split()).rpartition(" : ")[2]  # the part before tells of USD's own source
        raise AssetError("malformed", f"{type(error).__name__}: {words}"[:200]) from error


def _lone_layer(path: str, suffix: str) -> Sdf.Layer:
    """A layer without a place of its own, from which no relative name leads anywhere, and that names no other."""
    layer = Sdf.Layer.CreateAnonymous(f"layer{suffix}")
    if not layer.Import(path):
        raise AssetError("malformed", "its layer cannot be read")
    others: list[str] = list(layer.GetCompositionAssetDependencies())

    def look(spec_path: Sdf.Path) -> None:
        spec = layer.GetObjectAtPath(spec_path)
        if spec is not None and spec.HasInfo("clips"):
            others.append(f"clips of {spec_path}")

    layer.Traverse(Sdf.Path.absoluteRootPath, look)
    if others:
        detail = f"it is put together of several layers ({others[0][:80]}); usdcat --flatten makes one of them"
        raise AssetError("unsupported_format", detail)
    return layer


def _parts(layer: Sdf.Layer, source: AssetSource) -> Iterator[Part]:
    limits, materials = source.limits, UsdMaterials(source)
    stage = Usd.Stage.Open(layer)
    time = Usd.TimeCode.EarliestTime()
    places = UsdGeom.XformCache(time)
    upright = np.eye(3)
    if UsdGeom.GetStageUpAxis(stage) == UsdGeom.Tokens.z:
        upright = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    num_prims = num_faces = 0
    prims = iter(Usd.PrimRange(stage.GetPseudoRoot(), Usd.TraverseInstanceProxies()))
    for prim in prims:
        num_prims += 1
        if num_prims > limits.max_nodes:
            raise AssetError("too_large", f"over {limits.max_nodes} prims")
        if prim.IsA(UsdGeom.PointInstancer):
            source.warn("instances_skipped", str(prim.GetPath()))
            prims.PruneChildren()
        elif prim.IsA(UsdGeom.Gprim) and _is_drawn(prim, time):
            if not prim.IsA(UsdGeom.Mesh):
                source.warn("shape_skipped", f"{prim.GetTypeName()} {prim.GetPath()}")
                continue
            world = np.array(places.GetLocalToWorldTransform(prim))[:, :3] @ upright.T  # for points as rows
            for part in _mesh_parts(prim, world, materials, source, limits.max_faces - num_faces):
                num_faces += len(part.triangles)
                yield part


def _is_drawn(prim: Usd.Prim, time: Usd.TimeCode) -> bool:
    shown = UsdGeom.Imageable(prim)
    hidden = shown.ComputeVisibility(time) == UsdGeom.Tokens.invisible
    return not hidden and shown.ComputePurpose() not in (UsdGeom.Tokens.guide, UsdGeom.Tokens.proxy)


def _mesh_parts(
    prim: Usd.Prim, world: np.ndarray, materials: UsdMaterials, source: AssetSource, max_faces: int
) -> Iterator[Part]:
    """A mesh by its materials: one for some of its faces, one for the rest."""
    mesh, time = UsdGeom.Mesh(prim), Usd.TimeCode.EarliestTime()
    attributes = (mesh.GetPointsAttr(), mesh.GetFaceVertexCountsAttr(), mesh.GetFaceVertexIndicesAttr())
    values = (attribute.Get(time) for attribute in attributes)
    points, counts, indices = (np.array([] if value is None else value) for value in values)
    if not len(points) or not len(counts):
        return
    if prim.HasAttribute("primvars:skel:jointIndices"):
        source.warn("skin_ignored", str(prim.GetPath()))
    points = points.astype(np.float64)
    if counts.min() < 0 or counts.sum() != len(indices):
        raise AssetError("malformed", f"the faces of {str(prim.GetPath())[:100]} do not add up")
    if len(indices) and (indices.min() < 0 or indices.max() >= len(points)):
        raise AssetError("bad_reference", "a face names a point that is not there")
    if np.maximum(counts - 2, 0).sum() > max_faces:
        raise AssetError("too_large", "too many faces")
    face_of, corners = _fans(counts)
    flipped = mesh.GetOrientationAttr().Get() == UsdGeom.Tokens.leftHanded
    if flipped != (np.linalg.det(world[:3]) < 0):
        corners = corners[:, [0, 2, 1]]
    owner = np.zeros(len(counts), np.int64)
    painted = [materials.of(prim)]
    for subset in UsdShade.MaterialBindingAPI(prim).GetMaterialBindSubsets():
        faces = np.array(subset.GetIndicesAttr().Get(time) or [], np.int64)
        owner[faces[(faces >= 0) & (faces < len(counts))]] = len(painted)
        painted.append(materials.of(subset.GetPrim()))
    for number, material in enumerate(painted):
        chosen = owner[face_of] == number
        if chosen.any():
            flat = corners[chosen].reshape(-1)
            corner_values = _Corners(prim, flat, face_of[chosen].repeat(3), indices, source)
            yield _painted(points[indices[flat]] @ world[:3] + world[3], corner_values, material)


def _painted(positions: np.ndarray, values: _Corners, paint: UsdMaterial) -> Part:
    triangles = np.arange(len(positions)).reshape(-1, 3)
    uv = colors = None
    if paint.coordinates:
        uv = values.read(paint.coordinates, 2, "texture_coordinates_missing")
    if uv is not None:
        uv = (uv @ paint.turn[:, :2].T + paint.turn[:, 2]) * [1, -1] + [0, 1]  # v grows upwards in USD
    if paint.colours:
        rgb = values.read(paint.colours, 3, "")
        colors = None if rgb is None else np.concatenate([rgb, np.ones((len(rgb), 1))], axis=1)
    return Part(positions, triangles, paint.material, uv=uv, colors=colors)


def _fans(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Polygons as triangles: the face of each, and its three places in the list of corners."""
    per_face = np.maximum(counts - 2, 0)
    first = np.cumsum(counts) - counts
    face = np.repeat(np.arange(len(counts)), per_face)
    step = np.arange(len(face)) - np.repeat(np.cumsum(per_face) - per_face, per_face)
    return face, first[face][:, None] + np.stack([np.zeros_like(step), step + 1, step + 2], axis=1)
