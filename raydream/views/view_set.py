"""All views that a prior is trained on, in memory, and their small packed form for a machine without Parquet or Ray.

Albedo, light and opacity stay apart as bytes, so that every step can draw other colours, another light and another
background. A packed set is one zip of WebP images and a JSON table: Python, PIL and numpy are enough to read it.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from raydream.assets.licences import UNKNOWN, spdx_licence
from raydream.config.render import ViewConfig

PACK_SUFFIX = ".zip"
_TABLE, _FORMAT = "views.json", 1
_IMAGES = ("rgb", "alpha", "shade")
ABOUT = ("uid", "captions", "nouns", "licence", "front_axis", "warnings")  # columns that say what an object is
_ANGLES = ("azimuth_deg", "elevation_deg")
_VIEW_COLUMNS = (*_ANGLES, *_IMAGES)


@dataclass(frozen=True)
class ObjectCard:
    """What is known of an object besides its images; ``front_known`` means that azimuth 0 is its front, ``warnings``
    are what was left out when its file was read.
    """

    uid: str
    captions: tuple[str, ...]
    nouns: tuple[str, ...]
    licence: str
    front_known: bool
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "ObjectCard":
        """The card of an object whose columns are given; its licence in SPDX's words, whatever the row has."""
        return cls(
            str(row["uid"]),
            tuple(row["captions"] or ()),
            tuple(row["nouns"] or ()),
            spdx_licence(row["licence"]) or UNKNOWN,
            row["front_axis"] is not None,
            tuple(row.get("warnings") or ()),
        )


@dataclass(frozen=True)
class ViewCards:
    """What a set of views says of itself without its images."""

    objects: tuple[ObjectCard, ...]
    num_views: int
    image_px: int


@dataclass(frozen=True)
class ViewSet:
    """The same number of square views of each object. ``rgb`` is display albedo premultiplied by ``alpha``; ``shade``
    is the light on the surface, not premultiplied.
    """

    objects: tuple[ObjectCard, ...]
    rgb: UInt8[Tensor, "object view h w 3"]
    alpha: UInt8[Tensor, "object view h w 1"]
    shade: UInt8[Tensor, "object view h w 1"]
    azimuth_deg: Float[Tensor, "object view"]
    elevation_deg: Float[Tensor, "object view"]

    @property
    def num_objects(self) -> int:
        return len(self.objects)

    @property
    def num_views(self) -> int:
        return self.rgb.shape[1]

    @property
    def image_px(self) -> int:
        return self.rgb.shape[2]

    def select(self, indices: Sequence[int]) -> "ViewSet":
        """Some of the objects, in the given order."""
        index = torch.tensor(list(indices), dtype=torch.long)
        parts = (getattr(self, name)[index] for name in (*_IMAGES, *_ANGLES))
        return ViewSet(tuple(self.objects[i] for i in indices), *parts)


def open_views(source: str) -> ViewSet:
    """The views of a packed file or of the Parquet folder or URI that ``jobs/render_ccm.py`` wrote.

    Raises ValueError about ``views`` where there are none.
    """
    return unpack(Path(source)) if source.endswith(PACK_SUFFIX) else read_views(source)


def read_cards(source: str) -> ViewCards:
    """The cards of what ``open_views`` reads, in seconds; ValueError about ``views`` where it could not be trained on,
    which names a broken shard by its file.
    """
    if source.endswith(PACK_SUFFIX):
        return _packed_cards(Path(source))
    from raydream.views.dataset import iterate_cards

    config = _check_images(source)
    shards = iterate_cards(source, ABOUT, _VIEW_COLUMNS)
    objects = tuple(ObjectCard.of_row(row) for rows in shards for row in rows)
    if not objects:
        raise ValueError(f"views: no asset gave any in {source}; its report.json says why")
    return ViewCards(objects, config.num_views, config.image_px)


def _check_images(uri: str) -> ViewConfig:
    """The settings that the views of a folder were rendered with."""
    from raydream.views.dataset import open_job

    config = open_job(uri)[2].views
    missing = [kind for kind in _IMAGES if kind not in config.images]
    if missing:
        raise ValueError(
            f"views: {uri} was rendered without {' and '.join(missing)}; render it again with jobs/render_ccm.py "
            "--recipe prior"
        )
    return config


