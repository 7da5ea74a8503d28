"""Views of assets as Parquet: what a row holds, what becomes of bad files, and jobs that are killed and go on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from asset_cases import MINIPACK, needs_minipack
from gltf_writer import GltfWriter
from PIL import Image
from render_jobs import BACKEND, ROOT, SMALL, all_rows, library_records, render_without_ray, small_job
from rendering_speed import format_figures, measure, mesh_step_ratios

from raydream.assets.procedural import procedural_records
from raydream.camera import camera_rays
from raydream.config import strict_json
from raydream.config.render import LibraryConfig, RenderJobConfig, ViewConfig, ccm_recipe, make_recipe
from raydream.store.storage import LocalFiles, RemoteFiles, resolve
from raydream.views.dataset import iterate_views
from raydream.views.plan import open_plan
from raydream.views.render import draw_cameras, render_record
from raydream.views.schema import decode_image

pytestmark = pytest.mark.slow

CHAIR = next(record for record in procedural_records() if record.uid == "chair-0")


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The views of eight procedural objects in three shards."""
    out = tmp_path_factory.mktemp("views") / "eight"
    render_without_ray(small_job(max_objects=8), out, child=True)
    return out


def test_recipes_are_strict_json_and_say_what_is_wrong():
    for name in ("ccm", "prior"):
        recipe = make_recipe(name)
        assert strict_json.loads(RenderJobConfig, strict_json.dumps(recipe)) == recipe
    ccm = ccm_recipe().views
    assert (ccm.distance, ccm.fov_y_deg, ccm.elevation_deg) == ((0.9, 1.1), (45.0, 45.0), (-10.0, 45.0))
    for setting, field in {
        "views.distance=[0.8, 1.1]": "views.distance",  # inside the object's circumscribed sphere
        "views.distance=[1.2, 1.0]": "views.distance",
        'views.images=["rgb", "rgb"]': "views.images",
        'views.images=["colour"]': "views.images.0",
        "views.num_views=0": "views.num_views",
        "pool.workers=-1": "pool.workers",
        "library.min_faces=-1": "library.min_faces",
        "views.imagepx=3": "views.imagepx",
    }.items():
        with pytest.raises(ValueError, match=rf"^{field.replace('.', '[.]')}"):
            strict_json.apply_overrides(ccm_recipe(), [setting])


def test_cameras_depend_on_seed_uid_and_view_alone():
    config = replace(SMALL, num_views=8)
    cameras, distance = draw_cameras(config, "a")
    again, _ = draw_cameras(config, "a")
    assert torch.equal(cameras.c2w, again.c2w)
    assert not torch.equal(cameras.c2w, draw_cameras(config, "b")[0].c2w)
    assert not torch.equal(cameras.c2w, draw_cameras(replace(config, seed=1), "a")[0].c2w)
    assert torch.allclose(cameras.c2w[:, :3, 3].norm(dim=-1), distance)
    assert ((distance >= 1.5) & (distance <= 1.9)).all()
    assert ((cameras.elevation_deg >= -10) & (cameras.elevation_deg <= 45)).all()
    # one in each of eight sectors, wherever the first of them begins
    gaps = torch.diff(torch.cat([cameras.azimuth_deg.sort().values, cameras.azimuth_deg.min()[None] + 360]))
    assert (gaps < 2 * 360 / 8).all()
    narrow, _ = draw_cameras(replace(config, azimuth_deg=(10.0, 50.0)), "a")
    sectors = ((narrow.azimuth_deg - 10) / 5).floor()
    assert sectors.tolist() == list(range(8))


def test_rows_are_read_by_plain_pyarrow_with_shapes_and_meaning(eight):
    table = all_rows(eight)
    keys = list(zip(table["uid"].to_pylist(), table["view"].to_pylist()))
    uids = sorted(record.uid for record in procedural_records())[:8]
    assert keys == [(uid, view) for uid in uids for view in range(3)]
    shapes = {field.name: tuple(field.type.shape) for field in table.schema if hasattr(field.type, "shape")}
    channels = {"rgb": 3, "lit": 3, "alpha": 1, "depth": 1, "normal": 3, "ccm": 3}
    assert shapes == {"c2w": (4, 4), **{kind: (16, 16, number) for kind, number in channels.items()}}
    assert table.schema.field("ccm").type.value_type == pa.float16()
    assert table["captions"][0].as_py() == ["a red car"]
    assert len(table["source_sha256"][0].as_py()) == 64
    assert pq.ParquetFile(eight / "views" / "shard-00002.parquet").num_row_groups == 2
    stored = json.loads(table.schema.metadata[b"raydream.views"])
    assert strict_json.from_json(ViewConfig, stored) == SMALL


