"""Rendering jobs in little: without Ray and without a child process, or as the command in this process."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydream.assets.libraries import AssetRecord
from raydream.backend import load_backend
from raydream.config import strict_json
from raydream.config.render import LibraryConfig, PoolConfig, RenderJobConfig, ViewConfig
from raydream.store.storage import resolve
from raydream.views import command as command_line
from raydream.views.folder import Plan
from raydream.views.plan import library_rows, open_plan
from raydream.views.render import render_record
from raydream.views.report import write_job_report
from raydream.views.schema import record_from_json
from raydream.views.shard import ShardWorker

ROOT = Path(__file__).resolve().parents[2]
SMALL = ViewConfig(num_views=3, image_px=16, distance=(1.5, 1.9))
BACKEND = load_backend("auto", "cpu")


def small_job(source: str = "procedural", **library: Any) -> RenderJobConfig:
    return RenderJobConfig(SMALL, LibraryConfig(source, **library), PoolConfig(workers=2, objects_per_shard=3))


def library_records(config: LibraryConfig) -> tuple[list[AssetRecord], dict[str, str]]:
    """The records to render, by uid, and the uids that were left out with the reason of each; for small libraries."""
    with library_rows(config) as rows:
        return [record_from_json(line) for _, line in rows.kept()], dict(rows.left_out())


class InThisProcess:
    """Stands for a ``RenderProcess`` where the child itself is not what is tested: starting one takes seconds."""

    def render(self, record: AssetRecord) -> pa.Table:
        return render_record(record, SMALL, BACKEND)

    def close(self) -> None:
        pass


def render_without_ray(config: RenderJobConfig, out: Path, files=None, child: bool = False) -> Plan:
    files = files or resolve(str(out), None)
    plan = open_plan(files, config)
    worker = ShardWorker(str(out), plan, strict_json.dumps(config))
    worker._files = files
    if not child:
        worker._process = InThisProcess()  # type: ignore[assignment]
    try:
        for shard in range(plan.num_shards):
            worker({"shard": shard, "was_open": 0})
    finally:
        worker.close()
    write_job_report(files, plan, config.views)
    return plan


def all_rows(out: Path) -> pa.Table:
    return pq.read_table(out / "views")


def job_command(out: Path, *more: str) -> list[str]:
    settings = ["views.image_px=16", "views.num_views=3", "views.distance=[1.5, 1.9]", "pool.objects_per_shard=6"]
    words = [word for setting in (*settings, *more) for word in ("--set", setting)]
    job = [sys.executable, str(ROOT / "jobs" / "render_ccm.py"), "--assets", "procedural", "--workers", "2"]
    return [*job, "--out", str(out), *words]


def run_here(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> int:
    """The job's exit code, without a process of its own."""
    return command_line.main("the job", command[2:])
