"""A rendering job while its storage is away or its child is killed: nothing is lost, and no file blocks it for ever."""

import gzip
import inspect
import json
import multiprocessing
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_s3 import FakeS3, fake_s3
from gltf_writer import GltfWriter
from render_jobs import SMALL, InThisProcess, job_command, render_without_ray, run_here, small_job

from raydream.assets import remote_library
from raydream.assets.libraries import AssetRecord
from raydream.assets.remote_library import AssetFetcher
from raydream.config import strict_json
from raydream.store import faults as storage_faults
from raydream.store.storage import resolve
from raydream.views import pool as render_pool
from raydream.views import report as render_report
from raydream.views.child import ChildKilled
from raydream.views.folder import finished_shards, open_notes, read_shard_records
from raydream.views.plan import open_plan
from raydream.views.plan_rows import plan_rows
from raydream.views.report import write_job_report
from raydream.views.shard import ShardResult, ShardWorker

pytestmark = pytest.mark.slow

BUSY = 425  # passes, and pyarrow's client does not try it again itself, which takes it six seconds
UIDS = [f"box-{number}" for number in range(6)]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeS3]:
    """A bucket with a library of six GLBs in one folder, of two shards."""
    monkeypatch.setattr(storage_faults, "_FIRST_DELAY_S", 0.0)
    folder = tmp_path / "library"
    (folder / "boxes").mkdir(parents=True)
    for uid in UIDS:
        GltfWriter().save(folder / "boxes" / f"{uid}.glb")
    rows = [json.dumps({"uid": uid, "file": f"boxes/{uid}.glb", "caption": "a box"}) for uid in UIDS]
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    with fake_s3() as bucket:
        bucket.upload(folder, "library")
        yield bucket


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's storage is asked once."""
    monkeypatch.setattr(remote_library, "resolve", lambda uri, filesystem: resolve(uri, filesystem, 0.0))


class Run:
    """What one command does, without Ray; ``killed`` are the uids over which the child is killed from outside."""

    def __init__(self, source: str, out: str) -> None:
        self.config = small_job(source)
        self.files, self.out = resolve(out, None), out
        self.killed: set[str] = set()

    def __call__(self) -> dict[int, ShardResult]:
        plan = open_plan(self.files, self.config)
        worker = ShardWorker(self.out, plan, strict_json.dumps(self.config))
        worker._process = self  # type: ignore[assignment]
        noted = open_notes(self.files, plan)
        missing = set(range(plan.num_shards)) - finished_shards(self.files, plan).keys()
        results = {shard: worker.render(shard, shard in noted) for shard in sorted(missing)}
        self.report = write_job_report(self.files, plan, SMALL)
        return results

    def render(self, record: AssetRecord) -> pa.Table:
        if record.uid in self.killed:
            raise ChildKilled("its process ended with signal SIGKILL, 3 times")
        return InThisProcess().render(record)


def test_a_library_that_is_busy_gives_every_asset(s3: FakeS3, tmp_path: Path) -> None:
    render_without_ray(small_job(str(tmp_path / "library")), tmp_path / "here")
    count = iter(range(10**9))
    s3.refuse = lambda kind, key: BUSY if next(count) % 7 == 3 else 0
    run = Run(s3.uri("library"), s3.uri("out"))
    assert all(not result.open_because for result in run().values())
    assert run.report["objects"] == len(UIDS)
    for name in ("shard-00000.parquet", "shard-00001.parquet"):
        there = pq.read_table(pa.BufferReader(s3.objects[f"out/views/{name}"]))
        here = pq.read_table(tmp_path / "here" / "views" / name)
        assert there.drop_columns(["source_sha256"]).equals(here.drop_columns(["source_sha256"]))