def test_stored_images_agree_with_each_other(eight):
    """The point that depth gives is the point that the coordinate map gives; colours lie under their alpha."""
    for rows in iterate_views(str(eight)):
        images = {kind: decode_image(kind, rows[kind]) for kind in SMALL.images}
        inside = images["alpha"][..., 0] == 1
        assert inside.any()
        assert (images["alpha"][..., 0] == 0).any()
        assert (images["rgb"] <= images["alpha"] + 1 / 255).all()
        assert (images["lit"] <= images["rgb"] + 1 / 255).all()
        cameras, _ = draw_cameras(SMALL, rows["uid"][0])
        assert np.array_equal(cameras.c2w.numpy(), rows["c2w"])
        rays = camera_rays(cameras)
        directions = rays.directions.view(3, 16, 16, 3).numpy()
        forward = -rows["c2w"][:, None, None, :3, 2]
        along = directions / (directions * forward).sum(-1, keepdims=True)
        points = rows["c2w"][:, None, None, :3, 3] + along * images["depth"]
        # the map is affine in the point: fit it, for an object's box is not stored
        features = np.concatenate([points[inside], np.ones((inside.sum(), 1))], axis=1)
        fit, *_ = np.linalg.lstsq(features, images["ccm"][inside], rcond=None)
        assert np.abs(features @ fit - images["ccm"][inside]).mean() < 0.02
        facing = (images["normal"] * along).sum(-1)[inside]
        assert (facing < 0.2).mean() > 0.95


def test_shade_times_albedo_is_lit():
    both = replace(SMALL, images=("rgb", "shade", "lit", "alpha"))
    table = render_record(CHAIR, both, BACKEND)
    rgb, shade, lit, alpha = (
        decode_image(kind, table[kind].combine_chunks().to_numpy_ndarray()) for kind in ("rgb", "shade", "lit", "alpha")
    )
    assert np.abs(rgb * shade - lit).max() < 1.5 / 255
    assert (shade[alpha > 0] >= 0.5 - 1 / 255).all()
    assert (shade[alpha == 0] == 0).all()


def test_prior_recipe_shows_whole_objects():
    views = replace(make_recipe("prior").views, image_px=32)
    table = render_record(CHAIR, views, BACKEND)
    alpha = table["alpha"].combine_chunks().to_numpy_ndarray()
    edge = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]])
    assert (edge == 0).all()
    assert table.num_rows == 14


def test_image_batches_do_not_change_a_pixel(monkeypatch):
    whole = render_record(CHAIR, SMALL, BACKEND)
    monkeypatch.setattr("raydream.views.render._SAMPLES_AT_ONCE", 1)
    assert render_record(CHAIR, SMALL, BACKEND).equals(whole)


def make_library(folder: Path) -> Path:
    """Four good assets and every kind of trouble; one row is not an object and one has another's licence."""
    folder.mkdir()
    good = GltfWriter().save(folder / "good.glb").read_bytes()
    files = {
        "a": good, "b": b"not a model", "c": good[:40], "d": b"", "e": good, "f": good, "g": good, "i": good, "j": good
    }  # fmt: skip
    rows = []
    for uid, data in files.items():
        (folder / f"{uid}.glb").write_bytes(data)
        rows.append({"uid": uid, "file": f"{uid}.glb", "caption": f"a {uid}", "license": "CC0-1.0", "split": "object"})
    rows.append({"uid": "h", "file": "missing.glb", "caption": "a hole", "license": "CC0-1.0", "split": "object"})
    rows[4]["sha256"] = "0" * 64
    rows[5]["split"] = "negative"
    rows[6]["license"] = "CC-BY-4.0"
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "subsets.json").write_text(json.dumps({"most": list("abcdefghi"), "none": []}))
    return folder


def test_bad_assets_are_rows_of_the_report(tmp_path):
    library = make_library(tmp_path / "library")
    out = tmp_path / "out"
    plan = render_without_ray(small_job(str(library), subsets=("most",), licences=("CC0-1.0",)), out)
    assert plan.num_objects == 7
    assert sorted(set(all_rows(out)["uid"].to_pylist())) == ["a", "i"]
    rejected = pq.read_table(out / "rejected").to_pylist()
    assert {row["uid"]: row["reason"] for row in rejected}.keys() == set("bcdeh")
    reasons = {row["uid"]: row["reason"] for row in rejected}
    assert (reasons["d"], reasons["e"], reasons["h"]) == ("empty_file", "hash_mismatch", "missing_file")
    left_out = {row["uid"]: row["reason"] for row in pq.read_table(out / "left_out.parquet").to_pylist()}
    assert left_out == {"f": "not_an_object", "g": "licence", "j": "uid"}
    report = json.loads((out / "report.json").read_text())
    assert (report["objects"], report["views"], report["planned"]) == (2, 6, 7)
    assert sum(report["rejected"].values()) == 5
    assert report["left_out_by_filters"] == {"not_an_object": 1, "licence": 1, "uid": 1}


