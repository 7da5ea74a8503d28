"""Asset libraries behind a URI: the same rows as from the folder itself, and nothing read outside of it."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from gltf_writer import GltfWriter
from pyarrow import fs
from render_jobs import library_records, render_without_ray, small_job

from raydream.assets import remote_library
from raydream.assets.error import AssetError
from raydream.assets.libraries import AssetRecord
from raydream.assets.remote_library import AssetFetcher
from raydream.config.render import LibraryConfig
from raydream.store.storage import LocalFiles, RemoteFiles

MIB = 2**20


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A GLB, a glTF with its buffer beside it, and rows about a missing file and one outside."""
    folder = tmp_path / "library"
    (folder / "boxes").mkdir(parents=True)
    GltfWriter().save(folder / "boxes" / "box.glb")
    (folder / "plain").mkdir()
    writer = GltfWriter()
    writer.root["buffers"][0] = {"byteLength": len(writer.binary), "uri": "plain.bin"}
    (folder / "plain" / "plain.bin").write_bytes(bytes(writer.binary))
    (folder / "plain" / "plain.gltf").write_text(json.dumps(writer.root))
    (tmp_path / "secret.glb").write_bytes((folder / "boxes" / "box.glb").read_bytes())
    files = {"a": "boxes/box.glb", "b": "plain/plain.gltf", "c": "boxes/absent.glb", "d": "../secret.glb"}
    rows = [json.dumps({"uid": uid, "file": file, "caption": "a box"}) for uid, file in files.items()]
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    (folder / "subsets.json").write_text(json.dumps({"good": ["a", "b"]}))
    return folder


@pytest.fixture(params=["file_uri", "bucket"])
def uri(request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library as a ``file://`` URI, and as a bucket of a filesystem that is not the local one."""
    if request.param == "file_uri":
        return library.as_uri()
    bucket = fs.SubTreeFileSystem(str(library.parent), fs.LocalFileSystem())

    def resolve(uri: str, filesystem: fs.FileSystem | None) -> LocalFiles | RemoteFiles:
        assert (uri, filesystem) == ("s3://assets", None)
        return RemoteFiles(bucket, library.name)

    monkeypatch.setattr(remote_library, "resolve", resolve)
    return "s3://assets"


def test_a_uri_gives_the_rows_of_the_folder(uri: str, library: Path, tmp_path: Path) -> None:
    names = ["uid", "view", "captions", "source_sha256", "c2w", "rgb", "alpha", "ccm"]
    tables = []
    for place, source in (("here", str(library)), ("there", uri)):
        render_without_ray(small_job(source, subsets=("good",)), tmp_path / place)
        tables.append(pq.read_table(tmp_path / place / "views", columns=names))
    assert tables[0].num_rows > 0
    assert tables[0].equals(tables[1])


def test_what_is_missing_outside_or_too_large_is_left_out(uri: str) -> None:
    records = {record.uid: record for record in library_records(LibraryConfig(uri))[0]}
    assert set(records) == set("abcd")
    for uid, reason in (("c", "missing_file"), ("d", "outside_folder")):
        with pytest.raises(AssetError, match=reason), AssetFetcher().local(records[uid], MIB):
            pass
    with pytest.raises(AssetError, match="too_large"), AssetFetcher().local(records["a"], 10):
        pass
    with AssetFetcher().local(records["a"], MIB) as local:
        assert [path.name for path in local.path.parent.iterdir()] == ["box.glb"]
    assert not local.path.exists()


def test_a_local_record_is_itself(tmp_path: Path) -> None:
    record = AssetRecord("a", tmp_path / "a.glb")
    with AssetFetcher().local(record, MIB) as local:
        assert local is record


def test_a_uri_without_a_library_is_named(tmp_path: Path) -> None:
    for source in (tmp_path.as_uri(), "nowhere://at/all"):
        with pytest.raises(ValueError, match=r"^library.source: cannot read "):
            library_records(LibraryConfig(source))
