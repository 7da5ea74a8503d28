"""All views that a prior is trained on, in memory, and their small packed form for a machine without Parquet or Ray.

Albedo, light and opacity stay apart as bytes, so that every step can draw other colours, another light and another
background. A packed set is one zip of WebP images and a JSON table: Python, PIL and numpy are enough to read it.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

PACK_SUFFIX = ".zip"
_TABLE, _FORMAT = "views.json", 1
_COLUMNS = [
    "uid", "view", "captions", "nouns", "licence", "front_axis", "azimuth_deg", "elevation_deg", "rgb", "alpha",
    "shade",
]  # fmt: skip


@dataclass(frozen=True)
class ObjectCard:
    """What is known of an object besides its images; ``front_known`` means that azimuth 0 is its front."""

    uid: str
    captions: tuple[str, ...]
    nouns: tuple[str, ...]
    licence: str
    front_known: bool


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
        return ViewSet(
            tuple(self.objects[i] for i in indices),
            self.rgb[index],
            self.alpha[index],
            self.shade[index],
            self.azimuth_deg[index],
            self.elevation_deg[index],
        )

    def take_views(self, numbers: Sequence[int]) -> "ViewSet":
        """All objects with some of their views, in the given order."""
        index = torch.tensor(list(numbers), dtype=torch.long)
        parts = (self.rgb, self.alpha, self.shade, self.azimuth_deg, self.elevation_deg)
        return ViewSet(self.objects, *(part[:, index] for part in parts))


def open_views(source: str) -> ViewSet:
    """The views of a packed file or of the Parquet folder or URI that ``jobs/render_ccm.py`` wrote.

    Raises ValueError about ``views`` where there are none.
    """
    return unpack(Path(source)) if source.endswith(PACK_SUFFIX) else read_views(source)


def read_views(uri: str) -> ViewSet:
    """The views of a Parquet folder or URI, by uid; objects without a licence count as "unknown"."""
    from raydream.prior.view_dataset import iterate_views  # pyarrow, which a packed set does not need

    groups = list(iterate_views(uri, _COLUMNS))
    if not groups:
        raise ValueError(f"views: none in {uri}")
    counts = {len(group["view"]) for group in groups}
    if len(counts) > 1:
        raise ValueError(f"views: all objects in {uri} need the same number of views, got {sorted(counts)}")
    cards = [
        ObjectCard(
            str(group["uid"][0]),
            tuple(group["captions"][0] or ()),
            tuple(group["nouns"][0] or ()),
            str(group["licence"][0] or "unknown"),
            group["front_axis"][0] is not None,
        )
        for group in groups
    ]
    images = [np.stack([np.asarray(group[name], np.uint8) for group in groups]) for name in ("rgb", "alpha", "shade")]
    angles = [
        np.stack([np.asarray(group[name], np.float32) for group in groups]) for name in ("azimuth_deg", "elevation_deg")
    ]
    rgb, alpha, shade, azimuth_deg, elevation_deg = (torch.from_numpy(array) for array in (*images, *angles))
    return ViewSet(tuple(cards), rgb, alpha, shade, azimuth_deg, elevation_deg)


def pack(views: ViewSet, path: Path, quality: int = 80) -> int:
    """Writes a packed set and returns its size in bytes. Colours and light lose a little (WebP ``quality``)."""
    part = path.with_suffix(path.suffix + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for index in range(views.num_objects):
            for name, strip in _strips(views, index).items():
                archive.writestr(f"{index:05d}.{name}.webp", _webp(strip, quality))
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
    try:
        with zipfile.ZipFile(path) as archive:
            table = json.loads(archive.read(_TABLE))
            if table["format"] != _FORMAT:
                raise ValueError(f"format {table['format']}, not {_FORMAT}")
            cards = tuple(_card(row) for row in table["objects"])
            size, num_views = int(table["image_px"]), len(table["azimuth_deg"][0])
            images = {
                name: np.empty((len(cards), num_views, size, size, channels), np.uint8)
                for name, channels in (("rgb", 3), ("alpha", 1), ("shade", 1))
            }
            for index in range(len(cards)):
                for name, array in images.items():
                    array[index] = _views_of(archive.read(f"{index:05d}.{name}.webp"), size, array.shape[-1])
    except (OSError, KeyError, IndexError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"views: {path} is not a packed set of views: {error!r}") from error
    images["rgb"] = np.minimum(images["rgb"], images["alpha"])  # lossy bytes must stay premultiplied
    rgb, alpha, shade = (torch.from_numpy(images[name]) for name in ("rgb", "alpha", "shade"))
    return ViewSet(cards, rgb, alpha, shade, torch.tensor(table["azimuth_deg"]), torch.tensor(table["elevation_deg"]))


def _strips(views: ViewSet, index: int) -> dict[str, np.ndarray]:
    """Each kind of image of an object as one picture, its views side by side."""
    images = {"rgb": views.rgb, "alpha": views.alpha, "shade": views.shade}
    return {
        name: tensor[index].permute(1, 0, 2, 3).flatten(1, 2).squeeze(-1).numpy() for name, tensor in images.items()
    }


def _views_of(content: bytes, size: int, channels: int) -> np.ndarray:
    picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB" if channels == 3 else "L"))
    return picture.reshape(size, -1, size, channels).transpose(1, 0, 2, 3)


def _webp(picture: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).convert("RGB").save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _card(row: dict) -> ObjectCard:
    return ObjectCard(row["uid"], tuple(row["captions"]), tuple(row["nouns"]), row["licence"], bool(row["front_known"]))