def read_views(uri: str) -> ViewSet:
    """The views of a Parquet folder or URI, by uid; objects without a licence count as "unknown"."""
    from raydream.views.dataset import iterate_views  # pyarrow, which a packed set does not need

    _check_images(uri)
    groups = list(iterate_views(uri, (*ABOUT, *_VIEW_COLUMNS)))
    if not groups:
        raise ValueError(f"views: no asset gave any in {uri}; its report.json says why")
    cards = tuple(ObjectCard.of_row({name: group[name][0] for name in ABOUT}) for group in groups)
    # popped: of a large library only one kind of image is there twice for a moment
    images = [np.stack([np.asarray(group.pop(name), np.uint8) for group in groups]) for name in _IMAGES]
    angles = [np.stack([np.asarray(group[name], np.float32) for group in groups]) for name in _ANGLES]
    return ViewSet(cards, *map(torch.from_numpy, (*images, *angles)))


def pack(views: ViewSet, path: Path, quality: int = 80) -> int:
    """Writes a packed set and returns its size in bytes. Colours and light lose a little (WebP ``quality``)."""
    part = path.with_suffix(path.suffix + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for index in range(views.num_objects):
            for name, strip in _strips(views, index).items():
                archive.writestr(_member(index, name), _webp(strip, quality))
        table = {
            "format": _FORMAT,
            "image_px": views.image_px,
            "objects": [asdict(card) for card in views.objects],
            "azimuth_deg": views.azimuth_deg.tolist(),
            "elevation_deg": views.elevation_deg.tolist(),
        }
        archive.writestr(zipfile.ZipInfo(_TABLE), json.dumps(table), zipfile.ZIP_DEFLATED)
    part.replace(path)
    return path.stat().st_size


def unpack(path: Path) -> ViewSet:
    """Reads a packed set; ValueError about ``views`` if the file is not one."""
    cards = _packed_cards(path)
    shape = (len(cards.objects), cards.num_views, cards.image_px, cards.image_px)
    images = {name: np.empty((*shape, 3 if name == "rgb" else 1), np.uint8) for name in _IMAGES}
    with _reading_pack(path), zipfile.ZipFile(path) as archive:
        for index in range(len(cards.objects)):
            for name, array in images.items():
                array[index] = _views_of(archive.read(_member(index, name)), *array.shape[-2:])
        table = json.loads(archive.read(_TABLE))
    images["rgb"] = np.minimum(images["rgb"], images["alpha"])  # lossy bytes must stay premultiplied
    tensors = map(torch.from_numpy, images.values())
    return ViewSet(cards.objects, *tensors, *(torch.tensor(table[name]) for name in _ANGLES))


def _packed_cards(path: Path) -> ViewCards:
    with _reading_pack(path), zipfile.ZipFile(path) as archive:
        table = json.loads(archive.read(_TABLE))
        if table["format"] != _FORMAT:
            raise ValueError(f"format {table['format']}, not {_FORMAT}")
        objects = tuple(ObjectCard.of_row(row | {"front_axis": row["front_known"] or None}) for row in table["objects"])
        names = set(archive.namelist())
        absent = [name for i in range(len(objects)) for kind in _IMAGES if (name := _member(i, kind)) not in names]
        if absent:
            raise ValueError(f"it has no {absent[0]}")
        return ViewCards(objects, len(table["azimuth_deg"][0]), int(table["image_px"]))


@contextmanager
def _reading_pack(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, IndexError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"views: {path} is not a packed set of views: {error!r}") from error


def _member(index: int, kind: str) -> str:
    return f"{index:05d}.{kind}.webp"


def _strips(views: ViewSet, index: int) -> dict[str, np.ndarray]:
    """Each kind of image of an object as one picture, its views side by side."""
    images = {name: getattr(views, name)[index] for name in _IMAGES}
    return {name: part.permute(1, 0, 2, 3).flatten(1, 2).squeeze(-1).numpy() for name, part in images.items()}


def _views_of(content: bytes, size: int, channels: int) -> np.ndarray:
    picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB" if channels == 3 else "L"))
    return picture.reshape(size, -1, size, channels).transpose(1, 0, 2, 3)


def _webp(picture: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).convert("RGB").save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()
