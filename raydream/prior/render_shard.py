"""One shard of a rendering job: what a worker of the pool does, with or without Ray."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa

from raydream import config_io
from raydream.prior.asset_error import AssetError
from raydream.prior.asset_library import AssetRecord
from raydream.prior.assets import DEFAULT_LIMITS
from raydream.prior.remote_library import local_asset
from raydream.prior.render_child import RenderProcess
from raydream.prior.render_config import RenderJobConfig
from raydream.prior.views_folder import REJECTED_FOLDER, VIEWS, Files, Plan, read_shard_records, shard_name
from raydream.prior.views_schema import REJECTED, ShardBuffer, views_schema
from raydream.storage import resolve


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard; ``num_objects`` gave views."""

    shard: int
    num_objects: int
    num_rejected: int
    num_views: int
    duration_s: float


class ShardWorker:
    """Renders shard after shard with one child process; a plain callable, as Ray Data wants its actors to be."""

    def __init__(self, uri: str, plan: Plan, config_json: str) -> None:
        self._files: Files = resolve(uri, None)
        self._plan = plan
        self._config = config_io.loads(RenderJobConfig, config_json)
        self._process = RenderProcess(self._config.views, self._config.pool)

    def __call__(self, row: dict[str, int]) -> dict[str, float | int]:
        """Row ``{"shard": number}`` in, ``ShardResult`` as a row out. Doing a shard again gives the same rows."""
        return asdict(self.render(int(row["shard"])))

    def render(self, shard: int) -> ShardResult:
        """Writes the files of one shard, each in one piece: first what was rejected, then the views, which end it."""
        begin = time.monotonic()
        views = ShardBuffer(views_schema(self._config.views))
        rejected: list[dict[str, str]] = []
        num_objects = 0
        records = read_shard_records(self._files, self._plan, shard)
        for record, rows in self._rendered(records, rejected):
            assert rows.num_rows == self._config.views.num_views, record.uid
            views.append(rows)
            num_objects += 1
        refused = ShardBuffer(REJECTED)
        refused.append(pa.Table.from_pylist(rejected, REJECTED))
        self._files.write(shard_name(REJECTED_FOLDER, shard), refused.finish())
        self._files.write(shard_name(VIEWS, shard), views.finish())
        num_views = num_objects * self._config.views.num_views
        return ShardResult(shard, num_objects, len(rejected), num_views, time.monotonic() - begin)

    def close(self) -> None:
        """Ends the child process; without it the child ends with this process."""
        self._process.close()

    def _rendered(
        self, records: Iterable[AssetRecord], rejected: list[dict[str, str]]
    ) -> Iterable[tuple[AssetRecord, pa.Table]]:
        for record in records:
            try:
                with local_asset(record, DEFAULT_LIMITS.max_bytes) as local:
                    rows = self._process.render(local)
                yield record, rows
            except AssetError as error:
                rejected.append({"uid": record.uid, "reason": error.reason, "detail": error.detail})