def test_sheet_shows_every_object(eight):
    sheet = Image.open(eight / "contact_sheet.png")
    assert sheet.width == 2 * 6 * 128  # two strips of six kinds of image on a line
    assert sheet.height == 4 * 128


def test_output_folder_belongs_to_one_job(eight, tmp_path):
    files = resolve(str(eight), None)
    job = small_job(max_objects=8)
    assert open_plan(files, job).num_shards == 3
    assert open_plan(files, replace(job, pool=replace(job.pool, workers=1))).num_shards == 3
    with pytest.raises(ValueError, match=r"^out: .*views.seed=0, not 5"):
        open_plan(files, replace(job, views=replace(SMALL, seed=5)))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^out: "):
        open_plan(resolve(str(tmp_path), None), job)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("library", "message"), [
    (LibraryConfig("/nonexistent"), "library.source"),
    (LibraryConfig("procedural", subsets=("x",)), "library.subsets"),
    (LibraryConfig("procedural", captions="/nonexistent.csv"), "library.captions"),
    (LibraryConfig("procedural", any_tags=("purple",)), "library: no asset is left"),
    (LibraryConfig("procedural", licences=("by",)), "library.licences: 0 of 96 .* has 96 CC0-1.0"),
])  # fmt: skip
def test_library_that_cannot_be_is_named(library, message):
    with pytest.raises(ValueError, match=message):
        library_records(library)


def test_unknown_subsets_are_named(tmp_path):
    library = str(make_library(tmp_path / "library"))
    with pytest.raises(ValueError, match="there are most, none"):
        library_records(LibraryConfig(library, subsets=("mots",)))
    with pytest.raises(ValueError, match="no asset is in all"):
        library_records(LibraryConfig(library, subsets=("most", "none")))


@needs_minipack
def test_objaverse_layout_gives_the_same_pictures_as_the_manifest(tmp_path):
    by_manifest, _ = library_records(LibraryConfig(str(MINIPACK), subsets=("tiny_24",)))
    captions = MINIPACK / "Cap3D_automated_Objaverse_full.csv"
    layout = LibraryConfig(str(MINIPACK / "hf-objaverse-v1"), captions=str(captions))
    by_layout = {record.uid: record for record in library_records(layout)[0]}
    for record in by_manifest[:3]:
        other = by_layout[record.uid]
        assert len(other.captions) >= 1
        first, second = (render_record(one, SMALL, BACKEND) for one in (record, other))
        same = ["uid", "view", "source_sha256", "c2w", *SMALL.images]
        assert first.select(same).equals(second.select(same))


def test_reader_refuses_unfinished_jobs_and_unknown_columns(eight, tmp_path):
    with pytest.raises(ValueError, match=r"^columns: no 'lux'"):
        next(iterate_views(str(eight), ("lux",)))
    render_without_ray(small_job(max_objects=1), tmp_path / "other")
    (tmp_path / "other" / "views" / "shard-00000.parquet").unlink()
    with pytest.raises(ValueError, match=r"^views: 1 of 1 shards are missing"):
        next(iterate_views(str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"^views: no rendering job"):
        next(iterate_views(str(tmp_path / "nothing")))


def test_reader_needs_neither_torch_nor_ray(eight):
    code = f"""
import sys
from raydream.views.dataset import iterate_views
assert len(list(iterate_views({str(eight)!r}))) == 8
assert not {{"torch", "ray"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def test_shards_can_lie_on_any_filesystem(eight, tmp_path):
    """The reader and the report see a folder through pyarrow's filesystem as they see it on disk."""
    filesystem = pyarrow.fs.SubTreeFileSystem(str(eight), pyarrow.fs.LocalFileSystem())
    files = RemoteFiles(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()), "job")
    assert isinstance(resolve(str(eight), None), LocalFiles)
    render_without_ray(small_job(max_objects=8), tmp_path / "job", files)
    assert all_rows(tmp_path / "job").equals(all_rows(eight))
    with filesystem.open_input_file("report.json") as stream:
        assert stream.read() == (tmp_path / "job" / "report.json").read_bytes()


def test_benchmark_measures_pictures_that_agree(monkeypatch):
    monkeypatch.setattr("rendering_speed.SIZES_PX", (24, 32))
    figures = measure(procedural_records()[:2], replace(SMALL, distance=(2.0, 2.0)))
    assert {"raydream", "rows"} <= set(figures)
    assert all(value > 0 for row in figures.values() for value in row.values())
    assert format_figures(figures).startswith("| views/s/core | 24 px | 32 px |\n|---|---|---|\n| raydream | ")
    assert mesh_step_ratios([(1, 24)], 1)[1, 24] > 0
    nothing = lambda asset, cameras: np.full((3, cameras.height_px, cameras.width_px), -1)  # noqa: E731
    monkeypatch.setattr("rendering_speed._embree", nothing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "embreex" or None)
    with pytest.raises(AssertionError, match="embreex"):
        measure(procedural_records()[:1], SMALL)
