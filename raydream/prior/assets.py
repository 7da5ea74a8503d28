"""Load an asset from a file: glTF by our own reader, OBJ and PLY by trimesh; every failure is an AssetError."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals

from raydream.prior.asset import Asset, AssetError, turn_front
from raydream.prior.asset_formats import why_unsupported
from raydream.prior.asset_library import AssetRecord
from raydream.prior.asset_parts import IMAGE_FORMATS, Material, Part, build_asset, linear_from_srgb, reduce_image
from raydream.prior.gltf import load_gltf_parts
from raydream.prior.gltf_file import AssetLimits, read_limited, resolve_inside
from raydream.prior.procedural import PROCEDURAL, procedural_asset

DEFAULT_LIMITS = AssetLimits()


def load_asset(path: Path, uid: str | None = None, caption: str = "", limits: AssetLimits = DEFAULT_LIMITS) -> Asset:
    """Read one file into triangles in its own units, at rest pose; ``asset.warnings`` says what was left out.

    Raises AssetError with a stable ``reason``: missing_file, outside_folder, empty_file, lfs_pointer, too_large,
    truncated, malformed, malformed_json, unsupported_version, unsupported_extension, unsupported_format,
    draco_compression, meshopt_compression, bad_reference, node_cycle, non_finite, no_faces or degenerate.
    """
    suffix = path.suffix.lower()
    if suffix in (".glb", ".gltf"):
        parts, warning_words = load_gltf_parts(path, limits)
    elif suffix in (".obj", ".ply"):
        parts, warning_words = load_trimesh_parts(path, suffix[1:], limits)
    else:
        raise AssetError("unsupported_format", why_unsupported(path.suffix))
    return build_asset(path.stem if uid is None else uid, caption, parts, warning_words)


def load_record(record: AssetRecord, limits: AssetLimits = DEFAULT_LIMITS) -> Asset:
    """The asset of a record, from its file or of the project's own making, its front along +z where that is known.

    Raises as ``load_asset`` does.
    """
    caption = record.captions[0] if record.captions else ""
    if record.path.parts[:1] == (PROCEDURAL,):
        _, noun, variant = record.path.parts
        return replace(procedural_asset(noun, int(variant)), uid=record.uid)
    return turn_front(load_asset(record.path, record.uid, caption, limits), record.front_axis)


class _FolderResolver:
    """Gives trimesh the files that an OBJ or PLY names, from the asset's folder alone (its own would go anywhere)."""

    def __init__(self, folder: Path, limits: AssetLimits) -> None:
        self.folder, self.limits = folder, limits
        self.refused: AssetError | None = None

    def get(self, name: str) -> bytes:
        try:
            return read_limited(resolve_inside(self.folder, name.strip()), self.limits.max_bytes)
        except AssetError as error:
            if error.reason == "outside_folder":
                self.refused = error  # trimesh goes on without the file; we do not
            raise FileNotFoundError(str(error)) from error

    __getitem__ = get


def load_trimesh_parts(path: Path, file_type: str, limits: AssetLimits) -> tuple[list[Part], list[str]]:
    """The parts of an OBJ or PLY file, without its normals (faces are flat), and warnings."""
    if not read_limited(path, limits.max_bytes):
        raise AssetError("empty_file")
    resolver = _FolderResolver(path.parent, limits)
    try:
        with path.open("rb") as file:
            scene = trimesh.load_scene(file, file_type=file_type, resolver=resolver, process=False)  # type: ignore[arg-type]
        meshes = [mesh for mesh in scene.dump() if isinstance(mesh, trimesh.Trimesh)]
        if resolver.refused is not None:
            raise resolver.refused
        if sum(len(mesh.faces) for mesh in meshes) > limits.max_faces:
            raise AssetError("too_large", f"over {limits.max_faces} faces")
        parts = [_trimesh_part(mesh, limits) for mesh in meshes]
    except AssetError:
        raise
    except Exception as error:  # another library's parser on a stranger's file may raise anything
        raise AssetError("malformed", f"{type(error).__name__}: {error}"[:200]) from error
    lost = len(scene.geometry) > len(meshes)
    return parts, ["points_or_lines_skipped"] if lost else []


def _trimesh_part(mesh: trimesh.Trimesh, limits: AssetLimits) -> Part:
    positions = np.asarray(mesh.vertices, np.float64)
    triangles = np.asarray(mesh.faces, np.int64)
    if ((triangles < 0) | (triangles >= len(positions))).any():
        raise AssetError("bad_reference", "a face names a vertex that is not there")
    match mesh.visual:
        case TextureVisuals(uv=uv, material=material):
            # v grows upwards in these formats
            flipped = None if uv is None else np.asarray(uv, np.float64) * [1, -1] + [0, 1]
            return Part(positions, triangles, _trimesh_material(material, limits), uv=flipped)
        case ColorVisuals(kind="face") as visual:
            colors = np.repeat(np.asarray(visual.face_colors), 3, axis=0)
            corners = np.arange(3 * len(triangles)).reshape(-1, 3)
            return Part(positions[triangles].reshape(-1, 3), corners, Material(), colors=_linear_rgba(colors))
        case ColorVisuals(kind="vertex") as visual:
            return Part(positions, triangles, Material(), colors=_linear_rgba(np.asarray(visual.vertex_colors)))
        case _:
            return Part(positions, triangles, Material())


def _trimesh_material(material: object, limits: AssetLimits) -> Material:
    image = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
    diffuse = getattr(material, "diffuse", None)
    factor = np.ones(4) if diffuse is None else _linear_rgba(np.asarray(diffuse)[None])[0]
    if not isinstance(image, Image.Image) or image.format not in IMAGE_FORMATS:
        return Material(factor)
    if image.width * image.height > limits.max_texture_px:
        raise AssetError("too_large", f"a texture of {image.width} x {image.height}")
    return Material(np.ones(4), np.asarray(reduce_image(image, limits.texture_side_px)))


def _linear_rgba(colors: np.ndarray) -> np.ndarray:
    """Display-space bytes, RGB or RGBA, as linear RGBA; OBJ and PLY hold colours as they are shown."""
    values = np.asarray(colors, np.float64) / 255
    alpha = values[:, 3:] if values.shape[1] == 4 else np.ones((len(values), 1))
    return np.concatenate([linear_from_srgb(values[:, :3]), alpha], axis=1)
