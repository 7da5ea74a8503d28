"""The Parquet form of rendered views: one row for each view, readable by plain pyarrow.

Images are ``arrow.fixed_shape_tensor`` columns, split into byte planes under zstd: on renders of real assets at 64, 256
and 512 px that is smaller than PNG by a fifth, as quick, and needs no decoder. The key is (uid, view); the views of an
object make one row group.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydream.assets.error import word_of
from raydream.assets.libraries import AssetRecord
from raydream.config import strict_json
from raydream.config.render import ImageKind, ViewConfig

CONFIG_KEY = b"raydream.views"
_CHANNELS: dict[str, int] = {"rgb": 3, "lit": 3, "shade": 1, "alpha": 1, "depth": 1, "normal": 3, "ccm": 3}
_TYPES: dict[str, pa.DataType] = {"depth": pa.float16(), "ccm": pa.float16(), "normal": pa.int8()}  # the others: uint8
_FACTORS = {"depth": 1.0, "ccm": 1.0, "normal": 127.0}  # the others: 255
_WORDS = pa.list_(pa.string())
OBJECT_FIELDS = (
    pa.field("captions", _WORDS),
    pa.field("nouns", _WORDS),
    pa.field("colours", _WORDS),
    pa.field("tags", _WORDS),
    pa.field("category", pa.string()),
    pa.field("licence", pa.string()),
    pa.field("front_axis", pa.string()),
    pa.field("split", pa.string()),
    pa.field("is_colourless", pa.bool_()),
    pa.field("source_sha256", pa.string()),
    pa.field("num_faces", pa.int32()),
    pa.field("warnings", _WORDS),
)
WARNED_COLUMNS = ["uid", "warnings"]
ADDED_LATER = frozenset({"warnings"})  # columns that shards of an older version lack
CAMERA_FIELDS = ("fov_y_deg", "azimuth_deg", "elevation_deg", "distance")
REJECTED = pa.schema([("uid", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


def views_schema(config: ViewConfig) -> pa.Schema:
    """The columns of a shard; its metadata holds the settings that the views were rendered with.

    What the values mean, by kind of image, h = w = ``image_px``: ``rgb`` and ``lit`` uint8 display colours,
    premultiplied by alpha; ``alpha`` uint8, the covered part; ``shade`` uint8, light in [0, 1]; ``depth`` float16 along
    the viewing axis; ``normal`` int8, a world-space unit vector times 127; ``ccm`` float16 in [0, 1]. Those of the last
    four are means over the object alone, 0 where there is none.
    """
    fields = [pa.field("uid", pa.string()), pa.field("view", pa.int32()), *OBJECT_FIELDS]
    fields += [pa.field("c2w", pa.fixed_shape_tensor(pa.float32(), [4, 4]))]
    fields += [pa.field(name, pa.float32()) for name in CAMERA_FIELDS]
    for kind in config.images:
        shape = [config.image_px, config.image_px, _CHANNELS[kind]]
        fields.append(pa.field(kind, pa.fixed_shape_tensor(_TYPES.get(kind, pa.uint8()), shape)))
    return pa.schema(fields, metadata={CONFIG_KEY: json.dumps(strict_json.to_json(config)).encode()})


def encode_image(kind: ImageKind, values: np.ndarray) -> np.ndarray:
    """Float images as they are stored; see ``views_schema``."""
    dtype = _TYPES.get(kind, pa.uint8()).to_pandas_dtype()
    factor = _FACTORS.get(kind, 255.0)
    return values.astype(dtype) if factor == 1 else np.rint(values * factor).astype(dtype)


def decode_image(kind: ImageKind, stored: np.ndarray) -> np.ndarray:
    """Stored images as float32 in their own units: colours, coverage and light in [0, 1], normals of length 1."""
    return stored.astype(np.float32) / np.float32(_FACTORS.get(kind, 255.0))


def views_table(
    config: ViewConfig,
    record: AssetRecord,
    source_sha256: str,
    asset: tuple[int, tuple[str, ...]],
    cameras: dict[str, np.ndarray],
    images: dict[ImageKind, np.ndarray],
) -> pa.Table:
    """All rows of one object; ``asset`` is its number of faces and its warnings, ``cameras`` holds ``c2w`` and
    ``CAMERA_FIELDS``, ``images`` encoded arrays by kind.
    """
    about = {name: getattr(record, name) for name in (field.name for field in OBJECT_FIELDS) if hasattr(record, name)}
    about |= {"source_sha256": source_sha256, "num_faces": asset[0], "warnings": asset[1]}
    schema = views_schema(config)
    columns: list[pa.Array] = []
    for field in schema:
        if field.name == "uid":
            columns.append(pa.array([record.uid] * config.num_views))
        elif field.name == "view":
            columns.append(pa.array(np.arange(config.num_views, dtype=np.int32)))
        elif field.name in about:
            columns.append(pa.array([about[field.name]] * config.num_views, field.type))
        elif isinstance(field.type, pa.FixedShapeTensorType):
            values = cameras["c2w"] if field.name == "c2w" else images[field.name]
            columns.append(pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values)))
        else:
            columns.append(pa.array(cameras[field.name], pa.float32()))
    return pa.Table.from_arrays([column.cast(field.type) for column, field in zip(columns, schema)], schema=schema)


class ShardBuffer:
    """A Parquet file that grows in memory, an object's rows at a time: a shard must appear whole or not at all."""

    def __init__(self, schema: pa.Schema) -> None:
        tensors = [f"{field.name}.list.element" for field in schema if isinstance(field.type, pa.FixedShapeTensorType)]
        words = [field.name for field in schema if field.type == pa.string()]
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=words,
            use_byte_stream_split=tensors,  # Parquet holds a byte as four, a third off with their zeros apart
            write_statistics=["uid", "view"],
        )

    def append(self, rows: pa.Table) -> None:
        self._writer.write_table(rows, row_group_size=max(1, rows.num_rows))

    def finish(self) -> bytes:
        """The whole file; nothing can be added after."""
        self._writer.close()
        return self._sink.getvalue().to_pybytes()


def warned_of(rows: pa.Table) -> dict[str, list[str]]:
    """By the word of each warning, the objects that it was told of: ``uid: name``. Needs ``WARNED_COLUMNS``."""
    warned: dict[str, list[str]] = {}
    objects = dict(zip(rows["uid"].to_pylist(), rows["warnings"].to_pylist()))
    for uid, warnings in objects.items():
        for told in {word_of(told): told for told in reversed(warnings or [])}.values():
            warned.setdefault(word_of(told), []).append(uid + told.removeprefix(word_of(told)))
    return warned


def record_to_json(record: AssetRecord) -> str:
    """A record as one line of JSON."""
    return json.dumps(asdict(record) | {"path": str(record.path)}, ensure_ascii=True)


def record_from_json(text: str) -> AssetRecord:
    """The record that ``record_to_json`` wrote."""
    row: dict[str, Any] = json.loads(text)
    row = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return AssetRecord(**row | {"path": Path(row["path"])})
