"""Load an asset from a file of any kind that is read; every failure is an AssetError."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from raydream.assets.asset import Asset, turn_front
from raydream.assets.error import AssetError
from raydream.assets.files import AssetLimits, DiskFolder, choose_model, open_archive, read_limited, why_unsupported
from raydream.assets.gltf import load_gltf_parts
from raydream.assets.images import AssetSource
from raydream.assets.libraries import AssetRecord
from raydream.assets.parts import Part, build_asset
from raydream.assets.procedural import PROCEDURAL, procedural_asset
from raydream.assets.trimesh_parts import load_trimesh_parts

DEFAULT_LIMITS = AssetLimits()
NO_USD = "USDZ needs usd-core: pip install 'raydream[usd]'; or convert it to GLB with Blender"


def load_asset(path: Path, uid: str | None = None, caption: str = "", limits: AssetLimits = DEFAULT_LIMITS) -> Asset:
    """Read one file into triangles in its own units, at rest pose; ``asset.warnings`` says what was left out.

    Raises AssetError with a stable ``reason``: missing_file, outside_folder, empty_file, lfs_pointer, too_large,
    truncated, malformed, malformed_json, unsupported_version, unsupported_extension, unsupported_format,
    draco_compression, meshopt_compression, bad_reference, node_cycle, non_finite, no_faces or degenerate.
    """
    data = read_limited(path, limits.max_bytes)
    source = AssetSource(DiskFolder(path.parent), limits)
    parts = _parts(data, path.suffix.lower(), source)
    return build_asset(path.stem if uid is None else uid, caption, parts, list(source.warnings))


def load_record(record: AssetRecord, limits: AssetLimits = DEFAULT_LIMITS) -> Asset:
    """The asset of a record, from its file or of the project's own making, its front along +z where that is known.

    Raises as ``load_asset`` does.
    """
    caption = record.captions[0] if record.captions else ""
    if record.path.parts[:1] == (PROCEDURAL,):
        _, noun, variant = record.path.parts
        return replace(procedural_asset(noun, int(variant)), uid=record.uid)
    return turn_front(load_asset(record.path, record.uid, caption, limits), record.front_axis)


def _parts(data: bytes, suffix: str, source: AssetSource) -> list[Part]:
    """The parts of a file of any kind."""
    max_bytes = source.limits.max_bytes
    if not data:
        raise AssetError("empty_file")
    if data.startswith(b"version https://git-lfs"):
        raise AssetError("lfs_pointer")
    match suffix:
        case ".glb" | ".gltf":
            return load_gltf_parts(data, source)
        case ".obj" | ".ply" | ".stl":
            return load_trimesh_parts(data, suffix[1:], source)
        case ".zip":
            archive, name, others = choose_model(open_archive(data, max_bytes))
            model = archive.read(name, max_bytes)
            parts = _parts(model, PurePosixPath(name).suffix.lower(), source.inside(archive))
            for other in others:
                source.warn("other_model_in_the_archive", other)
            return parts
        case ".usdz":
            if find_spec("pxr") is None:
                raise AssetError("unsupported_format", NO_USD)
            from raydream.assets.usdz import load_usdz_parts

            return load_usdz_parts(data, source)
        case _:
            raise AssetError("unsupported_format", why_unsupported(suffix))
