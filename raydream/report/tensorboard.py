"""Scalars and preview grids for TensorBoard, in the run folder."""

import io
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from raydream.store.run_folder import TENSORBOARD, RunFolder

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event


class TensorboardLog:
    """Event files of one driver. A local one grows with each call, a remote one is put whole by ``sync``.

    Written by the caller's own thread: a writer's thread that dies of a full disk leaves a queue that nobody empties,
    and whoever fills it waits for ever. What cannot be written is lost with an ``OSError``; the next call may succeed.
    A run that resumes gives its ``start_step``: TensorBoard then hides what an earlier driver wrote of later steps.
    """

    def __init__(self, run: RunFolder, start_step: int = 0) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # here, as the package imports torch

        self._run = run
        host = "".join(c for c in socket.gethostname() if c.isalnum() or c in "-_")[:40]
        self._name = f"{TENSORBOARD}/events.out.tfevents.{int(time.time())}.{host}.{os.getpid()}"
        self._num_parts = 0
        self._records: list[bytes] = []
        self._head = _record(Event(file_version="brain.Event:2"))
        self._mark = _record(Event(step=start_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, stats: Mapping[str, float | int]) -> None:
        """One value for each name; ``loss/rgb`` and ``loss/lora`` share a section."""
        self._append(step, [{"tag": name, "simple_value": value} for name, value in stats.items()])

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture such as ``preview_grid``'s."""
        width, height = Image.open(io.BytesIO(png)).size
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png}
        self._append(step, [{"tag": name, "image": image}])

    def sync(self) -> None:
        """What was written so far is in the run folder; for the driver to call where pictures come, and at its end.

        A remote file cannot grow, so there each call ends one.
        """
        if not self._records:
            return
        data = b"".join([self._head, self._mark, *self._records])
        self._records.clear()
        self._run.write_bytes(f"{self._name}.{self._num_parts:04d}", data)
        self._num_parts += 1
        self._mark = b""

    def _append(self, step: int, values: list[dict[str, Any]]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        record = _record(Event(step=step, summary={"value": values}))
        if self._run.local_root is None:
            self._records.append(record)
            return
        path = self._run.local_root / self._name
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            data = memoryview(record if size else self._head + self._mark + record)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)  # a reader stops for ever at half a record
                raise


def _record(event: "Event") -> bytes:
    """An event as TFRecord frames it: length, its check sum, content, its check sum."""
    from tensorboardX.record_writer import masked_crc32c

    event.wall_time = time.time()
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))