@pytest.mark.usefixtures("impatient")
def test_a_library_that_is_away_leaves_shards_open_and_the_next_command_makes_them(s3: FakeS3, tmp_path: Path) -> None:
    run = Run(s3.uri("library"), str(tmp_path / "out"))
    plan = open_plan(run.files, run.config)
    s3.refuse = lambda kind, key: 0 if key.endswith("box-0.glb") else BUSY
    worker = ShardWorker(run.out, plan, strict_json.dumps(run.config))
    worker._process = run  # type: ignore[assignment]
    for shard in (0, 1):
        assert "does not answer" in worker.render(shard).open_because
    assert not (tmp_path / "out" / "rejected").exists()
    assert not (tmp_path / "out" / "views").exists()
    report = write_job_report(run.files, plan, SMALL)
    assert (report["objects"], report["open_shards"], report["rejected"]) == (0, 2, {})
    # still away the second time: the library does not answer either, so nobody is rejected
    assert all(worker.render(shard, was_open=True).open_because for shard in (0, 1))
    s3.refuse = lambda kind, key: 0
    assert all(not result.open_because for result in run().values())
    assert (run.report["objects"], run.report["open_shards"]) == (len(UIDS), 0)
    assert not list((tmp_path / "out" / "open").iterdir())


@pytest.mark.usefixtures("impatient")
def test_one_object_that_never_answers_is_rejected_by_the_second_command(s3: FakeS3, tmp_path: Path) -> None:
    run = Run(s3.uri("library"), str(tmp_path / "out"))
    s3.refuse = lambda kind, key: BUSY if key.endswith("box-4.glb") else 0
    first = run()
    assert (first[0].open_because, first[0].num_objects) == ("", 3)
    assert first[1].open_because.startswith("box-4: ")
    assert run.report["open_shards"] == 1
    second = run()
    assert set(second) == {1}
    assert run.report["rejected"] == {"unreadable": 1}
    assert (run.report["objects"], run.report["open_shards"]) == (5, 0)


def test_a_killed_child_leaves_its_shard_open_once(s3: FakeS3, tmp_path: Path) -> None:
    """Who was killed at the first command and not at the second is rendered; who was at both is rejected."""
    run = Run(str(tmp_path / "library"), str(tmp_path / "out"))
    run.killed = {"box-1", "box-2"}
    assert "SIGKILL" in run()[0].open_because
    assert (run.report["objects"], run.report["open_shards"], run.report["rejected"]) == (3, 1, {})
    run.killed = {"box-2"}
    assert run()[0].open_because == ""
    assert (run.report["objects"], run.report["rejected"]) == (5, {"killed": 1})


@pytest.mark.usefixtures("impatient")
def test_what_is_denied_is_rejected_only_where_the_library_is_not(s3: FakeS3, tmp_path: Path) -> None:
    run = Run(s3.uri("library"), str(tmp_path / "out"))
    plan = open_plan(run.files, run.config)
    worker = ShardWorker(run.out, plan, strict_json.dumps(run.config))
    worker._process = run  # type: ignore[assignment]
    s3.refuse = lambda kind, key: 403  # such as expired credentials
    assert "denied" in worker.render(0).open_because
    s3.refuse = lambda kind, key: 403 if key.endswith("box-1.glb") else 0
    run()
    assert run.report["rejected"] == {"access_denied": 1}


def test_a_disk_that_went_away_is_no_missing_file(s3: FakeS3, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "library"), str(tmp_path / "out"))
    plan = open_plan(run.files, run.config)
    worker = ShardWorker(run.out, plan, strict_json.dumps(run.config))
    worker._process = run  # type: ignore[assignment]
    (tmp_path / "library").rename(tmp_path / "elsewhere")
    (tmp_path / "library").mkdir()  # a mount point without its mount
    assert "not there any more" in worker.render(0).open_because
    (tmp_path / "library").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "library")
    run()
    assert run.report["objects"] == len(UIDS)


def test_an_output_that_cannot_be_written_leaves_the_shard_open(s3: FakeS3, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "library"), str(tmp_path / "out"))
    plan = open_plan(run.files, run.config)
    worker = ShardWorker(run.out, plan, strict_json.dumps(run.config))
    worker._process = run  # type: ignore[assignment]
    (tmp_path / "out" / "views").write_text("in the way")
    assert worker.render(0).open_because


# --- what a library and a report cost


