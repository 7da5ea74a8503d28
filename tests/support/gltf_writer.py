"""Writes small glTF files for tests, byte by byte, so that nothing in them comes from the reader under test."""

import base64
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydream.assets.asset import AssetError
from raydream.assets.files import AssetLimits
from raydream.assets.load import load_asset

COMPONENT_TYPES = {"int8": 5120, "uint8": 5121, "int16": 5122, "uint16": 5123, "uint32": 5125, "float32": 5126}
WIDTHS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)


class GltfWriter:
    """One mesh, one node, one scene; tests change ``root`` as they like before saving."""

    def __init__(self, positions: np.ndarray = TRIANGLE, indices: np.ndarray | None = None) -> None:
        self.binary = bytearray()
        self.root: dict = {
            "asset": {"version": "2.0"},
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {}}]}],
            "buffers": [{}],
            "bufferViews": [],
            "accessors": [],
        }
        self.attribute("POSITION", positions.astype(np.float32))
        if indices is not None:
            self.primitive["indices"] = self.accessor(indices)

    @property
    def primitive(self) -> dict:
        return self.root["meshes"][0]["primitives"][0]

    def view(self, data: bytes) -> int:
        """A new buffer view of some bytes."""
        self.binary += bytes(-len(self.binary) % 4)
        self.root["bufferViews"].append({"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)})
        self.binary += data
        return len(self.root["bufferViews"]) - 1

    def accessor(self, values: np.ndarray, normalized: bool = False) -> int:
        """A new accessor of ``[count]`` or ``[count, component]`` values."""
        width = 1 if values.ndim == 1 else values.shape[1]
        spec = {
            "bufferView": self.view(values.tobytes()),
            "componentType": COMPONENT_TYPES[values.dtype.name],
            "count": len(values),
            "type": WIDTHS[width],
        }
        self.root["accessors"].append(spec | ({"normalized": True} if normalized else {}))
        return len(self.root["accessors"]) - 1

    def attribute(self, name: str, values: np.ndarray, normalized: bool = False) -> None:
        self.primitive["attributes"][name] = self.accessor(values, normalized)

    def material(self, **spec: object) -> None:
        self.root["materials"] = [spec]
        self.primitive["material"] = 0

    def texture(self, image: np.ndarray) -> dict:
        """A PNG in the buffer; what a material's ``baseColorTexture`` is."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        self.root["images"] = [{"bufferView": self.view(file.getvalue()), "mimeType": "image/png"}]
        self.root["textures"] = [{"source": 0}]
        return {"index": 0}

    def glb(self) -> bytes:
        """The bytes of the file as GLB."""
        binary = bytes(self.binary) + bytes(-len(self.binary) % 4)
        self.root["buffers"][0] = {"byteLength": len(binary)}
        text = json.dumps(self.root).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(binary), 0x004E4942) + binary
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks

    def save(self, path: Path) -> Path:
        """Write as GLB, or as glTF with a data URI if the name says so."""
        if path.suffix == ".gltf":
            uri = "data:application/octet-stream;base64," + base64.b64encode(bytes(self.binary)).decode()
            self.root["buffers"][0] = {"byteLength": len(self.binary), "uri": uri}
            path.write_text(json.dumps(self.root))
        else:
            path.write_bytes(self.glb())
        return path


def refusal(path: Path, limits: AssetLimits | None = None) -> str:
    """Why a file is refused; fails where it is not."""
    with pytest.raises(AssetError) as caught:
        load_asset(path, limits=limits or AssetLimits())
    return caught.value.reason


def skinned(weights: list[list[float]]) -> GltfWriter:
    """A triangle that hangs on two joints: one lifts by 2, the other also moves by 3 along x."""
    writer = GltfWriter()
    writer.attribute("JOINTS_0", np.tile(np.array([0, 1, 0, 0], np.uint8), (3, 1)))
    writer.attribute("WEIGHTS_0", np.array(weights, np.float32))
    inverse_bind = np.tile(np.eye(4, dtype=np.float32).T.ravel(), (2, 1))
    inverse_bind[1, 12] = -1.0  # joint 1 was bound one unit along x
    writer.root["skins"] = [{"joints": [1, 2], "inverseBindMatrices": writer.accessor(inverse_bind)}]
    writer.root["nodes"] = [
        {"mesh": 0, "skin": 0, "translation": [100, 100, 100]},
        {"translation": [0, 2, 0], "children": [2]},
        {"translation": [4, 0, 0]},
    ]
    writer.root["scenes"] = [{"nodes": [0, 1]}]
    return writer
