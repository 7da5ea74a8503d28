"""STL, archives and what is not read: each gives its shape and colours, or one line that says what to do."""

import io
import json
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gltf_writer import TRIANGLE, GltfWriter, refusal
from PIL import Image

from raydream.assets import files as asset_files
from raydream.assets.asset import AssetError
from raydream.assets.files import CONVERTERS, SUFFIXES, AssetLimits
from raydream.assets.libraries import AssetRecord
from raydream.assets.load import load_asset
from raydream.config.render import PoolConfig, ViewConfig
from raydream.views.child import RenderProcess

FACET = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
OBJ = "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl skin\nf 1/1 2/2 3/3\n"
MTL = "newmtl skin\nmap_Kd {}\n"


def binary_stl(count: int, triangles: np.ndarray) -> bytes:
    facets = b"".join(struct.pack("<12fH", 0, 0, 1, *corners.ravel(), 0) for corners in triangles)
    return b"solid that is binary all the same".ljust(80) + struct.pack("<I", count) + facets


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def zipped(path: Path, files: dict[str, bytes | str], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("data", [
    binary_stl(1, TRIANGLE[None]),
    f"solid a\n{FACET}endsolid a\n".encode(),
    f"solid a\n{FACET}endsolid a\nsolid b\n{FACET}endsolid b\n".encode(),
    f"SOLID A\n{FACET.upper()}ENDSOLID A\n".encode(),
])  # fmt: skip
def test_stl(tmp_path, data):
    (tmp_path / "a.STL").write_bytes(data)
    asset = load_asset(tmp_path / "a.STL")
    assert torch.equal(asset.vertices[asset.faces[0]], torch.from_numpy(TRIANGLE))
    assert (asset.corner_normals[0] == torch.tensor([0.0, 0.0, 1.0])).all()
    assert asset.warnings == ()


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "empty_file"),
    (b"solid nothing\nendsolid nothing\n", "no_faces"),
    (binary_stl(2**31, TRIANGLE[None]), "no_faces"),  # it holds fewer than it says: not read as binary
    (binary_stl(1, TRIANGLE[None])[:100], "no_faces"),
    (binary_stl(1, TRIANGLE[None] * np.float32(np.nan)), "non_finite"),
    (b"version https://git-lfs.github.com/spec/v1\n", "lfs_pointer"),
])  # fmt: skip
def test_broken_stl(tmp_path, data, reason):
    (tmp_path / "a.stl").write_bytes(data)
    assert refusal(tmp_path / "a.stl") == reason


