"""The rendering pool: Ray Data hands shards of a fixed plan to actors, which write them whole.

A shard's file is the record that it was done. So the rows are exactly-once whatever is killed: a lost actor's shard is
rendered again by Ray, a lost driver's by the next run of the same command, and neither can leave half a shard or two.
(Ray Data's own checkpoints know rows by an id and are written per block; a plan of shards needs neither.)
"""

import json
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, DataContext

from raydream.cluster.connection import connect
from raydream.cluster.placement import Cluster
from raydream.config import strict_json
from raydream.config.render import RenderJobConfig
from raydream.report.progress import Progress
from raydream.store.faults import StorageError
from raydream.store.storage import LocalFiles, LocalLog, RemoteLog, resolve
from raydream.views.folder import Files, Plan, finished_shards, open_notes, summary_log
from raydream.views.plan import open_plan
from raydream.views.report import summary_line, warning_line, write_job_report
from raydream.views.shard import ShardWorker

_log = logging.getLogger(__name__)

_MAX_BLOCKS = 4096  # Ray Data's scheduler grows slow with many more


def render_library(config: RenderJobConfig, out: str) -> dict[str, object]:
    """Renders what is missing of a job in ``out``, a path or a ``pyarrow.fs`` URI; returns the report.

    Where its ``open_shards`` is not 0 the same call tries those again. Raises ValueError naming ``out`` or a field of
    ``library`` before anything is started, OSError where a storage is away or a disk full for now.
    """
    try:
        files = resolve(out, None)
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"out: cannot reach {out!r}: {error}") from error
    plan = open_plan(files, config)
    with ExitStack() as stack:
        if isinstance(files, LocalFiles):
            stack.enter_context(files.lock())
            files.sweep_temporary()
            out = str(files.root)  # absolute: another process has another working directory
        missing = sorted(set(range(plan.num_shards)) - finished_shards(files, plan).keys())
        if missing:
            _render_shards(config, files, out, plan, missing)
        report = write_job_report(files, plan, config.views)
        if line := warning_line(report):
            _log.warning(line)
        return report


def _render_shards(config: RenderJobConfig, files: Files, uri: str, plan: Plan, missing: list[int]) -> None:
    """Renders shards and logs what came out of each."""
    connect()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours counts views and knows what was done before
    most = config.pool.workers or max(1, int(Cluster.now().most().get("CPU", 1)))
    noted = open_notes(files, plan)
    shards = ray.data.from_items(
        [{"shard": shard, "was_open": int(shard in noted)} for shard in missing],
        override_num_blocks=min(len(missing), _MAX_BLOCKS),
    )
    results = shards.map(
        ShardWorker,  # type: ignore[arg-type]  # a class is what Ray wants here, its hints know functions only
        fn_constructor_args=(uri, plan, strict_json.dumps(config)),
        compute=ActorPoolStrategy(min_size=1, max_size=min(most, len(missing)), max_tasks_in_flight_per_actor=2),
        num_cpus=1,
    )
    with Progress(plan.num_shards, plan.num_shards - len(missing)) as progress:
        progress.phase(f"{len(missing)} shards of {config.pool.objects_per_shard} objects, up to {most} workers")
        _collect(results.iter_rows(), summary_log(files), progress, plan.num_shards - len(missing), 2 * most)


def _collect(
    rows: Iterable[dict[str, Any]], log: LocalLog | RemoteLog, progress: Progress, num_done: int, most_in_a_row: int
) -> None:
    """Logs each shard that is done and says of each that stays open why.

    So many in a row that stay open are no longer the fault of single assets, and the rest is not tried.
    """
    num_views = num_rejected = num_in_a_row = 0
    try:
        for row in rows:
            if row["open_because"]:
                progress.phase(f"shard {row['shard']} stays open: {row['open_because']}")
                num_in_a_row += 1
                if num_in_a_row == most_in_a_row:
                    progress.phase(f"{num_in_a_row} shards in a row stay open; the others are not tried")
                    break
                continue
            num_in_a_row = 0
            num_views, num_rejected = num_views + row["num_views"], num_rejected + row["num_rejected"]
            reasons, warned = json.loads(row["rejected_json"]), json.loads(row["warned_json"])
            log.append(summary_line(row["shard"], row["num_views"], reasons, warned))
            progress.update(num_done, {"views": num_views, "rejected": num_rejected})
            num_done += 1
    finally:
        log.flush()
