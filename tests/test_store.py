"""The run folder: whole files, checkpoints that exist or do not, metrics without doubles, and nothing outside it."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from raydream import storage
from raydream.store import (
    CONFIG,
    METRICS,
    FileDigest,
    RunFolder,
    checkpoint_file,
    digest,
    particle_file,
    preview_file,
)
from raydream.tensors import pack, unpack

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
        case "object_store":  # direct puts, as on s3 and gcs
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


# Creating and opening


def test_what_is_written_is_read_by_another_process(place):
    run = place.create()
    content = bytes(range(256)) * 5
    assert run.write_bytes(particle_file(3, "mesh.glb"), content) == digest(content)
    run.write_text(preview_file(7), "é")
    again = place.reopen()
    assert again.read_config() == CONFIG_JSON
    assert again.read_bytes("particles/003/mesh.glb") == content
    assert again.read_bytes("previews/step_00000007.png") == "é".encode()
    assert again.list_files("particles") == {"particles/003/mesh.glb": len(content)}
    assert again.list_files("tensorboard") == {}
    assert again.exists("particles/003/mesh.glb")
    assert not again.exists("particles/003")
    with pytest.raises(FileNotFoundError):
        again.read_bytes("report.html")


def test_a_file_is_replaced(place):
    run = place.create()
    run.write_text(preview_file(1), "long old content")
    run.write_text(preview_file(1), "new")
    assert run.read_bytes(preview_file(1)) == b"new"
    assert list(run.list_files("previews")) == [preview_file(1)]


def test_an_existing_run_is_not_overwritten(tmp_path):
    local(tmp_path)
    with pytest.raises(ValueError, match=r"^out: .*not empty"):
        RunFolder.create(str(tmp_path / "run"), "{}")
    mock = Place("bucket/run", fs._MockFileSystem())
    mock.create()
    with pytest.raises(ValueError, match=r"^out: .*not empty"):
        mock.create()
    assert json.loads(mock.reopen().read_config())


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    assert local(tmp_path).local_root == tmp_path / "run"


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create("runs/first", CONFIG_JSON)
    monkeypatch.chdir("/")
    assert RunFolder.open(run.uri).read_config() == CONFIG_JSON


@pytest.mark.parametrize("uri", ["a_file", "a_file/below", "/proc/raydream", "nosuchscheme://bucket/run", "\0"])
def test_an_output_that_cannot_be_written_is_refused_by_name(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("precious")
    with pytest.raises(ValueError, match=r"^out: "):
        RunFolder.create(uri, CONFIG_JSON)
    assert Path("a_file").read_text() == "precious"


@pytest.mark.parametrize(
    "uri", ["nothing", "empty", "a_file", "damaged", "cut_off", "not_an_object", "nosuchscheme://x"]
)
def test_what_is_no_run_folder_is_refused_by_name(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("precious")
    Path("empty").mkdir()
    for name, config in [("damaged", b"\xff\xfe"), ("cut_off", CONFIG_JSON[:9].encode()), ("not_an_object", b"[]")]:
        Path(name).mkdir()
        Path(name, CONFIG).write_bytes(config)
    with pytest.raises(ValueError, match=r"^resume: "):
        RunFolder.open(uri)


def test_a_local_run_folder_travels_to_another_process(tmp_path):
    run = local(tmp_path)
    pickle.loads(pickle.dumps(run)).write_text("versions.json", "{}")
    assert run.read_bytes("versions.json") == b"{}"


# Names


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "..",
        "../out",
        "a/../../out",
        "./a",
        "",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "x\n",
        "a b",
        "é",
        ".driver_lock",
        "~/a",
        "s3://bucket/a",
        "a" * 200,
    ],
)
def test_a_name_that_is_not_plain_is_refused(place, name):
    run = place.create()
    for call in (run.read_bytes, run.exists, run.list_files, lambda name: run.write_bytes(name, b"x")):
        with pytest.raises(ValueError, match=r"^name: "):
            call(name)


def test_no_link_leads_out_of_the_folder(tmp_path):
    run = local(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("secret")
    (tmp_path / "run" / "particles").symlink_to(tmp_path / "secret")
    (tmp_path / "run" / METRICS).symlink_to(tmp_path / "secret" / "file")
    for call in (
        lambda: run.write_bytes("particles/file", b"x"),
        lambda: run.read_bytes("particles/file"),
        lambda: run.list_files("particles"),
        lambda: run.append_metrics([{"step": 0}]),
        lambda: run.truncate_metrics(0),
    ):
        with pytest.raises(ValueError, match="out of the run folder"):
            call()
    assert (tmp_path / "secret" / "file").read_text() == "secret"
    assert os.listdir(tmp_path / "secret") == ["file"]


def test_a_run_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    local(tmp_path).write_text("versions.json", "{}")
    assert (tmp_path / "disk" / "versions.json").read_text() == "{}"


# Writes that are cut off


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch, call):
    run = local(tmp_path)
    run.write_text("versions.json", "old")

    def fail(*_arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(call, fail)
        with pytest.raises(OSError, match="no space"):
            run.write_text("versions.json", "new")
    assert run.read_bytes("versions.json") == b"old"
    assert sorted(os.listdir(tmp_path / "run")) == [CONFIG, "versions.json"]


def test_a_killed_writer_leaves_the_old_file_and_the_next_driver_tidies_up(tmp_path):
    run = local(tmp_path)
    run.write_text("versions.json", "old")
    script = (
        "import os, sys; from raydream.store import RunFolder\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "RunFolder.open(sys.argv[1]).write_text('versions.json', 'new')"
    )
    assert subprocess.run([sys.executable, "-c", script, run.uri]).returncode == -signal.SIGKILL
    assert run.read_bytes("versions.json") == b"old"
    assert len(list((tmp_path / "run").glob(".*.tmp"))) == 1
    with run.lock():
        assert not list((tmp_path / "run").glob(".*.tmp"))
        assert run.read_bytes("versions.json") == b"old"


@pytest.mark.parametrize("moment", ["open_output_stream", "move"])
def test_a_remote_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch, moment):
    place = Place("run", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    run = place.create()
    run.write_text("versions.json", "old")

    class Broken:
        def __getattr__(self, name):
            if name == moment:
                raise OSError("connection lost")
            return getattr(place.filesystem, name)

    monkeypatch.setattr(run._files, "filesystem", Broken())
    with pytest.raises(OSError, match="connection lost"):
        run.write_text("versions.json", "new")
    assert place.reopen().read_bytes("versions.json") == b"old"


# Metrics


def test_metrics_come_back_in_order(place):
    run = place.create()
    assert run.read_metrics() == []
    rows = [{"step": step, "rgb": step / 7, "stage": "nerf", "n": 8} for step in range(200)]
    for first in range(0, 200, 10):
        run.append_metrics(rows[first : first + 10])
    run.append_metrics([])
    assert run.read_metrics() == rows
    run.close()
    assert place.reopen().read_metrics() == rows
    assert [json.loads(line) for line in run.read_bytes(METRICS).splitlines()] == rows
    assert run.list_files("metrics.jsonl.parts") == {}


def test_numbers_that_json_lacks_become_null(place):
    run = place.create()
    run.append_metrics([{"step": 0, "a": float("nan"), "b": float("inf"), "c": 1.0}])
    assert run.read_metrics() == [{"step": 0, "a": None, "b": None, "c": 1.0}]


def test_a_resumed_run_has_no_doubles(place):
    run = place.create()
    run.append_metrics([{"step": step, "attempt": 1} for step in range(100)])
    run.commit_checkpoint(4, {"score": run.write_checkpoint_file(4, "score", b"x")})
    again = place.reopen()
    again.truncate_metrics(60)
    again.append_metrics([{"step": step, "attempt": 2} for step in range(60, 80)])
    again.close()
    rows = place.reopen().read_metrics()
    assert [row["step"] for row in rows] == list(range(80))
    assert [row["attempt"] for row in rows] == [1] * 60 + [2] * 20


def test_a_checkpoint_never_knows_more_than_the_metrics(place):
    run = place.create()
    run.append_metrics([{"step": 0}, {"step": 1}])
    save(run, 2)
    assert [row["step"] for row in place.reopen().read_metrics()] == [0, 1]  # run was never closed


@pytest.mark.parametrize("num_bytes", [1, 5, 12, 22, 23])
def test_a_line_cut_off_at_any_byte_is_dropped(tmp_path, num_bytes):
    run = local(tmp_path)
    run.append_metrics([{"step": 0, "rgb": 0.5}, {"step": 1, "rgb": 0.5}])
    assert (tmp_path / "run" / METRICS).stat().st_size == 2 * 24
    os.truncate(tmp_path / "run" / METRICS, 24 + num_bytes)
    again = RunFolder.open(run.uri)
    assert [row["step"] for row in again.read_metrics()] == [0]
    again.append_metrics([{"step": 1, "rgb": 0.25}])
    assert again.read_metrics() == [{"step": 0, "rgb": 0.5}, {"step": 1, "rgb": 0.25}]


def test_a_damaged_line_costs_only_itself(tmp_path, caplog):
    run = local(tmp_path)
    (tmp_path / "run" / METRICS).write_bytes(b'{"step": 0}\n\xff\x00{"st\n[1]\n{"rgb": 1}\n{"step": 4}\n')
    assert [row["step"] for row in run.read_metrics()] == [0, 4]
    assert caplog.text.count("damaged line") == 3


def test_a_merge_that_is_cut_off_doubles_nothing(monkeypatch):
    place = Place("run", fs._MockFileSystem())
    run = place.create()
    for step in range(3):
        run.append_metrics([{"step": step}])
        save(run, step)
    parts = run.list_files("metrics.jsonl.parts")
    assert len(parts) == 3

    def killed(_self, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(storage.RemoteFiles, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            run.close()
    again = place.reopen()
    assert again.exists(METRICS)
    assert again.list_files("metrics.jsonl.parts") == parts
    assert [row["step"] for row in again.read_metrics()] == [0, 1, 2]
    again.append_metrics([{"step": 3}])
    again.close()
    assert [row["step"] for row in place.reopen().read_metrics()] == [0, 1, 2, 3]


# Checkpoints


def test_a_checkpoint_exists_from_its_commit_on(place):
    run = place.create()
    assert run.latest_checkpoint() is None
    files = {name: run.write_checkpoint_file(5, name, name.encode()) for name in ("particle_000", "score")}
    assert place.reopen().latest_checkpoint() is None
    with pytest.raises(FileNotFoundError):
        run.read_checkpoint_file(5, "score")
    run.commit_checkpoint(5, files)
    again = place.reopen()
    assert again.latest_checkpoint().step == 5
    assert again.latest_checkpoint().files == files
    assert again.read_checkpoint_file(5, "score") == b"score"
    with pytest.raises(FileNotFoundError):
        again.read_checkpoint_file(5, "nothing")


def test_a_commit_of_what_is_not_there_is_refused(place):
    run = place.create()
    entry = run.write_checkpoint_file(5, "score", b"12345")
    with pytest.raises(OSError, match="particle_000 is missing"):
        run.commit_checkpoint(5, {"score": entry, "particle_000": entry})
    with pytest.raises(OSError, match="has 5 bytes, expected 6"):
        run.commit_checkpoint(5, {"score": FileDigest(6, entry.sha256)})
    assert run.latest_checkpoint() is None


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["score", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(
            b'{"step": 2, "files": {"../../../../etc/passwd": {"size_bytes": 1, "sha256": ""}}}'
        ),
        lambda path: path.write_bytes(b'{"step": 2, "files": {"score": 3}}'),
        lambda path: path.write_bytes(b'{"step": 1, "files": {}}'),
    ],
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, caplog, name, damage):
    run = local(tmp_path)
    save(run, 1)
    save(run, 2)
    damage(tmp_path / "run" / checkpoint_file(2, name))
    with caplog.at_level(logging.WARNING):
        assert run.latest_checkpoint().step == 1
    manifest_is_gone = not run.exists(checkpoint_file(2, "manifest.json"))
    assert ("checkpoint of step 2 is damaged" in caplog.text) != manifest_is_gone
    with pytest.raises((OSError, ValueError)):
        [run.read_checkpoint_file(2, name) for name in ("particle_000", "score")]


def test_a_checkpoint_that_is_being_replaced_is_not_half_trusted(place):
    run = place.create()
    save(run, 1)
    save(run, 2)
    run.write_checkpoint_file(2, "score", b"a second attempt, of which the driver died")
    assert place.reopen().latest_checkpoint().step == 1
    save(run, 2, b"third")
    assert place.reopen().latest_checkpoint().step == 2


def test_pruning_keeps_the_newest_whole_ones(place):
    run = place.create()
    for step in (1, 2, 3, 4):
        save(run, step)
    run.write_checkpoint_file(0, "score", b"of a driver that died")
    run.write_checkpoint_file(6, "score", b"being written")
    run.write_checkpoint_file(4, "score", b"cut off")
    run.prune_checkpoints(keep=2)
    steps = {int(name.split("/")[1].removeprefix("step_")) for name in run.list_files("checkpoints")}
    assert steps == {2, 3, 4, 6}
    assert place.reopen().latest_checkpoint().step == 3


def test_pruning_that_is_cut_off_leaves_no_checkpoint_rather_than_half_of_one(tmp_path, monkeypatch):
    run = local(tmp_path)
    save(run, 1)
    save(run, 2)

    def killed(_self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(storage.LocalFiles, "delete_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            run.prune_checkpoints(keep=1)
    assert not run.exists(checkpoint_file(1, "manifest.json"))
    run.prune_checkpoints(keep=1)
    assert run.list_files("checkpoints/step_00000001") == {}
    assert run.latest_checkpoint().step == 2


# Two drivers


def test_a_second_driver_is_refused(tmp_path):
    run = local(tmp_path)
    with run.lock():
        told = rf"^resume: .*in use by another driver: pid {os.getpid()} on "
        with pytest.raises(ValueError, match=told), RunFolder.open(run.uri).lock():
            pass
        RunFolder.open(run.uri).write_text("versions.json", "{}")  # actors may write
    with RunFolder.open(run.uri).lock():
        pass


def test_the_lock_of_a_killed_driver_is_free(tmp_path):
    run = local(tmp_path)
    script = (
        "import sys, time; from raydream.store import RunFolder\n"
        "with RunFolder.open(sys.argv[1]).lock():\n"
        "    print('locked', flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, run.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"pid {driver.pid} on "), run.lock():
            pass
    finally:
        driver.kill()
        driver.communicate()
    with run.lock():
        pass


# Arrays


def test_arrays_come_back_with_dtype_shape_and_metadata():
    arrays = {
        "table": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "step": np.array(7, dtype=np.int64),
        "generator": np.arange(256, dtype=np.uint8),
        "half": np.array([1.5, np.inf], dtype=np.float16),
        "empty": np.zeros((0, 3), dtype=bool),
    }
    back, metadata = unpack(pack(arrays, {"step": 7, "nested": {"prompt": "a é chair"}}))
    assert metadata == {"step": 7, "nested": {"prompt": "a é chair"}}
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].flags.writeable


def test_equal_arrays_give_equal_bytes():
    first = pack({"a": np.zeros(3), "b": np.ones(2, np.float32)}, {"x": 1, "y": 2})
    assert first == pack({"b": np.ones(2, np.float32), "a": np.zeros(3)}, {"y": 2, "x": 1})


@pytest.mark.parametrize(
    "damage", [lambda data: data[:7], lambda data: data[:-1], lambda data: b"\x80\x04pickle" + data]
)
def test_bytes_that_are_no_arrays_are_refused(damage):
    from safetensors import SafetensorError

    with pytest.raises(SafetensorError):
        unpack(damage(pack({"a": np.zeros(3)}, {})))


def test_the_run_folder_needs_no_torch():
    modules = "raydream.store, raydream.tensors, raydream.progress, raydream.distill.recovery, raydream.report"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
