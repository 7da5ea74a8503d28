"""Scalars and preview grids for TensorBoard, in the run folder."""

import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from raydream.store import TENSORBOARD, RunFolder


class TensorboardLog:
    """Event files of one driver. On a remote run folder they are written locally and moved there by ``sync``.

    A run that resumes gives its ``start_step``: TensorBoard then hides what an earlier driver told of later steps.
    """

    def __init__(self, run: RunFolder, start_step: int = 0) -> None:
        self.run = run
        self.is_remote = run.local_root is None
        self.folder = run.local_root / TENSORBOARD if run.local_root else Path(tempfile.mkdtemp(prefix="raydream_"))
        self.num_moved = 0
        self._open(purge_step=start_step)

    def _open(self, purge_step: int | None) -> None:
        from tensorboardX import SummaryWriter  # here, as it imports torch

        self.writer = SummaryWriter(
            str(self.folder), purge_step=purge_step, flush_secs=10, filename_suffix=f".{self.num_moved:04d}"
        )

    def scalars(self, step: int, stats: Mapping[str, float | int]) -> None:
        """One value for each name; ``loss/rgb`` and ``loss/lora`` share a section."""
        for name, value in stats.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture such as ``preview_grid``'s."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def sync(self) -> None:
        """What was told so far is in the run folder; for the driver to call at checkpoints.

        A remote file cannot grow and the writer's flush does not wait for its queue, so there each call ends a file.
        """
        if not self.is_remote:
            self.writer.flush()
            return
        self._move()
        self._open(purge_step=None)

    def close(self) -> None:
        """The last ``sync``; nothing can be told afterwards."""
        if not self.is_remote:
            self.writer.close()
            return
        self._move()
        shutil.rmtree(self.folder)

    def _move(self) -> None:
        self.writer.close()
        for path in self.folder.iterdir():
            self.run.write_bytes(f"{TENSORBOARD}/{path.name}", path.read_bytes())
            path.unlink()
        self.num_moved += 1
