"""The bytes of a glTF 2.0 file: container, JSON, buffers, accessors and images, each checked before it is trusted.

Files come from strangers: every index, length and name in one may be a lie. Nothing outside the asset's own folder is
ever opened, and nothing is allocated before its size is known to be within the limits.
"""

import base64
import binascii
import json
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard
from urllib.parse import unquote

import numpy as np

from raydream.prior.asset import AssetError
from raydream.storage_faults import is_passing

GLB_MAGIC, CHUNK_JSON, CHUNK_BIN = b"glTF", 0x4E4F534A, 0x004E4942
COMPONENT_DTYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
COMPONENT_COUNTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
# What a file may require of us: what we read, or what changes neither shape nor base colour.
HARMLESS_EXTENSIONS = frozenset(
    """
    KHR_mesh_quantization KHR_texture_transform KHR_texture_basisu EXT_texture_webp EXT_mesh_gpu_instancing
    KHR_lights_punctual KHR_animation_pointer KHR_xmp_json_ld
    KHR_materials_anisotropy KHR_materials_clearcoat KHR_materials_diffuse_transmission KHR_materials_dispersion
    KHR_materials_emissive_strength KHR_materials_ior KHR_materials_iridescence KHR_materials_pbrSpecularGlossiness
    KHR_materials_sheen KHR_materials_specular KHR_materials_transmission KHR_materials_unlit KHR_materials_variants
    KHR_materials_volume
    """.split()  # noqa: SIM905
)
REFUSED_EXTENSIONS = {
    "KHR_draco_mesh_compression": "draco_compression",
    "EXT_meshopt_compression": "meshopt_compression",
    "KHR_meshopt_compression": "meshopt_compression",
}


