"""A storage that is busy or away: it is waited for, and nothing is taken for missing."""

import errno
import re
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_s3 import FakeS3, fake_s3

from raydream.store import faults as storage_faults
from raydream.store.faults import StorageError, is_passing, patiently
from raydream.store.run_folder import RunFolder
from raydream.store.storage import resolve

BUSY = 425  # passes, and pyarrow's client does not try it again itself, which takes it six seconds


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    monkeypatch.setattr(storage_faults, "_FIRST_DELAY_S", 0.0)
    with fake_s3() as bucket:
        yield bucket


def http_error(status: int) -> Exception:
    return urllib.error.HTTPError("http://x/y", status, "refused", None, None)  # type: ignore[arg-type]


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [
    OSError("AWS Error SLOW_DOWN during ListObjectsV2 operation: SlowDown"),
    OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body."),
    OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached"),
    OSError("google::cloud::Status(UNAVAILABLE: Connection reset by peer)"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
    TimeoutError("timed out"),
    ConnectionResetError("reset"),
    caused_by(FileNotFoundError("http://x/y"), ConnectionRefusedError("refused")),
])  # fmt: skip
def test_what_passes_by_itself_is_told(error: Exception) -> None:
    assert is_passing(error)


@pytest.mark.parametrize("error", [
    FileNotFoundError(errno.ENOENT, "Path does not exist 'bucket/Connection reset'"),
    PermissionError(errno.EACCES, "denied"),
    IsADirectoryError(errno.EISDIR, "is a directory"),
    OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
    OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."),
    OSError("AWS Error NO_SUCH_BUCKET during HeadObject operation"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("Unrecognized filesystem type in URI"),
])  # fmt: skip
def test_what_stays_is_told(error: Exception) -> None:
    assert not is_passing(error)


@pytest.mark.parametrize(("status", "passes"), [(503, True), (500, True), (429, True), (501, False), (404, False)])
def test_the_http_status_decides_whatever_the_class(status: int, passes: bool) -> None:
    assert is_passing(http_error(status)) is passes
    assert is_passing(caused_by(FileNotFoundError("http://x/y"), http_error(status))) is passes


def test_rays_own_reader_knows_the_same_faults() -> None:
    assert matches_any("AWS Error UNKNOWN (HTTP status 502) during GetObject operation: No response body.")
    assert matches_any("When reading: AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28")
    assert not matches_any("AWS Error UNKNOWN (HTTP status 404) during HeadObject operation: No response body.")


def matches_any(message: str) -> bool:
    return any(re.search(pattern, message) for pattern in storage_faults.PASSING_MESSAGES)


def test_waits_grow_and_end_with_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("raydream.store.faults.time.monotonic", lambda: now[0])
    monkeypatch.setattr("raydream.store.faults.time.sleep", sleep)

    def fail() -> None:
        raise ConnectionResetError("reset")

    with pytest.raises(StorageError, match=r"^bucket/key does not answer: reset"):
        patiently(fail, "bucket/key", 100.0)
    assert now[0] == pytest.approx(100.0)
    assert 4 <= len(waits) <= 20
    assert max(waits) <= 1.5 * 30
    assert waits[3] > waits[0]
    assert patiently(lambda: "whole" if now[0] > 175 else fail(), "bucket/key", 100.0) == "whole"


@pytest.mark.slow
def test_a_run_folder_lives_through_a_busy_store(s3: FakeS3) -> None:
    s3.refuse_first(5, BUSY)
    run = RunFolder.create(s3.uri("run"), "{}")
    for refusals, ask in (
        (2, lambda: run.write_bytes("previews/a.png", b"picture")),
        (2, lambda: run.commit_checkpoint(3, {"score": run.write_checkpoint_file(3, "score", b"state")})),
        (2, lambda: run.prune_checkpoints(1)),
        (1, run.close),
    ):
        s3.refuse_first(refusals, BUSY)
        ask()
    s3.refuse_first(4, BUSY)
    again = RunFolder.open(s3.uri("run"))
    assert again.read_bytes("previews/a.png") == b"picture"
    checkpoint = again.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.step == 3


@pytest.mark.slow
def test_a_store_that_answers_503_is_asked_longer_than_its_client_does(s3: FakeS3) -> None:
    """pyarrow gives up after 6 s and 31 requests; before, that was the end."""
    s3.objects["run/config.json"] = b"{}"
    s3.refuse_first(40, 503)
    assert RunFolder.open(s3.uri("run")).read_config() == "{}"


def test_a_store_that_is_away_is_no_damaged_checkpoint(s3: FakeS3) -> None:
    """An older checkpoint would throw steps away, and pruning would delete what cannot be seen."""
    run = RunFolder.create(s3.uri("run"), "{}")
    for step in (1, 2, 3):
        run.commit_checkpoint(step, {"score": run.write_checkpoint_file(step, "score", b"state")})
    before = dict(s3.objects)
    impatient = RunFolder.open(s3.uri("run"), patience_s=0.0)
    s3.refuse = lambda kind, key: BUSY if key.endswith(("step_00000003/score", "step_00000002/manifest.json")) else 0
    with pytest.raises(StorageError):
        impatient.latest_checkpoint()
    with pytest.raises(StorageError):
        impatient.prune_checkpoints(1)
    assert s3.objects == before


def test_what_is_missing_or_denied_is_not_waited_for(s3: FakeS3) -> None:
    files = resolve(s3.uri("run"), None)
    s3.objects["run/secret"] = b"secret"
    with pytest.raises(FileNotFoundError):
        files.read("absent")
    assert s3.requests.total() == 1
    s3.refuse = lambda kind, key: 403
    with pytest.raises(PermissionError, match="bucket/run/secret is denied"):
        files.read("secret")
    assert s3.requests.total() == 2


def test_http_by_fsspec_is_waited_for_too(s3: FakeS3) -> None:
    """It tells of every fault as of a missing file."""
    s3.objects["library/a.glb"] = b"glTF"
    s3.refuse_first(5, 503)
    web = resolve(f"fsspec+http://{s3.address}/bucket/library", None)
    assert web.read("a.glb", 100) == b"glTF"
    with pytest.raises(FileNotFoundError):
        web.read("b.glb", 100)


def test_a_parquet_file_is_read_by_parts_through_refusals(s3: FakeS3, tmp_path: Path) -> None:
    table = pq.read_table(_parquet(tmp_path / "a.parquet"))
    s3.objects["views/a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    file = pq.ParquetFile(resolve(s3.uri("views"), None).open("a.parquet"))
    for group in range(file.num_row_groups):
        s3.refuse_first(2, BUSY)
        assert file.read_row_group(group).equals(table.slice(10 * group, 10))
    local = resolve(str(tmp_path), None).open("a.parquet")
    assert pq.ParquetFile(local).read().equals(table)


def _parquet(path: Path) -> Path:
    pq.write_table(pa.table({"number": list(range(30))}), path, row_group_size=10)
    return path
