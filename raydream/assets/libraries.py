"""Which assets there are: readers of a manifest folder, of the Objaverse layout and of caption files, and filters."""

import csv
import gzip
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from raydream.assets.licences import is_accepted, spdx_licence
from raydream.store.faults import StorageError

MANIFEST, SUBSETS = "manifest.jsonl", "subsets.json"
OBJECT_PATHS, LVIS, METADATA = "object-paths.json.gz", "lvis-annotations.json.gz", "metadata"
FRONTS = "fronts.json"
_MARKED_FRONTS = Path(__file__).with_name("marked_fronts.json")
FRONT_AXES = ("+Z", "+X", "-Z", "-X")
POINT_CLOUD_WORDS = frozenset({"pointcloud", "point-cloud", "point cloud", "lidar"})


@dataclass(frozen=True)
class AssetRecord:
    """What is known of an asset before its file is opened. ``front_axis``, one of ``FRONT_AXES``, is where the file's
    front looks (None: unknown or symmetric); a loaded asset is turned so that its front looks along +Z, as in glTF.

    ``licence`` is an SPDX identifier where the source's word for it is known. ``nouns`` are category words that name
    the object. ``path`` is relative to ``root`` where that, a ``pyarrow.fs`` URI, is not empty. A download that is not
    complete knows of assets whose file ``is_there`` not.
    """

    uid: str
    path: Path
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    licence: str | None = None
    category: str | None = None
    front_axis: str | None = None
    split: str | None = None
    sha256: str | None = None
    num_faces: int | None = None
    num_bytes: int | None = None
    is_object: bool = True
    is_colourless: bool = False
    is_there: bool = True
    root: str = ""


@dataclass(frozen=True)
class AssetFilter:
    """Which records to keep; None or empty means no condition. A figure that a record does not state passes."""

    uids: frozenset[str] = frozenset()
    any_tags: frozenset[str] = frozenset()
    no_tags: frozenset[str] = frozenset()
    licences: frozenset[str] = frozenset()
    point_clouds: bool = False
    objects_only: bool = True
    known_front_only: bool = False
    min_faces: int | None = None
    max_faces: int | None = None
    max_bytes: int | None = None


def read_manifest_folder(folder: Path) -> list[AssetRecord]:
    """The records of a folder with a ``manifest.jsonl``, by uid; ValueError naming ``assets`` if it is broken.

    A front that the manifest does not tell, or tells wrongly, may stand in a ``fronts.json`` beside it: uid -> axis, or
    null for none. Raydream brings such marks for the public assets that it is trained on.
    """
    fronts = read_fronts(_MARKED_FRONTS) | (read_fronts(folder / FRONTS) if (folder / FRONTS).is_file() else {})
    records = []
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"assets: no {MANIFEST} in {folder}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            records.append(_manifest_record(folder, row, fronts))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"assets: line {number} of {path} is not a manifest row: {error!r}") from error
    return sorted(records, key=lambda record: record.uid)


def read_fronts(path: Path) -> dict[str, str | None]:
    """uid -> the axis that an object's front looks along; ValueError naming ``assets`` where the file is another."""
    try:
        fronts = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"assets: {path} is not an object of uid: axis ({error})") from error
    for uid, axis in fronts.items():
        _check_axis(axis, f"{path}, {uid}")
    return fronts


def _check_axis(axis: str | None, place: str) -> str | None:
    if axis is not None and axis not in FRONT_AXES:
        raise ValueError(f"assets: front_axis in {place} must be one of {', '.join(FRONT_AXES)} or null, got {axis!r}")
    return axis


def _manifest_record(folder: Path, row: dict, fronts: Mapping[str, str | None]) -> AssetRecord:
    captions = [row.get("caption_colour"), row.get("caption"), row.get("name")]
    return AssetRecord(
        uid=row["uid"],
        path=folder / row["file"],
        captions=tuple(dict.fromkeys(caption for caption in captions if caption)),
        tags=tuple(tag.lower() for tag in row.get("tags", [])),
        nouns=tuple(_category_word(category) for category in row.get("lvis", [])),
        colours=tuple(name for name, _ in row.get("colours", [])),
        licence=spdx_licence(row.get("license")),
        category=row.get("category"),
        front_axis=_check_axis(fronts.get(row["uid"], row.get("front_axis")), row["uid"]),
        split=row.get("split"),
        sha256=row.get("sha256"),
        num_faces=row.get("triangles"),
        num_bytes=row.get("bytes"),
        is_object=row.get("split") != "negative",
        is_colourless=bool(row.get("colourless")),
    )


