"""The rendering job as a command: killed and taken up again, and what it says of bad input."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from render_jobs import ROOT, all_rows, job_command, render_without_ray, run_here, small_job


def descendants(words: str) -> list[int]:
    """Processes below this one whose title begins so."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    ours, found = {os.getpid()}, []
    while more := {pid for pid, parent in parents.items() if parent in ours and pid not in ours}:
        ours |= more
    for pid in ours:
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(words.encode()):
                found.append(pid)
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.ray
def test_killed_driver_and_killed_worker_leave_no_trace_in_the_rows(tmp_path, monkeypatch):
    """SIGKILL to the driver after its first shard, to a worker in the second run; a third run has nothing to do."""
    whole = tmp_path / "whole"
    render_without_ray(small_job(), whole)
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(job_command(out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    shards = out / "views"
    wait_for(lambda: shards.is_dir() and list(shards.glob("*.parquet")))
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    num_done = len(list(shards.glob("*.parquet")))
    assert 1 <= num_done < 16
    assert not (out / "report.json").exists()
    second = subprocess.Popen(job_command(out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    victims: list[int] = []
    wait_for(lambda: victims.extend(descendants("ray::MapWorker(Map(ShardWorker))")) or victims)
    wait_for(lambda: len(list(shards.glob("*.parquet"))) > num_done)
    os.kill(victims[0], signal.SIGKILL)
    _, stderr = second.communicate(timeout=200)
    assert second.returncode == 0, stderr.decode()
    assert json.loads((out / "report.json").read_text())["views"] == 96 * 3
    assert all_rows(out).equals(all_rows(whole))
    assert b"left" in stderr  # of the time
    assert not list(out.rglob(".*.tmp"))
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert run_here(monkeypatch, job_command(out)) == 0
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_job_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    for words in (["--set", "views.sed=1"], ["--assets", "/nonexistent"], ["--recipe", "cmc"], ["--subset", "x"]):
        assert run_here(monkeypatch, [*job_command(tmp_path / "out"), *words]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
