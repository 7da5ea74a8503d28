"""Any folder is a library: of plain files, Objaverse's cache or its parent, a part of a download; here and by URI."""

import gzip
import json
import logging
from pathlib import Path, PurePosixPath

import pytest
from asset_cases import objaverse_folder
from gltf_writer import GltfWriter
from pyarrow import fs
from render_jobs import all_rows, library_records, render_without_ray, small_job

from raydream.assets import remote_library
from raydream.assets.folder_library import plain_name
from raydream.config.render import LibraryConfig
from raydream.store.storage import LocalFiles, RemoteFiles, resolve
from raydream.views import plan as render_plan
from raydream.views.plan import open_plan

UID, OTHER = "a" * 32, "Zz9" * 9


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """Files as people keep them: nested, in several formats, with names that tell and names that do not."""
    folder = tmp_path / "loose"
    names = (
        "red_chair-03.glb", "WoodenTable/scene.glb", "lamps/001.glb", "lamps/._001.glb", ".cache/lamp.glb",
        "5f3c9a1e0b7d4c2f8e6a1234567890ab.glb",
    )  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        GltfWriter().save(folder / name)
    (folder / "red_chair-03.obj").write_text("v 0 0 0\n")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Makes ``s3://assets/NAME`` a folder of ``tmp_path``; the folders of which everything is listed, as they are."""
    asked: list[str] = []
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())

    def resolve_bucket(uri: str, filesystem: fs.FileSystem | None) -> LocalFiles | RemoteFiles:
        return RemoteFiles(bucket, uri.removeprefix("s3://assets/").partition("?")[0].rstrip("/"), patience_s=0.0)

    sizes = RemoteFiles.sizes

    def counted(self: RemoteFiles, folder: str) -> dict[str, int]:
        asked.append(folder)
        return sizes(self, folder)

    monkeypatch.setattr(RemoteFiles, "sizes", counted)
    for module in (remote_library, render_plan):
        monkeypatch.setattr(module, "resolve", resolve_bucket)
    return asked


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("red_chair-03.glb", "red chair"),
        ("RedChair/scene.gltf", "red chair"),
        ("chairs/001.glb", "chairs"),
        ("Low-Poly_Tree_LOD0.glb", "low poly tree"),
        ("wooden.table.v2.obj", "wooden table"),
        ("sofa (1).glb", "sofa"),
        ("kit/Models/GLB format/bed Double.glb", "bed double"),
        ("椅子.glb", "椅子"),
        ("lamp/mesh_final.ply", "lamp"),
        ("3001627/1a15de92a49c9c2b/models/model_normalized.obj", None),
        ("5f3c9a1e-0b7d-4c2f-8e6a-1234567890ab.glb", None),
    ],
)
def test_files_have_plain_names(path: str, name: str | None) -> None:
    assert plain_name(PurePosixPath(path)) == name


