"""OBJ, PLY and STL files as parts: trimesh reads their shapes, we their materials and images."""

import io
import re

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals

from raydream.assets.error import AssetError
from raydream.assets.images import AssetSource
from raydream.assets.mtl import ObjMaterial, decoded, read_materials
from raydream.assets.parts import Material, Part, linear_from_srgb


class _StandIns:
    """What trimesh is given for the files that an OBJ or PLY names, which it would look for anywhere and read in fewer
    forms: names of materials, or one pixel, so that it keeps the texture coordinates.
    """

    def __init__(self, materials: dict[str, ObjMaterial]) -> None:
        self._materials = "".join(f"newmtl {name}\n" for name in materials).encode()
        self.asked: list[str] = []

    def get(self, name: str) -> bytes:
        self.asked.append(name)
        if self._materials:
            return self._materials
        pixel = io.BytesIO()
        Image.new("RGB", (1, 1)).save(pixel, "PNG")
        return pixel.getvalue()

    __getitem__ = get


def load_trimesh_parts(data: bytes, kind: str, source: AssetSource) -> list[Part]:
    """The parts of an "obj", "ply" or "stl" file, without its normals (faces are flat)."""
    materials: dict[str, ObjMaterial] = {}
    if kind == "obj":
        text = decoded(data)
        data = text.encode()
        materials = read_materials(text, source)
        if _has_vertex_colours(text) and not any(each.material.image is not None for each in materials.values()):
            materials = {}  # trimesh would take the plain material instead
    stand_ins = _StandIns(materials)
    try:
        scene = trimesh.load_scene(io.BytesIO(data), file_type=kind, resolver=stand_ins, process=False)  # type: ignore[arg-type]
        meshes = [mesh for mesh in scene.dump() if isinstance(mesh, trimesh.Trimesh)]
    except Exception as error:  # another library's parser on a stranger's file may raise anything
        raise AssetError("malformed", f"{type(error).__name__}: {error}"[:200]) from error
    if sum(len(mesh.faces) for mesh in meshes) > source.limits.max_faces:
        raise AssetError("too_large", f"over {source.limits.max_faces} faces")
    if kind == "ply" and stand_ins.asked:
        image = source.texture(stand_ins.asked[0])
        materials = {"": ObjMaterial(Material(image=image))}
        if len(re.findall(rb"^comment[ \t]+TextureFile", data, re.MULTILINE)) > 1:
            source.warn("texture_missing", "more than one TextureFile")
    if len(scene.geometry) > len(meshes):
        source.warn("points_or_lines_skipped")
    return [_part(mesh, materials) for mesh in meshes]


def _has_vertex_colours(obj: str) -> bool:
    """Whether the first vertex of an OBJ has three numbers more than a place."""
    first = re.search(r"^v[ \t]+(.*)$", obj, re.MULTILINE)
    return first is not None and len(first[1].split()) >= 6


def _part(mesh: trimesh.Trimesh, materials: dict[str, ObjMaterial]) -> Part:
    positions = np.asarray(mesh.vertices, np.float64)
    triangles = np.asarray(mesh.faces, np.int64)
    if ((triangles < 0) | (triangles >= len(positions))).any():
        raise AssetError("bad_reference", "a face names a vertex that is not there")
    match mesh.visual:
        case TextureVisuals(uv=uv, material=named):
            placed = materials.get(named.name) or materials.get("") or ObjMaterial()
            if uv is not None:  # v grows upwards in these formats
                uv = (np.asarray(uv, np.float64) * placed.scale + placed.offset) * [1, -1] + [0, 1]
            return Part(positions, triangles, placed.material, uv=uv)
        case ColorVisuals(kind="face") as visual:
            colors = np.repeat(np.asarray(visual.face_colors), 3, axis=0)
            corners = np.arange(3 * len(triangles)).reshape(-1, 3)
            return Part(positions[triangles].reshape(-1, 3), corners, Material(), colors=_linear_rgba(colors))
        case ColorVisuals(kind="vertex") as visual:
            return Part(positions, triangles, Material(), colors=_linear_rgba(np.asarray(visual.vertex_colors)))
        case _:
            return Part(positions, triangles, Material())


def _linear_rgba(colors: np.ndarray) -> np.ndarray:
    """Display-space bytes, RGB or RGBA, as linear RGBA; OBJ and PLY hold colours as they are shown."""
    values = np.asarray(colors, np.float64) / 255
    alpha = values[:, 3:] if values.shape[1] == 4 else np.ones((len(values), 1))
    return np.concatenate([linear_from_srgb(values[:, :3]), alpha], axis=1)
