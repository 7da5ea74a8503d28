"""Asset files of all formats, real ones that break loaders, and the readers of asset libraries."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from asset_cases import MINIPACK, SHARED, needs_minipack, objaverse_folder, read_objaverse_folder
from PIL import Image

from raydream.assets.asset import AssetError, normalise_asset
from raydream.assets.files import AssetLimits
from raydream.assets.libraries import (
    AssetFilter,
    AssetRecord,
    filter_records,
    parse_cap3d_captions,
    read_manifest_folder,
    with_caption,
)
from raydream.assets.load import load_asset, load_record
from raydream.assets.raster import render_asset
from raydream.backend import load_backend
from raydream.camera import orbit_cameras

HARD = SHARED / "hard"
HARD_ROWS = [json.loads(line) for line in (HARD / "hard.jsonl").open()] if (HARD / "hard.jsonl").is_file() else []


@pytest.mark.skipif(not HARD_ROWS, reason=f"no hard files at {HARD}")
@pytest.mark.parametrize("row", HARD_ROWS, ids=[row["id"] for row in HARD_ROWS])
def test_hard_file_does_what_its_row_says(row):
    path, expect, oracle = HARD / row["file"], row["expect"], row["oracle"]
    if expect == "reject":
        with pytest.raises(AssetError):
            load_asset(path)
        return
    try:
        asset = load_asset(path)
    except AssetError as error:
        if expect != "render_or_reject":
            raise error
        return
    assert asset.num_source_faces == oracle["triangles"]
    extent = max(high - low for low, high in zip(oracle["bbox_min"], oracle["bbox_max"], strict=True))
    for found, expected in zip(asset.vertices.aminmax(dim=0), (oracle["bbox_min"], oracle["bbox_max"]), strict=True):
        assert torch.allclose(found, torch.tensor(expected), atol=1e-4 * extent)
    assert (expect != "render_with_warning") or asset.warnings
    azimuth, ones = torch.tensor([0.0, 120.0]), torch.ones(2)
    views = render_asset(
        normalise_asset(asset),
        orbit_cameras(azimuth, 20 * ones, 2.8 * ones, 45 * ones, 32, 32),
        load_backend("auto", "cpu"),
    )
    for image in (views.rgb, views.alpha, views.depth, views.normal, views.ccm):
        assert torch.isfinite(image).all()
    assert views.alpha.sum() > 5


@needs_minipack
def test_positions_agree_with_trimesh_on_ordinary_files():
    records = read_manifest_folder(MINIPACK)
    for record in records[::131]:
        asset = load_asset(record.path)
        assert asset.num_source_faces == record.num_faces
        if asset.num_faces != record.num_faces:
            continue  # alpha masks became geometry
        mesh = trimesh.load_scene(record.path, process=False).to_mesh()
        expected = np.asarray(mesh.triangles).reshape(-1, 9)
        found = asset.vertices[asset.faces].reshape(-1, 9).numpy()
        assert found.shape == expected.shape == (record.num_faces, 9)
        scale = np.abs(expected).max()
        order = [np.lexsort(np.round(rows / scale, 4).T) for rows in (found, expected)]
        centres = [rows.reshape(-1, 3, 3).mean(1)[index] for rows, index in zip((found, expected), order, strict=True)]
        assert np.allclose(np.sort(centres[0], axis=0), np.sort(centres[1], axis=0), atol=1e-4 * scale)


def test_obj_with_material_and_texture(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)).save(tmp_path / "t.png")
    (tmp_path / "m.mtl").write_text("newmtl painted\nKd 1 1 1\nmap_Kd t.png\nnewmtl plain\nKd 0.5 0 0\n")
    (tmp_path / "a.obj").write_text(
        "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 0\nvt 0 1\nvt 1 1\nvt 0 0\n"
        "usemtl painted\nf 1/1 2/2 3/3\nusemtl plain\nf 2 4 3\n"
    )
    asset = load_asset(tmp_path / "a.obj")
    assert asset.num_faces == 2
    painted = asset.face_texture >= 0
    assert painted.sum() == 1
    assert asset.textures.texels[:2].tolist() == [[255, 0, 0], [0, 255, 0]]
    vertex = asset.vertices[asset.faces[painted][0]]
    origin = asset.corner_uv[painted][0][(vertex == 0).all(-1)]
    assert torch.allclose(origin, torch.zeros(1, 2), atol=1e-6)  # vt 0 1 is the image's top left
    assert torch.allclose(asset.corner_colors[~painted][0, 0], torch.tensor([0.5, 0.0, 0.0]), atol=3e-3)


def test_obj_reads_nothing_outside_its_folder(tmp_path):
    folder = tmp_path / "asset"
    folder.mkdir()
    (tmp_path / "m.mtl").write_text("newmtl x\nKd 1 0 0\n")
    (folder / "a.obj").write_text("mtllib ../m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl x\nf 1 2 3\n")
    asset = load_asset(folder / "a.obj")
    assert asset.warnings == ("material_file_outside_folder: ../m.mtl",)
    assert torch.equal(asset.corner_colors, torch.ones(1, 3, 3))


def test_ply_with_vertex_colours_and_a_point_cloud(tmp_path):
    head = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    head += "property uchar red\nproperty uchar green\nproperty uchar blue\n"
    rows = "0 0 0 255 0 0\n1 0 0 0 255 0\n0 1 0 0 0 128\n"
    (tmp_path / "a.ply").write_text(
        head + "element face 1\nproperty list uchar int vertex_indices\nend_header\n" + rows + "3 0 1 2\n"
    )
    asset = load_asset(tmp_path / "a.ply")
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 128 / 255]])
    assert torch.allclose(asset.corner_colors[0], expected, atol=1e-6)
    (tmp_path / "b.ply").write_text(head + "end_header\n" + rows)
    with pytest.raises(AssetError) as caught:
        load_asset(tmp_path / "b.ply")
    assert caught.value.reason == "no_faces"


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.obj", b"", "empty_file"),
    ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 nan 0\nf 1 2 3\n", "non_finite"),
    ("a.ply", b"\x00\x01\x02", "malformed"),
    ("a.fbx", b"anything", "unsupported_format"),
])  # fmt: skip
def test_other_formats_fail_with_a_reason(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AssetError) as caught:
        load_asset(tmp_path / name)
    assert caught.value.reason == expected


def test_obj_size_limits(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\nf 3 2 1\n")
    for limits in (AssetLimits(max_bytes=10), AssetLimits(max_faces=1)):
        with pytest.raises(AssetError) as caught:
            load_asset(tmp_path / "a.obj", limits=limits)
        assert caught.value.reason == "too_large"


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(AssetError("too_large", "9 bytes")))
    assert (error.reason, error.detail, str(error)) == ("too_large", "9 bytes", "too_large: 9 bytes")


def test_objaverse_layout(tmp_path):
    records = read_objaverse_folder(objaverse_folder(tmp_path))
    assert [record.uid for record in records] == ["Zz9" * 9, "a" * 32]
    record = records[1]
    assert load_asset(record.path, record.uid).num_faces == record.num_faces == 1
    assert (record.captions, record.tags, record.nouns) == (("Model a",), ("lowpoly",), ("ship",))
    assert (record.licence, record.category, record.num_bytes) == ("CC-BY-4.0", "furniture-home", 500)
    (tmp_path / "metadata" / "000-159.json.gz").write_bytes(b"broken: not opened for other uids")
    assert [record.uid for record in read_objaverse_folder(tmp_path, frozenset({"a" * 32}))] == ["a" * 32]
    with pytest.raises(ValueError, match="assets"):
        read_objaverse_folder(tmp_path)
    with pytest.raises(ValueError, match="assets"):
        read_objaverse_folder(tmp_path / "absent")


def test_cap3d_captions_hold_commas_and_quotes():
    captions = parse_cap3d_captions(b'u1,"A ""big"" chair, red"\nu2,Plain.\nbroken line without caption\n')
    assert captions == {"u1": 'A "big" chair, red', "u2": "Plain."}
    records = [AssetRecord("u1", Path("x"), ("Chair",)), AssetRecord("u3", Path("y"))]
    captioned = [with_caption(record, captions.get(record.uid)) for record in records]
    assert [record.captions for record in captioned] == [("Chair", 'A "big" chair, red'), ()]


def test_filters_count_what_they_drop():
    base = AssetRecord("0", Path("x"), tags=("wood",), licence="cc0", num_faces=100, num_bytes=1000, front_axis="+Z")
    records = [
        base,
        replace(base, uid="1", is_object=False),
        replace(base, uid="2", licence="by-nc"),
        replace(base, uid="3", licence=None),
        replace(base, uid="4", tags=("metal",)),
        replace(base, uid="5", tags=("wood", "nsfw")),
        replace(base, uid="6", tags=("wood", "pointcloud")),
        replace(base, uid="7", num_faces=0),
        replace(base, uid="8", num_faces=5),
        replace(base, uid="9", num_faces=10_000),
        replace(base, uid="10", num_bytes=10**9),
        replace(base, uid="11", front_axis=None),
        replace(base, uid="12", num_faces=None, num_bytes=None),
    ]
    rule = AssetFilter(
        any_tags=frozenset({"wood"}), no_tags=frozenset({"nsfw"}), licences=frozenset({"cc0"}), known_front_only=True,
        min_faces=10, max_faces=1000, max_bytes=10**6,
    )  # fmt: skip
    kept, dropped = filter_records(records, rule)
    assert [record.uid for record in kept] == ["0", "12"]
    assert dropped == Counter(
        not_an_object=1, licence=2, tag_missing=1, tag_excluded=1, point_cloud=2, too_few_faces=1, too_many_faces=1,
        too_many_bytes=1, front_unknown=1,
    )  # fmt: skip
    assert filter_records(records, AssetFilter(uids=frozenset({"3"})))[0] == [records[3]]


def test_manifest_folder(tmp_path):
    row = {"uid": "u", "file": "a.glb", "caption": "a red chair", "colours": [["red", 0.9]], "license": "CC0-1.0"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n\n")
    (record,) = read_manifest_folder(tmp_path)
    assert (record.path, record.captions, record.colours) == (tmp_path / "a.glb", ("a red chair",), ("red",))
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + '\n{"uid": 3}\n')
    with pytest.raises(ValueError, match=r"assets: line 2"):
        read_manifest_folder(tmp_path)
    with pytest.raises(ValueError, match="assets"):
        read_manifest_folder(tmp_path / "absent")


@needs_minipack
def test_both_readers_of_the_same_library_agree():
    by_manifest = {record.uid: record for record in read_manifest_folder(MINIPACK)}
    captions = parse_cap3d_captions((MINIPACK / "Cap3D_automated_Objaverse_full.csv").read_bytes())
    records = read_objaverse_folder(MINIPACK / "hf-objaverse-v1")
    by_layout = [with_caption(record, captions.get(record.uid)) for record in records]
    assert {record.uid for record in by_layout} == set(by_manifest)
    for record in by_layout:
        other = by_manifest[record.uid]
        assert record.path == other.path
        assert (record.num_faces, record.num_bytes) == (other.num_faces, other.num_bytes)
        assert len(record.captions) == 2
        assert set(record.nouns) == set(other.nouns)


@pytest.mark.parametrize(("axis", "azimuth_deg"), [("+Z", 0.0), ("+X", 90.0), ("-Z", 180.0), ("-X", -90.0)])
def test_a_front_is_turned_to_face_the_camera_at_azimuth_0(tmp_path, axis, azimuth_deg):
    """The turned asset from the front is the asset as it was from that side: colours, normals and all."""
    mesh = trimesh.creation.box((1.0, 0.6, 0.4))
    mesh.visual.face_colors = [[20 * i, 255 - 20 * i, 90, 255] for i in range(len(mesh.faces))]
    mesh.export(tmp_path / "box.ply")
    record = AssetRecord("u", tmp_path / "box.ply")
    images = []
    for about, azimuth in ((record, azimuth_deg), (replace(record, front_axis=axis), 0.0)):
        one = torch.ones(1)
        cameras = orbit_cameras(azimuth * one, 20 * one, 3 * one, 40 * one, 32, 32)
        views = render_asset(load_record(about), cameras, load_backend("auto", "cpu"))
        to_camera = torch.einsum("vji,vhwj->vhwi", cameras.c2w[:, :3, :3], views.normal)
        images.append(torch.cat([views.rgb, views.alpha, to_camera], dim=-1))
    assert images[0][..., 3].mean() > 0.05
    torch.testing.assert_close(images[1], images[0], atol=2e-3, rtol=0)


def test_marked_fronts_correct_a_manifest(tmp_path):
    rows = [{"uid": uid, "file": "a.glb", "front_axis": "+Z"} for uid in ("as_it_is", "marked", "none")]
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "fronts.json").write_text(json.dumps({"marked": "-X", "none": None}))
    records = read_manifest_folder(tmp_path)
    assert {record.uid: record.front_axis for record in records} == {"as_it_is": "+Z", "marked": "-X", "none": None}
    (tmp_path / "fronts.json").write_text(json.dumps({"marked": "left"}))
    with pytest.raises(ValueError, match=r"^assets: front_axis in .*marked must be one of \+Z"):
        read_manifest_folder(tmp_path)
    (tmp_path / "fronts.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"^assets: .*fronts.json is not an object"):
        read_manifest_folder(tmp_path)
