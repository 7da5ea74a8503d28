"""Which assets stand in an exhibit: those that a prompt's words name, as different from each other as can be found."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.assets.asset import Asset, AssetError, normalise_asset
from raydream.assets.error import loses_colours
from raydream.assets.libraries import MANIFEST, AssetFilter, AssetRecord, filter_records, read_manifest_folder
from raydream.assets.load import load_record
from raydream.assets.nouns import COLOUR_WORDS, head_noun, words_of
from raydream.assets.procedural import PROCEDURAL, procedural_records
from raydream.assets.raster import render_asset
from raydream.backend import load_backend
from raydream.camera import orbit_cameras

ASSETS_VARIABLE = "RAYDREAM_ASSETS"
MAX_CANDIDATES, MAX_FACES = 96, 20_000
THUMBNAIL_PX, THUMBNAIL_AZIMUTHS_DEG = 24, (0.0, 60.0, 150.0, 270.0)

log = logging.getLogger(__name__)


def asset_folder(source: str | None) -> Path | None:
    """The folder that a source names, or ``$RAYDREAM_ASSETS`` where it names none; None for the project's own objects.

    Absolute, because actors have working directories of their own. Raises ValueError naming the variable where that
    points to a folder without a manifest.
    """
    if source:
        return None if source == PROCEDURAL else Path(source).expanduser().resolve()
    named = os.environ.get(ASSETS_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{ASSETS_VARIABLE}: no {MANIFEST} in {named!r}; name a folder of assets that has one")
    return folder


def exhibit_assets(prompt: str | None, source: str | None, num_assets: int) -> list[Asset]:
    """At most ``num_assets`` different assets that fit a prompt (None: any), always the same ones in the same order.

    ``source`` is a folder with a manifest, ``"procedural"`` for the project's own objects, or None for the folder in
    ``$RAYDREAM_ASSETS`` and, where that is not set, ``"procedural"``. An asset fits if its caption is about the
    prompt's object ("a dark red chair by the sea" is about a chair) and has all the prompt's colour words. Units are
    the file's own: see ``normalise_asset``.
    Raises ValueError naming ``prompt`` (with the nouns there are), ``assets`` or ``num_assets``.
    """
    if num_assets < 1:
        raise ValueError(f"num_assets: must be at least 1, got {num_assets}")
    where, chosen = match_prompt(prompt, source)
    assets = _load_all(_spread(_preferred(_without_copies(chosen), num_assets), MAX_CANDIDATES))
    if not assets:
        raise ValueError(f"prompt: none of the {len(chosen)} files that fit {prompt!r} in {where} can be used")
    return [assets[index] for index in farthest_points(_thumbnails(assets), num_assets)]


def match_prompt(prompt: str | None, source: str | None) -> tuple[Path | str, list[AssetRecord]]:
    """Where assets come from and the records that fit a prompt; raises as ``exhibit_assets`` does, loads no asset."""
    folder = asset_folder(source)
    where = folder or PROCEDURAL
    records = _records(folder)
    chosen = records if prompt is None else match_records(records, prompt)
    if not chosen:
        nouns = ", ".join(f"{noun} ({count})" for noun, count in _object_counts(records).most_common(60))
        raise ValueError(f"prompt: {(prompt or '')[:100]!r} names nothing in {where}; objects there: {nouns}")
    return where, chosen


def available_nouns(source: str | None) -> Counter[str]:
    """The objects that prompts can name in a source (as in ``exhibit_assets``), with the number of assets of each."""
    return _object_counts(_records(asset_folder(source)))


def match_records(records: Sequence[AssetRecord], prompt: str) -> list[AssetRecord]:
    """The records about the prompt's object with all its colour words, in their given order."""
    nouns = _object_counts(records)
    words = words_of(prompt)
    head = head_noun(prompt)
    if head not in nouns:  # "a photo of a red chair": the last word that is an object here
        head = next((word for word in reversed(words) if word in nouns), None)
    if head is None:
        return []
    colours = {word for word in words if word in COLOUR_WORDS and word != head}
    return [record for record in records if head in _record_nouns(record) and colours <= _record_colours(record)]


