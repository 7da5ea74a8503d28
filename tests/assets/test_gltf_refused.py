"""glTF files that lie: what must be refused, with which reason, and what must never be opened."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gltf_writer import TRIANGLE, GltfWriter, refusal, skinned
from PIL import Image

from raydream.assets.asset import AssetError
from raydream.assets.files import AssetLimits
from raydream.assets.load import load_asset


def test_files_in_the_folder_are_read_and_others_never(tmp_path):
    folder = tmp_path / "asset"
    folder.mkdir()
    data = TRIANGLE.tobytes()
    (folder / "ä b.bin").write_bytes(data)
    (tmp_path / "secret.bin").write_bytes(data)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    writer = GltfWriter()

    def with_uri(uri: str) -> Path:
        writer.root["buffers"] = [{"byteLength": len(data), "uri": uri}]
        path = folder / "a.gltf"
        path.write_text(json.dumps(writer.root))
        return path

    for uri in ("ä b.bin", "%C3%A4%20b.bin", "./ä b.bin"):
        assert load_asset(with_uri(uri)).num_faces == 1
    outside = ["../secret.bin", "%2e%2e/secret.bin", "..\\secret.bin", str(tmp_path / "secret.bin"), "link.bin"]
    outside += ["file:///etc/passwd", "http://example.org/a.bin", "C:\\a.bin", "x/../../secret.bin", "a\0b"]
    for uri in outside:
        assert refusal(with_uri(uri)) == "outside_folder", uri
    for uri in ("absent.bin", ".", "n" * 5000):
        assert refusal(with_uri(uri)) == "missing_file", uri


def test_a_texture_that_is_lost_or_lies_outside_is_a_warning_with_its_name(tmp_path):
    writer = GltfWriter()
    writer.attribute("TEXCOORD_0", np.zeros((3, 2), np.float32))
    color = {"baseColorTexture": writer.texture(np.zeros((1, 1, 3), np.uint8)), "baseColorFactor": [0, 1, 0, 1]}
    writer.material(pbrMetallicRoughness=color)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    (tmp_path / "asset").mkdir()
    for image, warning in [
        ({"uri": "absent.png"}, "texture_missing: absent.png"),
        ({"uri": "data:image/png;base64,AAAA", "name": "wood"}, "texture_unreadable: wood"),
        ({"bufferView": 77}, "texture_unreadable: images[0]"),
        ({}, "texture_unreadable: images[0]"),
        ({"uri": "../a.png"}, "texture_outside_folder: ../a.png"),
        ({"uri": "C:\\models\\a.png"}, "texture_outside_folder: C:\\models\\a.png"),
        ({"uri": "https://example.org/a.png"}, "texture_outside_folder: https://example.org/a.png"),
    ]:
        writer.root["images"] = [image]
        asset = load_asset(writer.save(tmp_path / "asset" / "a.glb"))
        assert asset.warnings == (warning,)
        assert asset.corner_colors[0, 0].tolist() == [0, 1, 0]


def _with(**changes: object) -> GltfWriter:
    writer = GltfWriter()
    writer.root |= changes
    return writer


REFUSED = {
    "two_roots_one_child": (_with(nodes=[{"children": [1]}, {"mesh": 0, "children": [0]}]), "node_cycle"),
    "child_of_two": (_with(nodes=[{"children": [2]}, {"children": [2]}, {"mesh": 0}]), "node_cycle"),
    "own_child": (_with(nodes=[{"mesh": 0, "children": [0]}]), "node_cycle"),
    "child_out_of_range": (_with(nodes=[{"children": [-1]}]), "bad_reference"),
    "node_not_an_object": (_with(nodes=[7]), "malformed"),
    "meshes_an_object": (_with(meshes={}), "malformed"),
    "zero_scale": (_with(nodes=[{"mesh": 0, "scale": [0, 0, 0]}]), "degenerate"),
    "squeezed_to_a_line": (_with(nodes=[{"mesh": 0, "scale": [1, 0, 1]}]), "degenerate"),
    "nan_transform": (_with(nodes=[{"mesh": 0, "translation": [float("nan"), 0, 0]}]), "non_finite"),
    "short_matrix": (_with(nodes=[{"mesh": 0, "matrix": [1, 2, 3]}]), "malformed"),
    "draco": (_with(extensionsRequired=["KHR_draco_mesh_compression"]), "draco_compression"),
    "meshopt": (_with(extensionsRequired=["EXT_meshopt_compression"]), "meshopt_compression"),
    "unknown_extension": (_with(extensionsRequired=["VENDOR_thing"]), "unsupported_extension"),
    "old_version": (_with(asset={"version": "1.0"}), "unsupported_version"),
    "nan_positions": (GltfWriter(TRIANGLE * np.float32([[1], [np.nan], [1]])), "non_finite"),
    "huge_positions": (GltfWriter(TRIANGLE * np.float32(1e30)), "degenerate"),
    "empty_scene": (_with(scenes=[{"nodes": []}]), "no_faces"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    writer, expected = REFUSED[name]
    assert refusal(writer.save(tmp_path / "a.glb")) == expected


def test_draco_without_a_fallback_is_refused_even_if_it_is_not_required(tmp_path):
    writer = GltfWriter()
    writer.primitive["extensions"] = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
    assert load_asset(writer.save(tmp_path / "with_fallback.glb")).num_faces == 1
    del writer.root["accessors"][0]["bufferView"]
    assert refusal(writer.save(tmp_path / "without.glb")) == "draco_compression"


def test_containers_that_lie(tmp_path):
    good = GltfWriter().glb()
    path = tmp_path / "a.glb"
    for data, expected in [
        (b"", "empty_file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "lfs_pointer"),
        (good[:12], "truncated"),
        (good[:-4], "truncated"),
        (good + b"more", "truncated"),
        (good[:4] + struct.pack("<I", 1) + good[8:], "unsupported_version"),
        (good[:12] + struct.pack("<I", 2**31) + good[16:], "truncated"),
        (good[:16] + b"\0\0\0\0" + good[20:], "malformed"),
        (b"\x80\x81 not json", "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b"[]", "malformed"),
    ]:
        path.write_bytes(data)
        assert refusal(path) == expected, data[:40]


def test_sizes_are_checked_before_memory_is_spent(tmp_path):
    writer = GltfWriter()
    writer.root["accessors"][0] |= {"count": 2**40}
    assert refusal(writer.save(tmp_path / "count.glb")) == "too_large"
    del writer.root["accessors"][0]["bufferView"]  # zeros, as many as it likes
    assert refusal(writer.save(tmp_path / "zeros.glb")) == "too_large"
    path = GltfWriter().save(tmp_path / "a.glb")
    assert refusal(path, AssetLimits(max_bytes=10)) == "too_large"
    assert refusal(path, AssetLimits(max_faces=0)) == "too_large"
    assert refusal(path, AssetLimits(max_vertices=2)) == "too_large"
    assert refusal(path, AssetLimits(max_nodes=0)) == "too_large"
    textured = GltfWriter()
    textured.attribute("TEXCOORD_0", np.zeros((3, 2), np.float32))
    textured.material(pbrMetallicRoughness={"baseColorTexture": textured.texture(np.zeros((64, 64, 3), np.uint8))})
    path = textured.save(tmp_path / "b.glb")
    assert refusal(path, AssetLimits(max_texture_px=1000)) == "too_large"
    small = load_asset(path, limits=AssetLimits(texture_side_px=16))
    assert small.textures.levels[0, 0].tolist() == [0, 16, 16]


def test_pipes_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.glb")
    (tmp_path / "folder.glb").mkdir()
    for name in ("pipe.glb", "folder.glb", "absent.glb"):
        assert refusal(tmp_path / name) == "missing_file"


def test_any_damage_ends_in_an_asset_or_a_refusal(tmp_path):
    """Random damage to a file that uses most of the format: no other exception, no number that is not finite."""
    writer = skinned([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]])
    writer.attribute("TEXCOORD_0", np.float32([[0, 0], [1, 0], [0, 1]]))
    color = {"baseColorTexture": writer.texture(np.zeros((4, 4, 4), np.uint8))}
    writer.material(pbrMetallicRoughness=color, alphaMode="BLEND")
    writer.primitive["indices"] = writer.accessor(np.uint16([0, 1, 2]))
    good = writer.glb()
    rng = np.random.default_rng(0)
    path = tmp_path / "a.glb"
    outcomes = set()
    values = b'0123456789-[]{}",.eE:tfn'
    for _ in range(400):
        data = bytearray(good)
        for place in rng.integers(20, len(data), rng.integers(1, 4)):
            data[place] = values[rng.integers(len(values))] if rng.random() < 0.8 else rng.integers(256)
        path.write_bytes(data)
        try:
            asset = load_asset(path)
            assert torch.isfinite(asset.vertices).all()
            assert torch.isfinite(asset.corner_uv).all()
            outcomes.add("loaded")
        except AssetError as error:
            outcomes.add(error.reason)
    assert {"malformed_json", "no_faces"} <= outcomes
    assert len(outcomes) > 4
