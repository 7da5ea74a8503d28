"""Which asset goes into which shard: fixed once, before anything is rendered, so that a resumed job is the same job."""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raydream.assets import remote_library
from raydream.assets.exhibit import asset_folder
from raydream.assets.folder_library import check_library, names_below, read_library
from raydream.assets.libraries import (
    SUBSETS,
    AssetFilter,
    AssetRecord,
    parse_cap3d_captions,
    why_not,
    with_caption,
)
from raydream.assets.licences import count_licences, why_no_licence
from raydream.assets.procedural import PROCEDURAL, procedural_records
from raydream.assets.remote_library import as_remote, check_reachable, index_of, is_remote
from raydream.config import strict_json
from raydream.config.render import LibraryConfig, RenderJobConfig
from raydream.store.faults import StorageError
from raydream.store.storage import resolve
from raydream.views.folder import LEFT_OUT, PLAN, PLAN_ROWS_AT_ONCE, SETTINGS, Files, Plan, open_parquet
from raydream.views.plan_rows import PlanRows, plan_rows

_log = logging.getLogger(__name__)


def open_plan(files: Files, config: RenderJobConfig) -> Plan:
    """The plan in an output folder, made there if it is new.

    Raises ValueError naming ``out`` where the folder holds views of other settings or something else, or a field of
    ``library`` for what is wrong with that.
    """
    if files.exists(SETTINGS):
        _check_same(strict_json.loads(RenderJobConfig, files.read(SETTINGS).decode()), config)
        _check_reachable(config.library)  # a library that is not mounted would turn into a thousand missing files
    if not files.exists(PLAN):
        _make_plan(files, config)
    return Plan(open_parquet(files, PLAN).metadata.num_rows, config.pool.objects_per_shard)


@contextmanager
def library_rows(config: LibraryConfig) -> Iterator[PlanRows]:
    """The records to render and those that are left out.

    Raises ValueError naming ``library.source``, ``library.subsets`` or ``library.captions``.
    """
    captions = _read_captions(config.captions) if config.captions else {}
    licences: Counter[str] = Counter()
    with plan_rows() as rows:
        with _library(config) as (wanted, records):
            rule = _filter(config, wanted)
            for record in records:
                captioned = with_caption(record, captions.get(record.uid))
                licences.update(count_licences([record.licence]))
                rows.add(captioned, why_not(captioned, rule))
        doubled = rows.doubled()
        if doubled is not None:
            raise ValueError(f"library.source: uid {doubled!r} stands twice in it")
        if config.max_objects:
            rows.keep_first(config.max_objects)
        reasons = rows.reasons()
        if reasons["not_downloaded"]:
            _log.warning(
                "library: %d of %d assets are not downloaded; the plan is made of those that are",
                reasons["not_downloaded"],
                reasons.total(),
            )
        if not reasons.pop(None, 0):
            if set(reasons) == {"licence"}:
                raise ValueError(why_no_licence(licences, config.licences, "library.licences"))
            raise ValueError(f"library: no asset is left of {reasons.total()}: {dict(reasons)}")
        yield rows


@contextmanager
def _library(config: LibraryConfig) -> Iterator[tuple[frozenset[str], Iterable[AssetRecord]]]:
    """The uids that the subsets name, and all records of a library, one after the other."""
    if is_remote(config.source):
        with index_of(config.source) as index:
            wanted = _subset_uids(config, index)
            records = read_library(index, wanted, remote_library.remote_names(config.source))
            yield wanted, (as_remote(record, index, config.source) for record in records)
    else:
        folder = _library_folder(config)
        wanted = _subset_uids(config, folder)
        yield wanted, procedural_records() if folder is None else read_library(folder, wanted, names_below(folder))


def _read_captions(source: str) -> dict[str, str]:
    """The captions of a file or URI."""
    place, question, query = source.partition("?") if is_remote(source) else (source, "", "")
    folder, _, name = place.rpartition("/")
    try:
        if not is_remote(source):
            return parse_cap3d_captions(Path(source).expanduser().read_bytes())
        return parse_cap3d_captions(resolve(folder + question + query, None).read(name))
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"library.captions: there is no file {source}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"library.captions: cannot read {source}: {error}") from error


def _make_plan(files: Files, config: RenderJobConfig) -> None:
    with library_rows(config.library) as rows:
        if not files.exists(SETTINGS):
            try:
                files.make_empty_root()
            except StorageError:
                raise
            except OSError as error:
                raise ValueError(f"out: {error}") from error
            files.write(SETTINGS, strict_json.dumps(config).encode())
        files.write(LEFT_OUT, _parquet_bytes(("uid", "reason"), rows.left_out()))
        files.write(PLAN, _parquet_bytes(("uid", "record"), rows.kept()))  # last: the job begins when there is a plan


def _check_same(saved: RenderJobConfig, given: RenderJobConfig) -> None:
    old, new = strict_json.to_json(saved), strict_json.to_json(given)
    for part, settings in new.items():
        for name, value in settings.items():
            if value != old[part][name] and name != "workers":
                raise ValueError(
                    f"out: it holds views with {part}.{name}={old[part][name]!r}, not {value!r}; take another folder"
                )


def _check_reachable(config: LibraryConfig) -> None:
    if is_remote(config.source):
        check_reachable(config.source)
    elif folder := _library_folder(config):
        check_library(folder)


def _library_folder(config: LibraryConfig) -> Path | None:
    """Where the assets lie; None for procedural ones."""
    folder = asset_folder(config.source)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"library.source: there is no folder {folder}")
    return folder


def _subset_uids(config: LibraryConfig, folder: Path | None) -> frozenset[str]:
    """The uids that are in all subsets; empty where none is named."""
    if not config.subsets:
        return frozenset()
    path = None if folder is None else folder / SUBSETS
    if path is None or not path.is_file():
        raise ValueError(f"library.subsets: there is no {SUBSETS} in {folder or PROCEDURAL}")
    subsets = json.loads(path.read_text(encoding="utf-8"))
    for name in config.subsets:
        if name not in subsets:
            raise ValueError(f"library.subsets: no {name!r} in {path}; there are {', '.join(sorted(subsets))}")
    uids = frozenset.intersection(*(frozenset(subsets[name]) for name in config.subsets))
    if not uids:
        raise ValueError(f"library.subsets: no asset is in all of {', '.join(config.subsets)}")
    return uids


def _filter(config: LibraryConfig, uids: frozenset[str]) -> AssetFilter:
    return AssetFilter(
        uids=uids,
        any_tags=frozenset(config.any_tags),
        no_tags=frozenset(config.no_tags),
        licences=frozenset(config.licences),
        point_clouds=config.point_clouds,
        objects_only=config.objects_only,
        known_front_only=config.known_front_only,
        min_faces=config.min_faces or None,
        max_faces=config.max_faces or None,
        max_bytes=config.max_bytes or None,
    )


def _parquet_bytes(names: tuple[str, str], rows: Iterator[tuple[str, str]]) -> bytes:
    """Two columns of words, ``PLAN_ROWS_AT_ONCE`` rows in a group and in memory."""
    schema = pa.schema([(name, pa.string()) for name in names])
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        while some := list(itertools.islice(rows, PLAN_ROWS_AT_ONCE)):
            writer.write_table(pa.table(list(map(list, zip(*some))), schema=schema))
    return sink.getvalue().to_pybytes()