def farthest_points(features: Float[Tensor, "point width"], num_points: int) -> list[int]:
    """Up to ``num_points`` indices: the most typical point, then always the one farthest from all before it.

    Copies (at distance 0 from one that was taken) are left out.
    """
    first = int(torch.cdist(features, features.mean(0, keepdim=True)).argmin())
    chosen = [first]
    distance = (features - features[first]).norm(dim=-1)
    while len(chosen) < num_points and distance.max() > 1e-3:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).norm(dim=-1))
    return chosen


def _records(folder: Path | None) -> list[AssetRecord]:
    if folder is None:
        return procedural_records()
    kept, dropped = filter_records(read_manifest_folder(folder), AssetFilter(max_faces=MAX_FACES))
    log.info("assets: %d records in %s, left out %s", len(kept), folder, dict(dropped))
    return kept


def _load_all(records: Sequence[AssetRecord]) -> list[Asset]:
    assets = []
    for record in records:
        try:
            assets.append(load_record(record))
        except AssetError as error:
            log.warning("assets: %s left out: %s", record.uid, error)
            continue
        if loses_colours(assets[-1].warnings):
            log.warning("assets: %s has not all of its colours: %s", record.uid, "; ".join(assets[-1].warnings))
    return assets


def _without_copies(records: Sequence[AssetRecord]) -> list[AssetRecord]:
    """The first of the records that share a file's hash, or a caption and a face count (one mesh in two formats)."""
    seen: set[tuple[object, ...]] = set()
    kept = []
    for record in records:
        keys = {("sha256", record.sha256 or record.uid), (record.captions[:1], record.num_faces or record.uid)}
        if not keys & seen:
            kept.append(record)
        seen |= keys
    return kept


def _preferred(records: Sequence[AssetRecord], num_records: int) -> Sequence[AssetRecord]:
    """Those with colours and a known front (so that "front" shows fronts), or with colours, where they are enough."""
    coloured = [record for record in records if not record.is_colourless]
    facing = [record for record in coloured if record.front_axis is not None]
    return next((choice for choice in (facing, coloured) if len(choice) >= num_records), records)


def _spread(records: Sequence[AssetRecord], num_records: int) -> list[AssetRecord]:
    """At most so many records, evenly taken from the whole list."""
    num_chosen = min(num_records, len(records))
    return [records[index * len(records) // num_chosen] for index in range(num_chosen)]


def _thumbnails(assets: Sequence[Asset]) -> Float[Tensor, "asset width"]:
    """Small renders of each asset as one vector: its silhouette and colours from a few sides."""
    azimuth = torch.tensor(THUMBNAIL_AZIMUTHS_DEG)
    ones = torch.ones_like(azimuth)
    cameras = orbit_cameras(azimuth, 15 * ones, 2.8 * ones, 45 * ones, THUMBNAIL_PX, THUMBNAIL_PX)
    backend = load_backend("auto", "cpu")
    features = []
    for asset in assets:
        views = render_asset(normalise_asset(asset), cameras, backend, supersample=1)
        features.append(torch.cat([views.rgb, views.alpha], dim=-1).flatten())
    return torch.stack(features)


def _object_counts(records: Sequence[AssetRecord]) -> Counter[str]:
    """How many records are about each noun, by their first caption and their categories."""
    return Counter(noun for record in records for noun in sorted(_record_nouns(record)))


def _record_nouns(record: AssetRecord) -> set[str]:
    heads = {head_noun(record.captions[0])} if record.captions else set()
    return {noun for noun in heads | {head_noun(noun) for noun in record.nouns} if noun}


def _record_colours(record: AssetRecord) -> set[str]:
    return {word for text in (*record.captions[:2], *record.colours) for word in words_of(text)}