def test_a_glb_costs_two_requests_and_no_listing(s3: FakeS3, tmp_path: Path) -> None:
    run = Run(s3.uri("library"), str(tmp_path / "out"))
    open_plan(run.files, run.config)
    s3.requests.clear()
    assert all(not result.open_because for result in run().values())
    once = {"HEAD": 5, "LIST": 4}  # whether the library is there, which a resumed job asks first
    assert s3.requests["GET"] == len(UIDS)
    assert s3.requests["HEAD"] - len(UIDS) <= once["HEAD"]
    assert s3.requests["LIST"] <= once["LIST"]


def test_an_asset_comes_with_what_it_names_and_nothing_else(s3: FakeS3) -> None:
    for name, data in {
        "obj/chair.obj": b"mtllib chair.mtl\nusemtl wood\nv 0 0 0\n",
        "obj/chair.mtl": b"newmtl wood\nmap_Kd -s 2 2 1 my wood.PNG\nmap_Ke C:\\here\\glow.png\nmap_d ../../up.png\n",
        "obj/My Wood.png": b"png",
        "obj/other.png": b"not named",
        "gltf/a.gltf": json.dumps({"buffers": [{"uri": "a%20b.bin"}], "images": [{"uri": "data:,x"}]}).encode(),
        "gltf/a b.bin": b"binary",
        "gltf/c.bin": b"not named",
        "ply/a.ply": b"ply\ncomment TextureFile skin.jpg\nend_header\n",
        "ply/skin.jpg": b"jpg",
    }.items():
        s3.objects[f"library/{name}"] = data
    fetcher = AssetFetcher()
    for name, expected, listings in (
        ("obj/chair.obj", {"chair.obj", "chair.mtl", "My Wood.png"}, 1),
        ("obj/chair.obj", {"chair.obj", "chair.mtl", "My Wood.png"}, 0),
        ("gltf/a.gltf", {"a.gltf", "a b.bin"}, 0),
        ("ply/a.ply", {"a.ply", "skin.jpg"}, 0),
    ):
        s3.requests.clear()
        with fetcher.local(AssetRecord("a", Path(name), root=s3.uri("library")), 2**20) as local:
            assert {path.name for path in local.path.parent.iterdir()} == expected
        assert s3.requests["LIST"] == listings, name


