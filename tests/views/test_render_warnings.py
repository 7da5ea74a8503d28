"""What of an asset's file could not be read, on its way to the person: rows, report, the line at the end, filters."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from gltf_writer import GltfWriter
from render_jobs import SMALL, all_rows, render_without_ray, small_job

from raydream.store.storage import resolve
from raydream.views.dataset import iterate_views
from raydream.views.folder import REPORT, SUMMARIES
from raydream.views.report import warning_line, write_job_report

BROKEN = {"b": "texture_missing: skin.png", "c": "texture_compression_unsupported: bark"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole asset, one whose texture is not there, one whose texture nobody reads, and one without its points."""
    folder = tmp_path_factory.mktemp("library")
    images = {"b": {"uri": "skin.png"}, "c": {"name": "bark", "mimeType": "image/ktx2"}}
    for uid in "abcd":
        writer = GltfWriter(np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 1]]))
        writer.attribute("TEXCOORD_0", np.zeros((3, 2), np.float32))
        if uid in images:
            writer.root["images"] = [images[uid]]
            writer.root["textures"] = [
                {"extensions": {"KHR_texture_basisu": {"source": 0}}} if uid == "c" else {"source": 0}
            ]
            writer.material(pbrMetallicRoughness={"baseColorTexture": {"index": 0}})
        if uid == "d":
            writer.root["meshes"][0]["primitives"].append({"attributes": {"POSITION": 0}, "mode": 0})
        writer.save(folder / f"{uid}.glb")
    rows = [{"uid": uid, "file": f"{uid}.glb", "caption": f"a {uid}"} for uid in "abcd"]
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_warnings_reach_the_rows_the_report_and_the_line_at_the_end(library, tmp_path):
    out = tmp_path / "out"
    plan = render_without_ray(small_job(str(library)), out)
    told = {row["uid"]: row["warnings"] for row in all_rows(out).select(["uid", "warnings"]).to_pylist()}
    assert told == {"a": [], "b": [BROKEN["b"]], "c": [BROKEN["c"]], "d": ["points_or_lines_skipped"]}
    report = json.loads((out / REPORT).read_text())
    assert (report["objects"], report["rejected"]) == (4, {})
    assert report["warnings"] == {
        "texture_missing": {"objects": 1, "first": ["b: skin.png"]},
        "texture_compression_unsupported": {"objects": 1, "first": ["c: bark"]},
        "points_or_lines_skipped": {"objects": 1, "first": ["d"]},
    }
    line = warning_line(report)
    assert "\n" not in line
    assert "texture_missing 1 (b: skin.png)" in line
    assert warning_line(report | {"warnings": {}}) == ""
    many = {"texture_missing": {"objects": 5, "first": list("abcde")}}
    assert warning_line(report | {"warnings": many}).endswith("texture_missing 5 (a, b, c, ...)")
    assert write_job_report(resolve(str(out), None), plan, SMALL) == report  # also by the log of summaries
    assert '"warned"' in (out / SUMMARIES).read_text()


def test_a_setting_leaves_out_what_lost_its_colours(library, tmp_path):
    out = tmp_path / "out"
    render_without_ray(small_job(str(library), colour_warnings=False), out)
    assert sorted(set(all_rows(out)["uid"].to_pylist())) == ["a", "d"]  # missing points are no matter of colour
    rejected = {row["uid"]: (row["reason"], row["detail"]) for row in pq.read_table(out / "rejected").to_pylist()}
    assert rejected == {uid: ("colours_lost", told) for uid, told in BROKEN.items()}
    report = json.loads((out / REPORT).read_text())
    assert report["rejected"] == {"colours_lost": 2}
    assert list(report["warnings"]) == ["points_or_lines_skipped"]


def test_shards_of_an_older_version_are_read_and_counted(library, tmp_path):
    """They lack the column; so do some of a job that was begun with that version and finished with this one."""
    out = tmp_path / "out"
    plan = render_without_ray(small_job(str(library)), out)
    first = out / "views" / "shard-00000.parquet"
    pq.write_table(pq.read_table(first).drop_columns(["warnings"]), first, row_group_size=SMALL.num_views)
    (out / SUMMARIES).unlink()
    rows = list(iterate_views(str(out), ("uid", "warnings")))
    assert [row["uid"][0] for row in rows] == list("abcd")
    assert [row["warnings"][0] for row in rows] == [None, None, None, ["points_or_lines_skipped"]]
    report = write_job_report(resolve(str(out), None), plan, SMALL)
    assert list(report["warnings"]) == ["points_or_lines_skipped"]
    assert report["objects"] == 4
