"""Places where a run folder can lie, for the tests of the store."""

from pathlib import Path

import pytest
from pyarrow import fs

from raydream.store import storage
from raydream.store.run_folder import RunFolder

CONFIG_JSON = '{"prompt": "../../etc/passwd"}'


class Place:
    """A kind of storage to put a run folder on; ``reopen`` is what another process would do."""

    def __init__(self, uri: str, filesystem: fs.FileSystem | None = None) -> None:
        self.uri = uri
        self.filesystem = filesystem

    def create(self) -> RunFolder:
        return RunFolder.create(self.uri, CONFIG_JSON, self.filesystem)

    def reopen(self) -> RunFolder:
        return RunFolder.open(self.uri, self.filesystem)


@pytest.fixture(params=["path", "file_uri", "mock", "subtree", "object_store"])
def place(request, tmp_path, monkeypatch) -> Place:
    match request.param:
        case "path":
            return Place(str(tmp_path / "run"))
        case "file_uri":
            return Place((tmp_path / "a run").as_uri())
        case "mock":
            return Place("bucket/run", fs._MockFileSystem())
        case "subtree":
            return Place("run", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
        case _:  # an object store: direct puts, as on s3 and gcs
            monkeypatch.setattr(storage, "_ATOMIC_PUT", frozenset({"mock"}))
            filesystem = fs._MockFileSystem()
            for folder in ("", "/checkpoints", "/metrics.jsonl.parts", "/particles/003", "/previews"):
                filesystem.create_dir("bucket/run" + folder, recursive=True)  # a bucket needs no folders
            for step in range(10):
                filesystem.create_dir(f"bucket/run/checkpoints/step_{step:08d}")
            monkeypatch.setattr(storage.RemoteFiles, "make_empty_root", lambda _self: None)
            return Place("bucket/run", filesystem)


def save(run: RunFolder, step: int, content: bytes = b"state") -> None:
    """A checkpoint of two actors."""
    files = {name: run.write_checkpoint_file(step, name, content + name.encode()) for name in ("particle_000", "score")}
    run.commit_checkpoint(step, files)


def local(tmp_path: Path) -> RunFolder:
    return RunFolder.create(str(tmp_path / "run"), CONFIG_JSON)
