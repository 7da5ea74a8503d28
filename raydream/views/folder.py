"""The folder that a rendering job fills: its files, and which of its shards are there."""

from dataclasses import dataclass

import pyarrow.parquet as pq

from raydream.assets.libraries import AssetRecord
from raydream.store.storage import LocalFiles, LocalLog, RemoteFiles, RemoteLog
from raydream.views.schema import record_from_json

SETTINGS, PLAN, LEFT_OUT = "settings.json", "plan.parquet", "left_out.parquet"
REPORT, SHEET = "report.json", "contact_sheet.png"
VIEWS, REJECTED_FOLDER, NOTES = "views", "rejected", "open"
SUMMARIES = "shards.jsonl"
PLAN_ROWS_AT_ONCE = 4096

Files = LocalFiles | RemoteFiles


@dataclass(frozen=True)
class Plan:
    """The assets of a job, by uid; shard ``i`` holds the ``i``-th ``objects_per_shard`` of them."""

    num_objects: int
    objects_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_objects // self.objects_per_shard)


def shard_name(folder: str, shard: int) -> str:
    """The file of a shard in the folder ``views`` or ``rejected``."""
    return f"{folder}/shard-{shard:05d}.parquet"


def note_name(shard: int) -> str:
    """The file that tells, of a shard that was left open, the uids of the assets that were in trouble."""
    return f"{NOTES}/shard-{shard:05d}.json"


def summary_log(files: Files) -> LocalLog | RemoteLog:
    """The driver's log of what came out of each shard: a line ``{"shard", "views", "rejected"}`` for each."""
    return LocalLog(files, SUMMARIES) if isinstance(files, LocalFiles) else RemoteLog(files, SUMMARIES)


def open_parquet(files: Files, name: str) -> pq.ParquetFile:
    """A Parquet file below a folder, of which only what is asked for is read."""
    return pq.ParquetFile(files.open(name))


def finished_shards(files: Files, plan: Plan) -> dict[int, int]:
    """The shards that are there and their sizes in bytes, by one listing; each was written whole, after the list of
    what it rejected.
    """
    there = files.sizes(VIEWS)
    names = {shard: shard_name("", shard)[1:] for shard in range(plan.num_shards)}
    return {shard: there[name] for shard, name in names.items() if name in there}


def open_notes(files: Files, plan: Plan) -> set[int]:
    """The shards that an earlier command left open with a note."""
    there = files.sizes(NOTES)
    return {shard for shard in range(plan.num_shards) if note_name(shard).removeprefix(f"{NOTES}/") in there}


def read_shard_records(files: Files, plan: Plan, shard: int) -> list[AssetRecord]:
    """The records of one shard; of the plan only the rows around them are read."""
    rows = open_parquet(files, PLAN)
    first, stop = shard * plan.objects_per_shard, (shard + 1) * plan.objects_per_shard
    groups = range(first // PLAN_ROWS_AT_ONCE, min(rows.num_row_groups, -(-stop // PLAN_ROWS_AT_ONCE)))
    lines = rows.read_row_groups(list(groups), columns=["record"])["record"]
    skipped = groups.start * PLAN_ROWS_AT_ONCE
    return [record_from_json(line.as_py()) for line in lines[first - skipped : stop - skipped]]
