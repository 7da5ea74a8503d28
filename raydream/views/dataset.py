"""Rendered views for training: the rows of the shards. Needs neither Ray nor torch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydream.config import strict_json
from raydream.config.render import RenderJobConfig, ViewConfig
from raydream.store.faults import StorageError
from raydream.store.storage import resolve
from raydream.views.folder import PLAN, SETTINGS, VIEWS, Files, Plan, finished_shards, open_parquet, shard_name
from raydream.views.schema import ADDED_LATER, views_schema

_SHARDS_AT_ONCE = 16  # a footer of an object store's file is two small requests: the wait is what it costs
Column = np.ndarray | list[Any]


def open_job(uri: str) -> tuple[Files, Plan, RenderJobConfig]:
    """A finished job's folder. Raises ValueError naming ``views`` where there is none or shards are missing."""
    try:
        files = resolve(uri, None)
        config = strict_json.loads(RenderJobConfig, files.read(SETTINGS).decode())
        plan = Plan(open_parquet(files, PLAN).metadata.num_rows, config.pool.objects_per_shard)
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"views: no rendering job in {uri!r}: {error}") from error
    num_missing = plan.num_shards - len(finished_shards(files, plan))
    if num_missing:
        raise ValueError(
            f"views: {num_missing} of {plan.num_shards} shards are missing in {uri!r}; finish the job first"
        )
    return files, plan, config


def iterate_views(uri: str, columns: Sequence[str] = ()) -> Iterator[dict[str, Column]]:
    """The rows of one object after the other, by uid: arrays ``[view, ...]`` for numbers and images, else lists.

    ``columns`` empty means all; what an older version did not write is None. Raises ValueError naming ``views`` or
    ``columns``.
    """
    files, plan, _ = open_job(uri)
    for shard in range(plan.num_shards):
        with naming(files, shard):
            rows = open_parquet(files, shard_name(VIEWS, shard))
        absent = [name for name in columns if name not in rows.schema_arrow.names]
        for name in absent:
            if name not in ADDED_LATER:
                raise ValueError(f"columns: no {name!r} in {uri!r}; there are {', '.join(rows.schema_arrow.names)}")
        for group in range(rows.num_row_groups):
            with naming(files, shard):
                table = rows.read_row_group(group, columns=[name for name in columns if name not in absent] or None)
            if table.num_rows:
                values = {name: values_of(table[name].combine_chunks()) for name in table.column_names}
                yield values | {name: [None] * table.num_rows for name in absent}


def iterate_cards(uri: str, columns: Sequence[str], others: Sequence[str] = ()) -> Iterator[list[dict[str, Any]]]:
    """What some columns say of the objects, shard by shard, each from its first view. Rows of an older version go
    without those that were added later; ``others`` must be there, but are not read.

    Raises ValueError naming ``views`` and the file of a shard that is broken or not as its job writes it.
    """
    files, plan, config = open_job(uri)

    def read(shard: int) -> list[dict[str, Any]]:
        with naming(files, shard):
            rows = open_parquet(files, shard_name(VIEWS, shard))
            _check_footer(rows, config.views, (*columns, *others), files.path(shard_name(VIEWS, shard)))
            table = rows.read([name for name in columns if name in rows.schema_arrow.names])
        return table.to_pylist()[:: config.views.num_views]

    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        yield from pool.map(read, range(plan.num_shards))


def check_shards(uri: str, columns: Sequence[str]) -> None:
    """Reads every shard's footer; ValueError as ``iterate_cards`` raises it."""
    for _ in iterate_cards(uri, (), columns):
        pass


def _check_footer(rows: pq.ParquetFile, views: ViewConfig, columns: Sequence[str], name: Path | str) -> None:
    expected, found = views_schema(views), rows.schema_arrow
    for column in columns:
        if column in ADDED_LATER and column not in found.names:
            continue
        kind = found.field(column).type if column in found.names else "missing"
        if kind != expected.field(column).type:
            raise ValueError(
                f"views: column {column!r} of {name} is {kind}, not {expected.field(column).type}; delete the file and "
                "run its rendering job again"
            )
    for group in range(rows.num_row_groups):
        num_rows = rows.metadata.row_group(group).num_rows
        if num_rows not in (0, views.num_views):
            raise ValueError(
                f"views: {name} has {num_rows} views of an object, its job renders {views.num_views}; delete the file "
                "and run that job again"
            )


@contextmanager
def naming(files: Files, shard: int) -> Iterator[None]:
    """A shard that cannot be read is named by its file; StorageError where perhaps only its storage is away."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"views: {files.path(shard_name(VIEWS, shard))} cannot be read ({' '.join(str(error).split())}); if it is "
            "broken, delete it and run its rendering job again"
        ) from error


def values_of(column: pa.Array) -> Column:
    """Numbers and images as arrays, words as lists."""
    if isinstance(column, pa.FixedShapeTensorArray):
        return column.to_numpy_ndarray()
    if isinstance(column, pa.ExtensionArray):  # Ray's own tensors
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy()
    return column.to_pylist()
