"""What a rendering job leaves for the person: counts of everything that was dropped, and a sheet of pictures."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from raydream.config.render import ImageKind, ViewConfig
from raydream.views.folder import (
    LEFT_OUT,
    REJECTED_FOLDER,
    REPORT,
    SHEET,
    VIEWS,
    Files,
    Plan,
    finished_shards,
    open_parquet,
    shard_name,
    summary_log,
)
from raydream.views.schema import WARNED_COLUMNS, decode_image, warned_of

_SHEET_OBJECTS, _SHEET_WIDTH_PX, _SHEET_TILE_PX = 48, 1600, 128
_GREY = 0.75
_FILES_AT_ONCE = 16
_NAMED_OBJECTS, _TOLD_OBJECTS = 100, 3  # of each kind of warning, in the report and in the line at the end


def write_job_report(files: Files, plan: Plan, config: ViewConfig) -> dict[str, object]:
    """Counts the rows that are there, writes ``report.json`` and the contact sheet, returns the report.

    Costs a listing and the log of summaries; only a shard that this lacks is opened. ``open_shards`` are those that
    are still to be made.
    """
    left_out = Counter(open_parquet(files, LEFT_OUT).read(["reason"])["reason"].to_pylist())
    done = finished_shards(files, plan)
    rejected: Counter[str] = Counter()
    warned: dict[str, list[str]] = {}
    num_views = 0
    for summary in _summaries(files, list(done)):
        rejected.update(summary["rejected"])
        for word, objects in summary.get("warned", {}).items():  # an older version did not count them
            warned.setdefault(word, []).extend(objects)
        num_views += summary["views"]
    report: dict[str, object] = {
        "objects": num_views // config.num_views,
        "views": num_views,
        "bytes": sum(done.values()),
        "planned": plan.num_objects,
        "open_shards": plan.num_shards - len(done),
        "rejected": dict(rejected.most_common()),
        "left_out_by_filters": dict(left_out.most_common()),
        "warnings": {
            word: {"objects": len(objects), "first": objects[:_NAMED_OBJECTS]}
            for word, objects in sorted(warned.items(), key=lambda item: -len(item[1]))
        },
    }
    files.write(REPORT, json.dumps(report, indent=2).encode())
    if num_views:
        files.write(SHEET, contact_sheet(files, list(done), config))
    return report


def warning_line(report: dict[str, Any]) -> str:
    """What a person is told at the end of assets that were not read whole; empty where there are none."""
    words = []
    for word, told in report["warnings"].items():
        some = told["first"][:_TOLD_OBJECTS] + ["..."] * (told["objects"] > _TOLD_OBJECTS)
        words.append(f"{word} {told['objects']} ({', '.join(some)})")
    return f"of {report['objects']} assets some were not read whole: {'; '.join(words)}" if words else ""


def summary_line(shard: int, num_views: int, rejected: dict[str, int], warned: dict[str, list[str]]) -> bytes:
    """A shard's line in the log of summaries."""
    row = {"shard": shard, "views": num_views, "rejected": rejected, "warned": warned}
    return json.dumps(row).encode() + b"\n"


def _summaries(files: Files, done: list[int]) -> list[dict[str, Any]]:
    """What came out of each shard, by the log; what a driver that was killed did not write down there is added."""
    log = summary_log(files)
    told = {row["shard"]: row for row in map(json.loads, log.read().splitlines())}
    untold = [shard for shard in done if shard not in told]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        lines = list(pool.map(lambda shard: _line_of(files, shard), untold))
    if lines:
        log.append(b"".join(lines))
    log.close()
    told |= {row["shard"]: row for row in map(json.loads, lines)}
    return [told[shard] for shard in done]


def _line_of(files: Files, shard: int) -> bytes:
    """The line of a shard by its files."""
    reasons = open_parquet(files, shard_name(REJECTED_FOLDER, shard)).read(["reason"])["reason"].to_pylist()
    views = open_parquet(files, shard_name(VIEWS, shard))
    warned = warned_of(views.read(WARNED_COLUMNS)) if "warnings" in views.schema_arrow.names else {}
    return summary_line(shard, views.metadata.num_rows, dict(Counter(reasons)), warned)


def contact_sheet(files: Files, done: list[int], config: ViewConfig) -> bytes:
    """A PNG of objects from all over the job, each by one of its views in every kind of image there is."""
    strips = [_strip(row, config) for row in _samples(files, done, config)]
    per_line = max(1, _SHEET_WIDTH_PX // strips[0].shape[1])
    blank = np.full_like(strips[0], 255)
    strips += [blank] * (-len(strips) % per_line)
    lines = [np.concatenate(strips[i : i + per_line], axis=1) for i in range(0, len(strips), per_line)]
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(lines)).save(sink, "png")
    return sink.getvalue()


def _samples(files: Files, done: list[int], config: ViewConfig) -> Iterator[dict[ImageKind, np.ndarray]]:
    """One view each of objects that lie evenly in the plan: another view for each, so that all sides are seen."""
    some = done[:: max(1, len(done) // _SHEET_OBJECTS)]
    per_shard = -(-_SHEET_OBJECTS // len(some))
    number = 0
    for shard in some:
        rows = open_parquet(files, shard_name(VIEWS, shard))
        groups = range(0, rows.num_row_groups, max(1, rows.num_row_groups // per_shard))
        for group in groups[:per_shard]:
            table = rows.read_row_group(group, columns=list(config.images))
            if not table.num_rows:
                continue
            view = number % table.num_rows
            yield {kind: table[kind].combine_chunks().to_numpy_ndarray()[view] for kind in config.images}
            number += 1


def _strip(row: dict[ImageKind, np.ndarray], config: ViewConfig) -> np.ndarray:
    """The images of one view side by side as display bytes."""
    alpha = decode_image("alpha", row["alpha"]) if "alpha" in row else None
    tiles = []
    for kind in config.images:
        image = decode_image(kind, row[kind])
        match kind:
            case "rgb" | "lit" if alpha is not None:
                image = image + (1 - alpha) * _GREY
            case "normal":
                image = (image + 1) / 2
            case "depth":
                image = np.where(image > 0, 1.2 - image / max(1e-6, 1.25 * float(image.max())), 0)
        tile = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
        tile = np.broadcast_to(tile, (*tile.shape[:2], 3))
        size = (_SHEET_TILE_PX, _SHEET_TILE_PX)
        tiles.append(np.asarray(Image.fromarray(np.ascontiguousarray(tile)).resize(size, Image.Resampling.BOX)))
    return np.concatenate(tiles, axis=1)
