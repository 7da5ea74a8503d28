"""One shard of a rendering job: what a worker of the pool does, with or without Ray.

A rejection is for good, so it tells of the asset alone. What may be somebody else's fault, a storage that is away or a
child that was killed from outside, leaves the shard open instead: nothing is written but a note of the asset, and the
next command tries again. Who is in trouble for a second time, and its library answers, is rejected then, as
``unreadable`` or ``killed``: one file must not keep a shard open for ever.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from raydream.assets.error import AssetError, loses_colours
from raydream.assets.load import DEFAULT_LIMITS
from raydream.assets.remote_library import AssetFetcher, check_reachable, is_remote
from raydream.config import strict_json
from raydream.config.render import RenderJobConfig
from raydream.store.faults import StorageError
from raydream.store.storage import resolve
from raydream.views.child import ChildKilled, RenderProcess
from raydream.views.folder import REJECTED_FOLDER, VIEWS, Files, Plan, note_name, read_shard_records, shard_name
from raydream.views.schema import REJECTED, WARNED_COLUMNS, ShardBuffer, views_schema, warned_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard; ``num_objects`` gave views. One that is open, for the reason told, wrote nothing.

    ``rejected_json`` counts the rejections by their reasons, ``warned_json`` holds ``warned_of`` the rows.
    """

    shard: int
    num_objects: int
    num_rejected: int
    num_views: int
    rejected_json: str = "{}"
    warned_json: str = "{}"
    open_because: str = ""


class ShardWorker:
    """Renders shard after shard with one child process; a plain callable, as Ray Data wants its actors to be."""

    def __init__(self, uri: str, plan: Plan, config_json: str) -> None:
        self._files: Files = resolve(uri, None)
        self._plan = plan
        self._config = strict_json.loads(RenderJobConfig, config_json)
        self._process = RenderProcess(self._config.views, self._config.pool)
        self._fetcher = AssetFetcher()

    def __call__(self, row: dict[str, int]) -> dict[str, float | int | str]:
        """Row ``{"shard": number, "was_open": 0 or 1}`` in, ``ShardResult`` as a row out. Doing a shard again gives the
        same rows.
        """
        return asdict(self.render(int(row["shard"]), bool(row["was_open"])))

    def render(self, shard: int, was_open: bool = False) -> ShardResult:
        """Writes the files of one shard, each in one piece: first what was rejected, then the views, which end it.

        ``was_open``: an earlier command left a note of it.
        """
        try:
            return self._render(shard, was_open)
        except OSError as error:  # of the plan or the output: nothing was lost, and all of it is made again
            return ShardResult(shard, 0, 0, 0, open_because=str(error))

    def close(self) -> None:
        """Ends the child process; without it the child ends with this process."""
        self._process.close()

    def _render(self, shard: int, was_open: bool) -> ShardResult:
        views = ShardBuffer(views_schema(self._config.views))
        rejected: list[dict[str, str]] = []
        trouble: dict[str, str] = {}
        suspects = frozenset(json.loads(self._files.read(note_name(shard)))) if was_open else frozenset()
        told: list[pa.Table] = []
        for rows in self._rendered(shard, suspects, rejected, trouble):
            views.append(rows)
            told.append(rows.select(WARNED_COLUMNS).slice(0, 1))
        if trouble:
            self._files.write(note_name(shard), json.dumps(sorted(suspects | trouble.keys())).encode())
            first = next(f"{uid}: {told}" for uid, told in trouble.items())
            return ShardResult(shard, 0, 0, 0, open_because=first)
        refused = ShardBuffer(REJECTED)
        refused.append(pa.Table.from_pylist(rejected, REJECTED))
        self._files.write(shard_name(REJECTED_FOLDER, shard), refused.finish())
        self._files.write(shard_name(VIEWS, shard), views.finish())
        if was_open:
            self._files.delete(note_name(shard))
        num_views = len(told) * self._config.views.num_views
        reasons = json.dumps(Counter(row["reason"] for row in rejected))
        warned = json.dumps(warned_of(pa.concat_tables(told)) if told else {})
        return ShardResult(shard, len(told), len(rejected), num_views, reasons, warned)

    def _rendered(
        self, shard: int, suspects: frozenset[str], rejected: list[dict[str, str]], trouble: dict[str, str]
    ) -> Iterator[pa.Table]:
        """The rows of each asset; fills ``rejected``, and ``trouble``: uid to what happened, which keeps it open."""
        for record in read_shard_records(self._files, self._plan, shard):
            try:
                with self._fetcher.local(record, DEFAULT_LIMITS.max_bytes) as local:
                    rows = self._process.render(local)
                assert rows.num_rows == self._config.views.num_views, record.uid
                warnings = rows["warnings"][0].as_py()
                if not self._config.library.colour_warnings and loses_colours(warnings):
                    raise AssetError("colours_lost", "; ".join(warnings)[:300])
                yield rows
            except AssetError as error:
                if error.reason == "missing_file" and not self._library_is_there():
                    trouble[record.uid] = "its library is not there any more"
                    return
                rejected.append({"uid": record.uid, "reason": error.reason, "detail": error.detail})
            except (ChildKilled, StorageError) as error:
                is_killed = isinstance(error, ChildKilled)
                if record.uid in suspects and self._library_is_there():
                    reason = "killed" if is_killed else "unreadable"
                    rejected.append({"uid": record.uid, "reason": reason, "detail": str(error)[:300]})
                    continue
                trouble[record.uid] = str(error)
                if not is_killed:  # each of the others would wait as long
                    return

    def _library_is_there(self) -> bool:
        """Whether the library answers, or the disk that it lies on has not gone from under it."""
        source = self._config.library.source
        try:
            if is_remote(source):
                check_reachable(source)
                return True
            folder = Path(source).expanduser()
            return not folder.is_absolute() or any(folder.iterdir())
        except (OSError, ValueError) as error:
            _log.warning("%s", error)
            return False
