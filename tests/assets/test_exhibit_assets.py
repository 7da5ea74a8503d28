"""The choice of assets for an exhibit, and the objects that the project makes itself."""

import json
from pathlib import Path

import pytest
import torch
from asset_cases import MINIPACK, needs_minipack
from gltf_writer import GltfWriter

from raydream.assets.asset import normalise_asset
from raydream.assets.exhibit import (
    PROCEDURAL,
    asset_folder,
    available_nouns,
    exhibit_assets,
    farthest_points,
    match_records,
)
from raydream.assets.libraries import AssetRecord
from raydream.assets.procedural import MAKERS, NUM_VARIANTS, procedural_asset


def records(*captions: str) -> list[AssetRecord]:
    return [AssetRecord(str(index), Path("x"), (caption,)) for index, caption in enumerate(captions)]


@pytest.mark.parametrize(("prompt", "expected"), [
    ("a chair", "023"),
    ("Chairs!", "023"),
    ("a RED chair", "0"),
    ("a photo of a red chair", "0"),
    ("a chair with a red cushion", "0"),  # colours are the prompt's, wherever they stand
    ("a lift", "1"),
    ("an orange", "4"),
    ("a bowl", "5"),
    ("a fruit", ""),
    ("", ""),
])  # fmt: skip
def test_prompts_match_the_object_and_the_colours(prompt, expected):
    library = records(
        "a red chair, mostly red",
        "a chair lift",
        "a wooden chair with a bowl",
        "chairs",
        "an orange",
        "a bowl of oranges",
    )
    assert "".join(record.uid for record in match_records(library, prompt)) == expected


def test_category_words_name_objects_too():
    library = [AssetRecord("0", Path("x"), ("a relaxing lounger",), nouns=("chair",))]
    assert match_records(library, "a chair") == library


def test_farthest_points_start_typical_spread_out_and_leave_out_copies():
    features = torch.tensor([[0.0], [1.0], [1.1], [10.0], [-3.0], [10.0]])
    assert farthest_points(features, 4)[1:3] == [4, 3] or farthest_points(features, 4)[1:3] == [3, 4]
    assert len(farthest_points(features, 6)) == 5
    assert farthest_points(features[:1], 3) == [0]


def test_procedural_objects_are_many_different_and_the_same_each_time():
    assert len(MAKERS) >= 4
    assert NUM_VARIANTS >= 10
    for noun in MAKERS:
        variants = [procedural_asset(noun, variant) for variant in range(NUM_VARIANTS)]
        assert len({asset.caption for asset in variants}) == NUM_VARIANTS
        shapes = {(asset.num_faces, *asset.vertices.mean(0).tolist()) for asset in variants}
        assert len(shapes) >= 10
        assert all(200 <= asset.num_faces <= 10_000 for asset in variants)
    first, again = procedural_asset("car", 3), procedural_asset("car", 3)
    assert torch.equal(first.vertices, again.vertices)
    with pytest.raises(KeyError):
        procedural_asset("sphinx", 0)


@pytest.mark.slow
def test_exhibit_of_procedural_objects():
    assets = exhibit_assets("a mushroom", PROCEDURAL, 6)
    assert len({asset.uid for asset in assets}) == 6
    assert all(asset.caption.endswith("mushroom") for asset in assets)
    assert [asset.uid for asset in exhibit_assets("a mushroom", PROCEDURAL, 6)] == [asset.uid for asset in assets]
    (red,) = exhibit_assets("a red car", PROCEDURAL, 8)
    assert red.caption == "a red car"
    assert len(exhibit_assets(None, PROCEDURAL, 5)) == 5
    assert available_nouns(PROCEDURAL) == dict.fromkeys(MAKERS, NUM_VARIANTS)


def test_errors_name_the_field_and_the_nouns():
    with pytest.raises(ValueError, match=r"prompt: 'a sphinx'.*chair \(12\)"):
        exhibit_assets("a sphinx", PROCEDURAL, 3)
    with pytest.raises(ValueError, match="num_assets"):
        exhibit_assets("a chair", PROCEDURAL, 0)
    with pytest.raises(ValueError, match="assets"):
        exhibit_assets("a chair", "/nowhere/at/all", 3)
    with pytest.raises(ValueError, match="prompt"):
        exhibit_assets("../../etc/passwd " * 600, PROCEDURAL, 3)


def test_a_folder_of_ones_own(tmp_path, monkeypatch, caplog):
    rows = []
    for index, caption in enumerate(["a red kite", "a blue kite", "a broken kite", "a stone"]):
        writer = GltfWriter()
        writer.root["nodes"][0]["scale"] = [1, 1 + index, 1]
        writer.material(pbrMetallicRoughness={"baseColorFactor": [index % 2, 0, 1 - index % 2, 1]})
        writer.save(tmp_path / f"{index}.glb")
        rows.append({"uid": str(index), "file": f"{index}.glb", "caption": caption})
    (tmp_path / "2.glb").write_bytes(b"")
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert {asset.caption for asset in exhibit_assets("a kite", str(tmp_path), 5)} == {"a red kite", "a blue kite"}
    assert "2 left out: empty_file" in caplog.text
    monkeypatch.setenv("RAYDREAM_ASSETS", str(tmp_path))
    assert asset_folder(None) == tmp_path
    assert available_nouns(None) == {"kite": 3, "stone": 1}
    monkeypatch.setenv("RAYDREAM_ASSETS", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"^RAYDREAM_ASSETS: no manifest.jsonl in .*absent"):
        asset_folder(None)
    assert asset_folder(PROCEDURAL) is None
    monkeypatch.delenv("RAYDREAM_ASSETS")
    assert asset_folder(None) is None
    assert set(available_nouns(None)) == set(MAKERS)
    (tmp_path / "manifest.jsonl").write_text(json.dumps(rows[2]))
    with pytest.raises(ValueError, match="prompt: none of the 1 files"):
        exhibit_assets("a kite", str(tmp_path), 5)


@needs_minipack
def test_chairs_of_the_library(monkeypatch):
    monkeypatch.setenv("RAYDREAM_ASSETS", str(MINIPACK))
    chairs = exhibit_assets("a chair", None, 8)
    assert len({chair.uid for chair in chairs}) == 8
    assert all("chair" in chair.caption for chair in chairs)
    for chair in chairs:
        assert normalise_asset(chair, 0.9).vertices.norm(dim=-1).max() == pytest.approx(0.9, abs=1e-4)
    assert available_nouns(None)["tree"] > 50
