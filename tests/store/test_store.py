"""The run folder: whole files, one driver, and nothing outside it."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs
from store_cases import CONFIG_JSON, Place, local

from raydream.store.run_folder import CONFIG, METRICS, RunFolder, digest, particle_file, preview_file
from raydream.store.tensors import pack, unpack

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
        "import os, sys; from raydream.store.run_folder import RunFolder\n"
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
        "import sys, time; from raydream.store.run_folder import RunFolder\n"
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
    arrays: dict[str, np.ndarray] = {
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
    modules = (
        "raydream.store, raydream.store.tensors, raydream.report.progress, raydream.distill.recovery, raydream.report"
    )
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