def iterate_objaverse_folder(
    folder: Path, uids: frozenset[str] = frozenset(), names_in: Callable[[str], Iterable[str]] | None = None
) -> Iterator[AssetRecord]:
    """The records of an Objaverse 1.0 cache (``object-paths``, ``metadata``, ``lvis-annotations``, ``glbs``).

    One metadata file after the other, of which each holds thousands: all of them take 8 GB. With ``uids`` only those,
    and only the metadata files of their folders are opened. ``names_in`` lists a folder of GLBs, to tell those that are
    there; without it all are. Captions are names and tags; add Cap3D's by ``with_caption``. ValueError names
    ``assets`` where the folder is not in this layout.
    """
    try:
        paths: dict[str, str] = _read_json_gz(folder / OBJECT_PATHS)
        lvis: dict[str, list[str]] = _read_json_gz(folder / LVIS) if (folder / LVIS).is_file() else {}
        shards: dict[str, list[str]] = {}
        for uid, path in paths.items():
            if not uids or uid in uids:
                shards.setdefault(path.split("/")[1], []).append(uid)
        categories: dict[str, list[str]] = {}
        for category, members in lvis.items():
            for uid in members:
                categories.setdefault(uid, []).append(_category_word(category))
        for shard, members in sorted(shards.items()):
            metadata = folder / METADATA / f"{shard}.json.gz"
            annotations: dict[str, dict] = _read_json_gz(metadata) if metadata.is_file() else {}
            home = posixpath.dirname(paths[members[0]])
            there = None if names_in is None else {f"{home}/{name}" for name in names_in(home)}
            for uid in members:
                record = _objaverse_record(folder, uid, paths[uid], annotations.get(uid, {}), categories.get(uid, []))
                yield replace(record, is_there=there is None or paths[uid] in there)
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"assets: {folder} is not in the Objaverse layout: {error!r}") from error


def _objaverse_record(folder: Path, uid: str, path: str, annotation: dict, nouns: list[str]) -> AssetRecord:
    # ``faceCount`` counts the source's polygons; the triangles of the GLB are under ``archives``.
    glb = annotation.get("archives", {}).get("glb", {})
    return AssetRecord(
        uid=uid,
        path=folder / path,
        captions=tuple(caption for caption in [annotation.get("name")] if caption),
        tags=tuple(tag["name"].lower() for tag in annotation.get("tags", [])),
        nouns=tuple(nouns),
        licence=spdx_licence(annotation.get("license")),
        category=next((category["name"] for category in annotation.get("categories", [])), None),
        num_faces=glb.get("faceCount") or annotation.get("faceCount"),
        num_bytes=glb.get("size"),
    )


def parse_cap3d_captions(content: bytes) -> dict[str, str]:
    """uid -> caption from a CSV of two columns without a header, as Cap3D publishes it; ValueError where it is none."""
    try:
        lines = io.StringIO(content.decode(), newline="")
        return {row[0]: row[1] for row in csv.reader(lines) if len(row) == 2}
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from error


def with_caption(record: AssetRecord, caption: str | None) -> AssetRecord:
    """The record with one more caption, where there is one."""
    return record if caption is None else replace(record, captions=(*record.captions, caption))


def filter_records(records: Iterable[AssetRecord], rule: AssetFilter) -> tuple[list[AssetRecord], Counter[str]]:
    """The records that pass, and how many were dropped for which reason (the first that applies)."""
    verdicts = [(record, why_not(record, rule)) for record in records]
    kept = [record for record, reason in verdicts if reason is None]
    return kept, Counter(reason for _, reason in verdicts if reason is not None)


def why_not(record: AssetRecord, rule: AssetFilter) -> str | None:
    """The first reason to leave a record out, None where it passes."""
    tags = set(record.tags)
    faces, size = record.num_faces, record.num_bytes
    tests = {
        "not_downloaded": not record.is_there,
        "uid": bool(rule.uids) and record.uid not in rule.uids,
        "not_an_object": rule.objects_only and not record.is_object,
        "licence": bool(rule.licences) and not is_accepted(record.licence, rule.licences),
        "tag_missing": bool(rule.any_tags) and not rule.any_tags & tags,
        "tag_excluded": bool(rule.no_tags & tags),
        "point_cloud": not rule.point_clouds and (faces == 0 or bool(POINT_CLOUD_WORDS & tags)),
        "front_unknown": rule.known_front_only and record.front_axis is None,
        "too_few_faces": rule.min_faces is not None and faces is not None and faces < rule.min_faces,
        "too_many_faces": rule.max_faces is not None and faces is not None and faces > rule.max_faces,
        "too_many_bytes": rule.max_bytes is not None and size is not None and size > rule.max_bytes,
    }
    return next((reason for reason, fails in tests.items() if fails), None)


def _category_word(category: str) -> str:
    """An LVIS category as a word: ``ship_(vessel)`` is a ship."""
    return re.sub(r"_?\(.*\)", "", category).replace("_", " ").lower()


def _read_json_gz(path: Path) -> dict:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)
