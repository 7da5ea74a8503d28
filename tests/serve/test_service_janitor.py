"""What leaves the disk, and what never does."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from pyarrow import fs
from service_cases import REQUEST, ROOMY, epoch_of, small_settings

from raydream.store.run_folder import CHECKPOINTS, RunFolder, checkpoint_file
from raydream.store.storage import LocalFiles, RemoteFiles
from serve.files import GenerationFiles, is_for_want_of_room
from serve.janitor import Janitor
from serve.records import Records
from serve.settings import Settings

DAY_S = 86_400.0
NOBODY: frozenset[str] = frozenset()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small_settings(tmp_path / "data")


@pytest.fixture
def records(settings: Settings, clock: Clock) -> Records:
    Path(settings.data).mkdir()
    return Records(settings.database_url, clock)


def made(records: Records, settings: Settings, state: str = "finished", num_bytes: int = 10) -> str:
    """A generation in a state, with a run folder, a checkpoint and something in the cache."""
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    attempt = records.take_up(record, epoch_of(records))
    run = RunFolder.create(settings.run_uri(record.id), "{}")
    run.write_bytes("particles/000/mesh.glb", bytes(num_bytes))
    run.commit_checkpoint(3, {"score.safetensors": run.write_checkpoint_file(3, "score.safetensors", b"large")})
    cached = settings.cache / record.id
    cached.mkdir(parents=True)
    (cached / "archive.zip").write_bytes(b"PK")
    if state == "cancelled":
        records.cancel(record.id)
    elif state != "running":
        records.end(record.id, attempt or 0, state, {})
    return record.id


def janitor_of(records: Records, settings: Settings, clock: Clock) -> Janitor:
    return Janitor(records, settings, GenerationFiles(settings), clock)


def folders(settings: Settings) -> set[str]:
    return {path.name for place in ("runs", "cache") for path in (Path(settings.data) / place).iterdir()}


def has_checkpoint(settings: Settings, generation_id: str) -> bool:
    return RunFolder.open(settings.run_uri(generation_id)).exists(checkpoint_file(3, "score.safetensors"))


def test_what_was_deleted_leaves_the_disk_and_nothing_else_does(
    records: Records, settings: Settings, clock: Clock
) -> None:
    kept, deleted, running = (made(records, settings, state) for state in ("finished", "finished", "running"))
    assert records.delete(deleted)
    assert not records.delete(running)
    janitor_of(records, settings, clock).sweep(NOBODY)
    assert folders(settings) == {kept, running}
    assert records.deleting() == []
    assert records.get(deleted) is None


def test_what_somebody_works_at_is_left_until_he_lets_go(records: Records, settings: Settings, clock: Clock) -> None:
    generation = made(records, settings, "cancelled")
    records.delete(generation)
    janitor = janitor_of(records, settings, clock)
    janitor.sweep(frozenset((generation,)))
    assert folders(settings) == {generation}
    with RunFolder.open(settings.run_uri(generation)).lock():
        janitor.sweep(NOBODY)
        assert folders(settings) == {generation}
    janitor.sweep(NOBODY)
    assert folders(settings) == set()


def test_a_link_leads_nowhere(records: Records, settings: Settings, clock: Clock, tmp_path: Path) -> None:
    precious, generation = tmp_path / "precious", made(records, settings)
    shutil.move(settings.run_uri(generation), precious)
    Path(settings.run_uri(generation)).symlink_to(precious)
    records.delete(generation)
    janitor_of(records, settings, clock).sweep(NOBODY)
    assert (precious / "config.json").is_file()
    assert records.deleting() == [generation]


def test_checkpoints_go_at_the_end_or_after_a_week_where_they_may_be_gone_on_from(
    records: Records, settings: Settings, clock: Clock
) -> None:
    ids = {state: made(records, settings, state) for state in ("finished", "failed", "cancelled", "running")}

    def left() -> set[str]:
        return {state for state, generation in ids.items() if has_checkpoint(settings, generation)}

    keeping = dataclasses.replace(settings, keep_checkpoints=True)
    janitor_of(records, keeping, clock).sweep(NOBODY)
    assert left() == set(ids)
    janitor = janitor_of(records, settings, clock)
    janitor.sweep(NOBODY)
    assert left() == {"failed", "cancelled", "running"}
    clock.now_s += 8 * DAY_S
    janitor.sweep(NOBODY)
    assert left() == {"running"}
    assert folders(settings) == set(ids.values())


def test_what_is_too_old_goes(records: Records, settings: Settings, clock: Clock) -> None:
    old, running = made(records, settings), made(records, settings, "running")
    clock.now_s += 2 * DAY_S
    young = made(records, settings)
    clock.now_s += 1.5 * DAY_S
    janitor_of(records, settings, clock).sweep(NOBODY)
    assert folders(settings) == {old, young, running}, "without a limit all stays"
    janitor_of(records, dataclasses.replace(settings, keep_days=3), clock).sweep(NOBODY)
    assert folders(settings) == {young, running}


def test_of_too_much_the_oldest_end_goes_first(
    records: Records, settings: Settings, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.janitor._GIB", 1000)
    running = made(records, settings, "running", num_bytes=600)
    ended = []
    for _ in range(3):
        clock.now_s += 1
        ended.append(made(records, settings, num_bytes=200))
    janitor_of(records, dataclasses.replace(settings, keep_gib=1), clock).sweep(NOBODY)
    assert folders(settings) == {running, ended[2]}


def test_traces_of_what_was_deleted_go_after_a_day(records: Records, settings: Settings, clock: Clock) -> None:
    records.delete(made(records, settings))
    janitor = janitor_of(records, settings, clock)
    janitor.sweep(NOBODY)
    clock.now_s += DAY_S + 1
    janitor.sweep(NOBODY)
    with records._engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM generations").scalar_one() == 0


def test_other_storage_is_cleared_away_too(
    records: Records, settings: Settings, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = made(records, settings)
    storage = fs.LocalFileSystem()
    monkeypatch.setattr("serve.files.resolve", lambda uri, _filesystem: RemoteFiles(storage, uri))
    files = GenerationFiles(settings)
    files.delete_checkpoints(generation)
    assert not (Path(settings.run_uri(generation)) / CHECKPOINTS).exists()
    files.delete_checkpoints(generation)
    files.delete(generation)
    files.delete(generation)
    assert folders(settings) == set()


def test_a_full_disk_can_be_cleared(records: Records, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the lock's own text has no room."""
    generation = made(records, settings)

    def full(_files: LocalFiles) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFiles, "lock", full)
    GenerationFiles(settings).delete(generation)
    assert folders(settings) == set()


def test_room_is_told_in_words_without_paths(settings: Settings, records: Records) -> None:
    assert GenerationFiles(dataclasses.replace(settings, min_free_mib=0)).want_of_room() == ""
    words = GenerationFiles(dataclasses.replace(settings, min_free_mib=2**40)).want_of_room()
    assert words.startswith("waiting for room on the service's disk: ")
    assert settings.data not in words


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (ValueError("particle 0: OSError: [Errno 28] No space left on device: 'x'"), True),
        (OSError(13, "Permission denied"), False),
        (ValueError("no"), False),
    ],
)
def test_which_errors_are_for_want_of_room(error: Exception, expected: bool) -> None:
    assert is_for_want_of_room(error) is expected
    wrapped = RuntimeError("it failed")
    wrapped.__cause__ = error
    assert is_for_want_of_room(wrapped) is expected