@dataclass(frozen=True)
class AssetLimits:
    """What one asset may cost; more than this and it is refused with ``too_large`` before memory is spent on it."""

    max_bytes: int = 512 * 2**20
    max_faces: int = 2_000_000
    max_vertices: int = 6_000_000
    max_nodes: int = 100_000
    max_texture_px: int = 2**26
    texture_side_px: int = 1024  # larger images are reduced to this, not refused


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file; AssetError ``missing_file`` or ``too_large``. Never blocks on a pipe or device.

    OSError where its disk is away, which says nothing of the file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if is_passing(error):
            raise
        raise AssetError("missing_file", str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise AssetError("missing_file", f"{path.name} is not a regular file")
    if status.st_size > max_bytes:
        raise AssetError("too_large", f"{path.name} has {status.st_size} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        if is_passing(error):
            raise
        raise AssetError("missing_file", str(error)) from error


def resolve_inside(folder: Path, name: str) -> Path:
    """Where a file named by an asset lies; AssetError ``outside_folder`` unless that is truly below ``folder``.

    ``name`` is a relative URI, percent-encoded or not. Links are followed before the check.
    """
    for candidate in (unquote(name), name):
        if re.match(r"[A-Za-z][\w+.-]*:", candidate) or "\0" in candidate:
            raise AssetError("outside_folder", name[:200])
        try:
            path = (folder / candidate.replace("\\", "/")).resolve()
            exists = path.exists()
        except (OSError, RuntimeError) as error:  # a name too long, a loop of links
            if is_passing(error):
                raise
            raise AssetError("missing_file", str(error)[:200]) from error
        if not path.is_relative_to(folder.resolve()):
            raise AssetError("outside_folder", name[:200])
        if exists:
            return path
    raise AssetError("missing_file", name[:200])


def read_uri(folder: Path, uri: str, max_bytes: int) -> bytes:
    """The bytes behind a glTF URI: a data URI or a file in the asset's folder."""
    if not uri.startswith("data:"):
        return read_limited(resolve_inside(folder, uri), max_bytes)
    header, _, payload = uri.partition(",")
    if not header.endswith(";base64"):
        return unquote(payload).encode("latin-1")
    try:
        return base64.b64decode(payload)
    except binascii.Error as error:
        raise AssetError("malformed", f"data URI: {error}") from error


@dataclass
class GltfFile:
    """A parsed glTF file. ``warnings`` collects what was left out, in stable words, once each."""

    folder: Path
    root: dict
    binary: bytes | None
    limits: AssetLimits
    warnings: dict[str, None] = field(default_factory=dict)
    _buffers: dict[int, bytes] = field(default_factory=dict)

    def warn(self, word: str) -> None:
        self.warnings[word] = None

    def items(self, kind: str) -> list:
        """One of the file's top-level arrays, empty where there is none."""
        items = self.root.get(kind, [])
        if not isinstance(items, list):
            raise AssetError("malformed", f"{kind} is not an array")
        return items

    def item(self, kind: str, index: object) -> dict:
        """An element of a top-level array; AssetError ``bad_reference`` where the index leads nowhere."""
        items = self.items(kind)
        if not is_count(index) or index >= len(items):
            raise AssetError("bad_reference", f"{kind}[{index!r}]")
        if not isinstance(items[index], dict):
            raise AssetError("malformed", f"{kind}[{index}] is not an object")
        return items[index]

    def buffer_view(self, index: object) -> tuple[memoryview, int]:
        """The bytes of a buffer view and its stride (0 where it is packed)."""
        view = self.item("bufferViews", index)
        start, length, stride = view.get("byteOffset", 0), view["byteLength"], view.get("byteStride", 0)
        if not (is_count(start) and is_count(length) and is_count(stride)):
            raise AssetError("malformed", f"bufferViews[{index}]")
        buffer = self._buffer(view["buffer"])
        if start + length > len(buffer):
            raise AssetError("truncated", f"bufferViews[{index}] ends past its buffer of {len(buffer)} bytes")
        return memoryview(buffer)[start : start + length], stride

    def accessor(self, index: object) -> np.ndarray:
        """An accessor's values, ``[count, component]``: integers as stored, normalised ones and floats as float64."""
        spec = self.item("accessors", index)
        dtype, width = np.dtype(COMPONENT_DTYPES[spec["componentType"]]), COMPONENT_COUNTS[spec["type"]]
        count = spec["count"]
        if not is_count(count) or count > 3 * self.limits.max_faces + self.limits.max_vertices:
            raise AssetError("too_large" if is_count(count) else "malformed", f"accessors[{index}] count {count}")
        if "bufferView" in spec:
            values = self._strided(spec["bufferView"], spec.get("byteOffset", 0), dtype, count, width)
        else:
            values = np.zeros((count, width), dtype)
        if "sparse" in spec:
            values = self._sparse(values, spec["sparse"])
        if spec.get("normalized") and dtype.kind in "iu":
            return np.maximum(values / np.iinfo(dtype).max, -1.0)
        return values.astype(np.float64) if dtype.kind == "f" else values

    def image_bytes(self, index: object) -> bytes:
        """An image as it is stored (PNG, JPEG, ...)."""
        image = self.item("images", index)
        if "bufferView" in image:
            return bytes(self.buffer_view(image["bufferView"])[0])
        return read_uri(self.folder, image["uri"], self.limits.max_bytes)

    def _buffer(self, index: object) -> bytes:
        buffer = self.item("buffers", index)
        assert is_count(index)
        if index not in self._buffers:
            data = read_uri(self.folder, buffer["uri"], self.limits.max_bytes) if "uri" in buffer else self.binary
            if data is None or len(data) < buffer["byteLength"]:
                raise AssetError("truncated", f"buffers[{index}] should have {buffer['byteLength']} bytes")
            self._buffers[index] = data
        return self._buffers[index]

    def _strided(self, view: object, offset: object, dtype: np.dtype, count: int, width: int) -> np.ndarray:
        data, stride = self.buffer_view(view)
        stride = stride or dtype.itemsize * width
        if not is_count(offset) or (count and offset + stride * (count - 1) + dtype.itemsize * width > len(data)):
            raise AssetError("truncated", "an accessor ends past its bufferView")
        if not count:
            return np.zeros((0, width), dtype)
        return np.ndarray((count, width), dtype, data, offset, (stride, dtype.itemsize)).copy()

    def _sparse(self, values: np.ndarray, sparse: dict) -> np.ndarray:
        count, indices, replacement = sparse["count"], sparse["indices"], sparse["values"]
        if not is_count(count) or count > len(values):
            raise AssetError("malformed", "sparse accessor count")
        index_dtype = np.dtype(COMPONENT_DTYPES[indices["componentType"]])
        where = self._strided(indices["bufferView"], indices.get("byteOffset", 0), index_dtype, count, 1)[:, 0]
        if index_dtype.kind != "u" or (where >= len(values)).any():
            raise AssetError("bad_reference", "sparse accessor index")
        values[where] = self._strided(
            replacement["bufferView"], replacement.get("byteOffset", 0), values.dtype, count, values.shape[1]
        )
        return values


def is_count(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a non-negative integer (true and 1.0 are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_gltf(path: Path, limits: AssetLimits) -> GltfFile:
    """Open a .glb or .gltf file (told apart by content); AssetError where it is broken or asks for what we lack."""
    data = read_limited(path, limits.max_bytes)
    if not data:
        raise AssetError("empty_file")
    if data.startswith(b"version https://git-lfs"):
        raise AssetError("lfs_pointer")
    text, binary = split_glb(data) if data.startswith(GLB_MAGIC) else (data, None)
    try:
        root = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AssetError("malformed_json", str(error)[:200]) from error
    if not isinstance(root, dict) or not isinstance(root.get("asset", {}), dict):
        raise AssetError("malformed", "the root is not an object")
    version = str(root.get("asset", {}).get("version", "1.0"))
    if not version.startswith("2."):
        raise AssetError("unsupported_version", f"glTF {version[:20]}")
    file = GltfFile(path.parent, root, binary, limits)
    for extension in file.items("extensionsRequired"):
        if extension not in HARMLESS_EXTENSIONS:
            raise AssetError(REFUSED_EXTENSIONS.get(extension, "unsupported_extension"), str(extension)[:100])
    return file


def split_glb(data: bytes) -> tuple[bytes, bytes | None]:
    """The JSON and BIN chunks of a GLB container."""
    if len(data) < 20:
        raise AssetError("truncated", "no room for a GLB header")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise AssetError("unsupported_version", f"GLB {version}")
    if length != len(data):
        raise AssetError("truncated", f"header says {length} bytes, file has {len(data)}")
    chunks: dict[int, bytes] = {}
    offset = 12
    while offset + 8 <= length:
        chunk_length, chunk_type = struct.unpack_from("<II", data, offset)
        if offset + 8 + chunk_length > length:
            raise AssetError("truncated", "a GLB chunk ends past the file")
        chunks.setdefault(chunk_type, data[offset + 8 : offset + 8 + chunk_length])
        offset += 8 + chunk_length
    if CHUNK_JSON not in chunks:
        raise AssetError("malformed", "GLB without a JSON chunk")
    return chunks[CHUNK_JSON], chunks.get(CHUNK_BIN)