def test_a_folder_of_files_is_a_library(loose: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = {record.uid: record for record in library_records(LibraryConfig(str(loose)))[0]}
    captions = {uid: record.captions for uid, record in records.items()}
    assert captions == {
        "red_chair-03.glb": ("red chair",),
        "WoodenTable/scene.glb": ("wooden table",),
        "lamps/001.glb": ("lamps",),
        "5f3c9a1e0b7d4c2f8e6a1234567890ab.glb": (),
    }
    assert (records["lamps/001.glb"].category, records["lamps/001.glb"].licence) == ("lamps", None)
    assert "1 files are another format of one beside them" in caplog.text
    assert [record.uid for record in library_records(LibraryConfig(str(loose), any_tags=("lamps",)))[0]] == [
        "lamps/001.glb"
    ]


def test_it_renders_the_same_from_a_bucket_which_is_listed_once(
    loose: Path, tmp_path: Path, listings: list[str]
) -> None:
    render_without_ray(small_job(str(loose)), tmp_path / "here")
    assert not listings
    render_without_ray(small_job("s3://assets/loose"), tmp_path / "there")
    assert listings == [""]
    assert all_rows(tmp_path / "here").num_rows == 4 * 3
    assert all_rows(tmp_path / "there").equals(all_rows(tmp_path / "here"))
    open_plan(resolve(str(tmp_path / "there"), None), small_job("s3://assets/loose"))  # taken up again


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_what_has_no_asset_is_told_with_what_was_looked_for(place: str, tmp_path: Path, listings: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    source = {"folder": str(tmp_path / "empty"), "bucket": "s3://assets/empty"}[place]
    with pytest.raises(ValueError, match=r"^library.source: .*looked for manifest.jsonl.*\*\.glb.*no files$"):
        library_records(LibraryConfig(source))
    (tmp_path / "empty" / "robot.FBX").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"^library.source: .*there are 1 \.fbx; convert \.fbx with Blender"):
        library_records(LibraryConfig(source))
    with pytest.raises(ValueError, match=r"^library.source: there is no folder .*nowhere"):
        library_records(LibraryConfig(str(tmp_path / "nowhere")))


def test_a_library_that_is_gone_is_told_when_its_job_goes_on(loose: Path, tmp_path: Path) -> None:
    job, out = small_job(str(loose)), resolve(str(tmp_path / "out"), None)
    open_plan(out, job)
    loose.rename(tmp_path / "elsewhere")
    loose.mkdir()  # a place where nothing is mounted
    with pytest.raises(ValueError, match=r"^library.source: no asset in "):
        open_plan(out, job)


@pytest.mark.parametrize("place", ["cache", "parent", "bucket", "parent_bucket"])
def test_a_part_of_objaverse_is_planned_and_what_misses_counted(
    place: str, tmp_path: Path, listings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / ".objaverse"
    cache = objaverse_folder(home / "hf-objaverse-v1")
    (gone,) = cache.glob(f"glbs/*/{OTHER}.glb")
    gone.unlink()
    source = {
        "cache": str(cache),
        "parent": str(home),
        "bucket": "s3://assets/.objaverse/hf-objaverse-v1",
        "parent_bucket": "s3://assets/.objaverse",
    }[place]
    with caplog.at_level(logging.WARNING):
        records, left_out = library_records(LibraryConfig(source))
    assert [record.uid for record in records] == [UID]
    assert left_out == {OTHER: "not_downloaded"}
    assert "1 of 2 assets are not downloaded" in caplog.text
    render_without_ray(small_job(source), tmp_path / "views")
    assert set(all_rows(tmp_path / "views")["uid"].to_pylist()) == {UID}


def test_objaverse_without_any_file_is_told(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "object-paths.json.gz", "wt") as file:
        json.dump({UID: f"glbs/000-000/{UID}.glb"}, file)
    with pytest.raises(ValueError, match=r"^library: no asset is left of 1: {'not_downloaded': 1}"):
        library_records(LibraryConfig(str(tmp_path)))


def test_captions_come_from_a_uri_as_from_a_file(tmp_path: Path, loose: Path, listings: list[str]) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "captions.csv").write_text('lamps/001.glb,"a ""tall"" lamp, lit"\n')
    for source in (str(tmp_path / "words" / "captions.csv"), "s3://assets/words/captions.csv"):
        records = library_records(LibraryConfig(str(loose), captions=source))[0]
        assert {record.uid: record.captions for record in records}["lamps/001.glb"] == ("lamps", 'a "tall" lamp, lit')
    for source in (str(tmp_path / "none.csv"), "s3://assets/words/none.csv"):
        with pytest.raises(ValueError, match=r"^library.captions: there is no file "):
            library_records(LibraryConfig(str(loose), captions=source))
    (tmp_path / "words" / "captions.csv").write_bytes(b"\xff\xfe\x00")
    for source in (str(tmp_path / "words" / "captions.csv"), "s3://assets/words/captions.csv", str(tmp_path)):
        with pytest.raises(ValueError, match=r"^library.captions: cannot read "):
            library_records(LibraryConfig(str(loose), captions=source))
