"""The bytes of a glTF 2.0 file: container, JSON, buffers, accessors and images, each checked before it is trusted.

Files come from strangers: every index, length and name in one may be a lie. Nothing outside the asset's own folder is
ever opened, and nothing is allocated before its size is known to be within the limits.
"""

import base64
import binascii
import json
import struct
from dataclasses import dataclass, field
from typing import TypeGuard
from urllib.parse import unquote

import numpy as np

from raydream.assets.error import AssetError
from raydream.assets.files import read_named
from raydream.assets.images import AssetSource

GLB_MAGIC, CHUNK_JSON, CHUNK_BIN = b"glTF", 0x4E4F534A, 0x004E4942
COMPONENT_DTYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
COMPONENT_COUNTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
# What a file may require of us: what we read, or what changes neither shape nor base colour.
HARMLESS_EXTENSIONS = frozenset(
    """
    KHR_mesh_quantization KHR_texture_transform KHR_texture_basisu EXT_texture_webp EXT_texture_avif MSFT_texture_dds
    EXT_mesh_gpu_instancing
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


def read_uri(source: AssetSource, uri: str) -> bytes:
    """The bytes behind a glTF URI: a data URI or a file in the asset's folder."""
    if not uri.startswith("data:"):
        return source.folder.read(uri, source.limits.max_bytes)
    header, _, payload = uri.partition(",")
    if not header.endswith(";base64"):
        return unquote(payload).encode("latin-1")
    try:
        return base64.b64decode(payload)
    except binascii.Error as error:
        raise AssetError("malformed", f"data URI: {error}") from error


@dataclass
class GltfFile:
    """A parsed glTF file."""

    source: AssetSource
    root: dict
    binary: bytes | None
    _buffers: dict[int, bytes] = field(default_factory=dict)

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
        if not is_count(count) or count > 3 * self.source.limits.max_faces + self.source.limits.max_vertices:
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
        uri = image.get("uri")
        if not isinstance(uri, str):
            raise AssetError("bad_reference", f"images[{index!r}] has neither a bufferView nor a uri")
        if uri.startswith("data:"):
            return read_uri(self.source, uri)
        return read_named(self.source.folder, uri, self.source.limits.max_bytes)

    def image_name(self, index: object) -> str:
        """What a person may find an image by: its file, its name in the file, or its number."""
        image = self.item("images", index)
        uri = image.get("uri")
        name = uri if isinstance(uri, str) and not uri.startswith("data:") else image.get("name")
        return name if isinstance(name, str) and name else f"images[{index}]"

    def _buffer(self, index: object) -> bytes:
        buffer = self.item("buffers", index)
        assert is_count(index)
        if index not in self._buffers:
            data = read_uri(self.source, buffer["uri"]) if "uri" in buffer else self.binary
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


def read_gltf(data: bytes, source: AssetSource) -> GltfFile:
    """A .glb or .gltf file (told apart by content); AssetError where it is broken or asks for what we lack."""
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
    file = GltfFile(source, root, binary)
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
