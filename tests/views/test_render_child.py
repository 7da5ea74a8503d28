"""The process that reads strangers' files: its rows, its limits, and what is told when it dies."""

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from raydream.assets.error import AssetError
from raydream.assets.libraries import AssetRecord
from raydream.assets.procedural import procedural_records
from raydream.backend import load_backend
from raydream.config.render import PoolConfig, ViewConfig
from raydream.views.child import _AWAY, ChildKilled, RenderProcess, _last_words
from raydream.views.render import render_record
from raydream.views.schema import record_from_json, record_to_json

pytestmark = pytest.mark.slow

SMALL = ViewConfig(num_views=3, image_px=16, distance=(1.5, 1.9))
BACKEND = load_backend("auto", "cpu")
CHAIR = next(record for record in procedural_records() if record.uid == "chair-0")
ENDLESS = ViewConfig(num_views=10_000, image_px=64, images=("alpha",))  # minutes of work on one asset


@pytest.fixture
def process() -> Iterator[Callable[[ViewConfig, PoolConfig], RenderProcess]]:
    made: list[RenderProcess] = []

    def make(views: ViewConfig, pool: PoolConfig) -> RenderProcess:
        made.append(RenderProcess(views, pool))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_record_survives_the_way_to_a_child():
    record = AssetRecord("u", Path("/a/ü b.glb"), ('x, "y"\n',), ("t",), licence="CC0-1.0", num_faces=3)
    line = record_to_json(record)
    assert "\n" not in line
    assert record_from_json(line) == record


def test_killed_child_is_not_seen_in_the_rows(process):
    renderer = process(SMALL, PoolConfig())
    first = renderer.render(CHAIR)
    os.kill(renderer._process.pid, signal.SIGKILL)
    assert renderer.render(CHAIR).equals(first)
    assert first.equals(render_record(CHAIR, SMALL, BACKEND))


def test_asset_that_takes_too_long_is_tried_once_and_the_next_goes_on(process, monkeypatch):
    started: list[object] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: started.append(words) or popen(*words, **more))
    renderer = process(ENDLESS, PoolConfig(asset_limit_s=1))
    with pytest.raises(AssetError) as caught:
        renderer.render(CHAIR)
    assert caught.value.reason == "timeout"
    assert len(started) == 1
    with pytest.raises(AssetError, match="missing_file"):
        renderer.render(AssetRecord("gone", Path("/nonexistent.glb")))


@contextmanager
def killing_every_child(renderer: RenderProcess, number: int) -> Iterator[None]:
    """Sends a signal to whatever child the renderer has, until the end of the block."""
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.05):
            child = renderer._process
            if child is not None and child.poll() is None:
                os.kill(child.pid, number)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        done.set()
        killer.join()


def test_asset_whose_process_dies_twice_is_rejected(process):
    renderer = process(ENDLESS, PoolConfig())
    with killing_every_child(renderer, signal.SIGSEGV), pytest.raises(AssetError) as caught:
        renderer.render(CHAIR)
    assert caught.value.reason == "crashed"
    assert "SIGSEGV" in caught.value.detail


def test_kills_from_outside_say_nothing_of_the_asset(process, monkeypatch):
    monkeypatch.setattr("raydream.views.child._PAUSES_S", (0.0, 0.0))
    renderer = process(ENDLESS, PoolConfig())
    with killing_every_child(renderer, signal.SIGKILL), pytest.raises(ChildKilled, match="SIGKILL, 3 times"):
        renderer.render(CHAIR)


def test_a_disk_that_is_away_is_no_missing_file(monkeypatch):
    def away(path: Path, **_more: object) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(Path, "stat", away)
    with pytest.raises(OSError, match="not connected") as caught:
        render_record(AssetRecord("a", Path("/mnt/a.glb")), SMALL, BACKEND)
    assert _last_words(caught.value)[0] == _AWAY


def test_asset_that_needs_too_much_memory_is_rejected(process):
    renderer = process(replace(ENDLESS, image_px=512, supersample=1, num_views=4000), PoolConfig(asset_memory_gb=0.5))
    with pytest.raises(AssetError) as caught:
        renderer.render(CHAIR)
    assert caught.value.reason == "out_of_memory"


def test_memory_of_a_child_stays_flat(process):
    renderer = process(replace(SMALL, image_px=64), PoolConfig())
    resident = []
    for _ in range(3):
        for record in procedural_records()[::4]:
            renderer.render(record)
        pages = int(Path(f"/proc/{renderer._process.pid}/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert resident[2] - resident[0] < 16, resident