ARCHIVES = {
    "flat": {"a.obj": OBJ, "m.mtl": MTL.format("t.png"), "t.png": png()},
    "in folders": {
        "Chair/source/a.obj": OBJ, "Chair/source/m.mtl": MTL.format("t.png"), "Chair/textures/t.png": png(),
        "Chair/readme.txt": "hello", "__MACOSX/Chair/source/._a.obj": "x", "Chair/.hidden.obj": "x",
    },
    "upwards": {"source/a.obj": OBJ, "source/m.mtl": MTL.format(r"..\textures\T.PNG"), "textures/t.png": png()},
    "of Windows": {"a\\a.obj": OBJ, "a\\m.mtl": MTL.format("C:\\x\\t.png"), "a\\t.png": png()},
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_of_an_obj(tmp_path, name):
    asset = load_asset(zipped(tmp_path / "a.zip", ARCHIVES[name]))
    assert asset.textures.texels[0].tolist() == [200, 30, 30]
    assert (asset.num_faces, asset.warnings) == (1, ())


def test_an_archive_of_a_gltf_and_one_of_several_models(tmp_path):
    writer = GltfWriter()
    writer.attribute("TEXCOORD_0", np.zeros((3, 2), np.float32))
    writer.material(pbrMetallicRoughness={"baseColorTexture": writer.texture(np.zeros((1, 1, 3), np.uint8))})
    writer.root["images"] = [{"uri": "textures/t%20a.png"}]
    data = bytes(writer.binary)
    writer.root["buffers"] = [{"byteLength": len(data), "uri": "scene.bin"}]
    files = {"x/scene.gltf": json.dumps(writer.root), "x/scene.bin": data, "x/textures/t a.png": png()}
    for more, told in (({}, ()), ({"x/low.obj": OBJ}, ("other_model_in_the_archive: x/low.obj",))):
        asset = load_asset(zipped(tmp_path / "a.zip", files | more, zipfile.ZIP_STORED))
        assert asset.textures.texels[0].tolist() == [200, 30, 30]
        assert asset.warnings == told


def test_an_archive_is_never_unpacked_and_leads_nowhere(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(zipfile.ZipFile, "extract", None)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", None)
    before = sorted(tmp_path.rglob("*"))
    for name in ("../secret.png", str(tmp_path / "secret.png"), "file:///etc/passwd"):
        files = {"a.obj": OBJ, "m.mtl": MTL.format(name), "../evil.txt": "x", "/etc/evil": "x"}
        path = tmp_path / "in" / "a.zip"
        asset = load_asset(zipped(path, files))
        path.unlink()
        assert asset.warnings == (f"texture_outside_folder: {name}",)
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_that_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    big = OBJ + "#" * 3_000_000
    inner = zipped(tmp_path / "inner.zip", {"a.obj": OBJ}).read_bytes()
    cases: list[tuple[dict[str, str | bytes], str]] = [
        ({"a.obj": big}, "too_large"),
        ({"a.obj": OBJ, "m.mtl": "#" * 600_000 + "\n" + MTL.format("t.png"), "t.png": b"#" * 600_000}, "too_large"),
        ({"inner.zip": inner}, "unsupported_format"),
        ({"readme.txt": "x"}, "unsupported_format"),
        ({}, "unsupported_format"),
    ]
    for files, reason in cases:
        assert refusal(zipped(path, files), AssetLimits(max_bytes=1_000_000)) == reason, files.keys()
    path.write_bytes(b"PK\x03\x04 and then nothing")
    assert refusal(path) == "malformed"
    whole = zipped(path, {"a.obj": OBJ * 50}).read_bytes()
    path.write_bytes(whole[:60] + b"\xff\xff\xff" + whole[63:])
    assert refusal(path) == "malformed"
    encrypted = bytearray(zipped(path, {"a.obj": OBJ}).read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(mark) + offset] |= 1
    path.write_bytes(bytes(encrypted))
    assert refusal(path) == "malformed"
    monkeypatch.setattr(asset_files, "_MAX_MEMBERS", 2)
    assert refusal(zipped(path, {"a.obj": OBJ, "b": "", "c": ""})) == "too_large"


def test_an_archive_tells_what_to_do_with_what_it_holds(tmp_path):
    with pytest.raises(
        AssetError, match=r"unsupported_format: .*\.fbx is not read; convert it with Blender .*FBX2glTF"
    ):
        load_asset(zipped(tmp_path / "a.zip", {"source/model.fbx": b"Kaydara"}))


def test_what_is_not_read_names_its_converter_in_one_line(tmp_path):
    assert not set(SUFFIXES) & CONVERTERS.keys()
    for suffix, words in {
        ".fbx": "FBX2glTF",
        ".FBX": "FBX2glTF",
        ".dae": "Blender",
        ".usdc": "Blender",
        ".xyz": ".stl",
    }.items():
        (tmp_path / f"a{suffix}").write_bytes(b"anything")
        with pytest.raises(AssetError) as caught:
            load_asset(tmp_path / f"a{suffix}")
        assert caught.value.reason == "unsupported_format"
        assert words in caught.value.detail
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_archive_is_rendered_in_the_process_for_strangers_files(tmp_path):
    """With the same limits on time and memory as all other files."""
    process = RenderProcess(ViewConfig(num_views=2, image_px=16, images=("rgb", "alpha")), PoolConfig())
    try:
        rows = process.render(AssetRecord("chair", zipped(tmp_path / "a.zip", ARCHIVES["in folders"])))
    finally:
        process.close()
    rgb, alpha = (rows[kind].combine_chunks().to_numpy_ndarray() for kind in ("rgb", "alpha"))
    assert np.array_equal(np.unique(rgb[alpha[..., 0] == 255], axis=0), [[200, 30, 30]])
