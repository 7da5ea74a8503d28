"""Metrics without doubles, and checkpoints that exist or do not."""

import json
import logging
import os
from pathlib import Path

import pytest
from pyarrow import fs
from store_cases import Place, local, save

from raydream.store import storage
from raydream.store.run_folder import METRICS, FileDigest, RunFolder, checkpoint_file

pytestmark = pytest.mark.slow

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
