"""The rendering pool: Ray Data hands shards of a fixed plan to actors, which write them whole.

A shard's file is the record that it was done. So the rows are exactly-once whatever is killed: a lost actor's shard is
rendered again by Ray, a lost driver's by the next run of the same command, and neither can leave half a shard or two.
(Ray Data's own checkpoints know rows by an id and are written per block; a plan of shards needs neither.)
"""

import logging
from contextlib import ExitStack

import ray.data
from ray.data import ActorPoolStrategy, DataContext

from raydream import config_io
from raydream.connection import connect
from raydream.placement import Cluster
from raydream.prior.render_config import RenderJobConfig
from raydream.prior.render_plan import open_plan
from raydream.prior.render_report import write_report
from raydream.prior.render_shard import ShardWorker
from raydream.prior.views_folder import Plan, finished_shards
from raydream.progress import Progress
from raydream.storage import LocalFiles, resolve

_MAX_BLOCKS = 4096  # Ray Data's scheduler grows slow with many more


def render_library(config: RenderJobConfig, out: str) -> dict[str, object]:
    """Renders what is missing of a job in ``out``, a path or a ``pyarrow.fs`` URI; returns the report.

    Raises ValueError naming ``out`` or a field of ``library`` before anything is started.
    """
    try:
        files = resolve(out, None)
    except (OSError, ValueError) as error:
        raise ValueError(f"out: cannot reach {out!r}: {error}") from error
    plan = open_plan(files, config)
    with ExitStack() as stack:
        if isinstance(files, LocalFiles):
            stack.enter_context(files.lock())
            files.sweep_temporary()
        missing = sorted(set(range(plan.num_shards)) - finished_shards(files, plan))
        if missing:
            _render_shards(config, files.uri(out), plan, missing)
        return write_report(files, plan, config.views)


def _render_shards(config: RenderJobConfig, uri: str, plan: Plan, missing: list[int]) -> None:
    connect()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours counts views and knows what was done before
    most = config.pool.workers or max(1, int(Cluster.now().most().get("CPU", 1)))
    shards = ray.data.from_items(
        [{"shard": shard} for shard in missing], override_num_blocks=min(len(missing), _MAX_BLOCKS)
    )
    results = shards.map(
        ShardWorker,  # type: ignore[arg-type]  # a class is what Ray wants here, its hints know functions only
        fn_constructor_args=(uri, plan, config_io.dumps(config)),
        compute=ActorPoolStrategy(min_size=1, max_size=min(most, len(missing)), max_tasks_in_flight_per_actor=2),
        num_cpus=1,
    )
    done = plan.num_shards - len(missing)
    num_views = num_rejected = 0
    with Progress(plan.num_shards, done) as progress:
        progress.phase(f"{len(missing)} shards of {config.pool.objects_per_shard} objects, up to {most} workers")
        for row in results.iter_rows():
            num_views += row["num_views"]
            num_rejected += row["num_rejected"]
            progress.update(done, {"views": num_views, "rejected": num_rejected})
            done += 1