def test_a_report_costs_no_request_for_each_shard(s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard's summary is logged once, by the driver or by the first report; the sheet opens a few of them."""
    monkeypatch.setattr(render_report, "_SHEET_OBJECTS", 1)
    costs, reports = {}, {}
    for number in (2, 6):
        job = small_job(str(tmp_path / "library"), max_objects=number)
        job = strict_json.apply_overrides(job, ["pool.objects_per_shard=1"])
        files = resolve(s3.uri(f"out-{number}"), None)
        plan = render_without_ray(job, tmp_path / "unused", files)
        before = json.loads(files.read("report.json"))
        s3.requests.clear()
        reports[number] = write_job_report(files, plan, SMALL)
        costs[number] = s3.requests.total()
        assert reports[number] == before
    assert reports[6]["objects"] == 6
    assert costs[6] - costs[2] < 4  # not one for each of the four more


def objaverse_cache(folder: Path, num_uids: int, per_file: int) -> Path:
    """A cache as Objaverse's own client leaves it, with annotations of some KB as the real ones."""
    (folder / "metadata").mkdir(parents=True)
    paths = {f"{number:032x}": f"glbs/000-{number // per_file:03d}/{number:032x}.glb" for number in range(num_uids)}
    uids = list(paths)
    for shard, first in enumerate(range(0, num_uids, per_file)):
        tags = [
            {"name": f"tag {i}", "slug": f"tag-{i}", "uri": "https://api.sketchfab.com/v3/tags/x"} for i in range(9)
        ]
        about = {"tags": tags, "license": "by", "description": "words " * 100, "archives": {"glb": {"faceCount": 7}}}
        rows = {uid: about | {"name": f"thing {uid}"} for uid in uids[first : first + per_file]}
        (folder / "glbs" / f"000-{shard:03d}").mkdir(parents=True)
        for uid in rows:
            (folder / paths[uid]).touch()
        with gzip.open(folder / "metadata" / f"000-{shard:03d}.json.gz", "wt", compresslevel=1) as file:
            json.dump(rows, file)
    with gzip.open(folder / "object-paths.json.gz", "wt", compresslevel=1) as file:
        json.dump(paths, file)
    return folder


def peak_bytes_of_planning(cache: str, out: str) -> int:
    files, job = resolve(out, None), small_job(cache)
    tracemalloc.start()
    open_plan(files, job)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_a_library_is_never_held_whole(tmp_path: Path) -> None:
    """The driver's memory grows by an asset's path, not by its annotation and not by its record."""
    peaks = []
    with multiprocessing.get_context("spawn").Pool(1) as alone:  # here threads of tests before may be at work
        for num_uids in (1_000, 5_000):
            cache = objaverse_cache(tmp_path / f"cache-{num_uids}", num_uids, 200)
            out = str(tmp_path / f"out-{num_uids}")
            peaks.append(alone.apply(peak_bytes_of_planning, (str(cache), out)))
            files = resolve(out, None)
            plan = open_plan(files, small_job(str(cache)))
            assert plan.num_objects == num_uids
    assert (peaks[1] - peaks[0]) / 4_000 < 1000  # bytes for each
    first, last = (read_shard_records(files, plan, shard)[-1] for shard in (0, plan.num_shards - 1))
    assert (first.uid, last.uid) == (f"{2:032x}", f"{4_999:032x}")
    assert last.captions == (f"thing {4_999:032x}",)


def test_plan_keeps_the_first_by_uid_and_refuses_twins(tmp_path: Path) -> None:
    def record(uid: str) -> AssetRecord:
        return AssetRecord(uid, Path(f"{uid}.glb"))

    with plan_rows() as rows:
        for uid, reason in (("c", None), ("a", None), ("b", "licence"), ("d", None)):
            rows.add(record(uid), reason)
        rows.keep_first(2)
        assert [uid for uid, _ in rows.kept()] == ["a", "c"]
        assert dict(rows.left_out()) == {"b": "licence", "d": "max_objects"}
        assert rows.reasons() == {None: 2, "licence": 1, "max_objects": 1}
        assert rows.doubled() is None
        rows.add(record("a"), None)
        assert rows.doubled() == "a"


# --- the driver


def results(*told: str) -> Iterator[dict[str, object]]:
    for shard, because in enumerate(told):
        row = ShardResult(shard, 1, 0, 3, open_because=because)
        yield {name: getattr(row, name) for name in ShardResult.__dataclass_fields__}


class Quiet:
    """A progress that nobody sees."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.num_done = 0

    def phase(self, message: str) -> None:
        self.said.append(message)

    def update(self, step: int, values: dict[str, float]) -> None:
        self.num_done += 1


def test_a_driver_goes_on_after_one_open_shard_and_gives_up_after_many(tmp_path: Path) -> None:
    collect = inspect.unwrap(render_pool._collect)  # its progress is a stand-in
    log = render_pool.summary_log(resolve(str(tmp_path), None))
    quiet = Quiet()
    collect(results("", "away", "", ""), log, quiet, 0, 2)
    assert quiet.said == ["shard 1 stays open: away"]
    assert quiet.num_done == 3
    quiet = Quiet()
    collect(results("", "away", "still", "", ""), log, quiet, 0, 2)
    assert quiet.num_done == 1


def test_a_job_with_open_shards_says_so_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render_pool, "render_library", lambda config, out: {"open_shards": 2})
    assert run_here(monkeypatch, job_command(tmp_path / "out")) == 1
    assert "2 shards are open; the same command tries them again" in capsys.readouterr().err

    def away(config: object, out: str) -> None:
        raise storage_faults.StorageError("bucket/plan.parquet does not answer")

    monkeypatch.setattr(render_pool, "render_library", away)
    assert run_here(monkeypatch, job_command(tmp_path / "out")) == 1
    assert "does not answer; the same command goes on from here" in capsys.readouterr().err
