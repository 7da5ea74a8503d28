"""Who watches a run: the progress bar or the log, TensorBoard, and the preview pictures in the run folder."""

from collections.abc import Callable, Sequence

import numpy as np

from raydream.distill.artefacts import on_paper
from raydream.report.page import preview_grid
from raydream.report.progress import Progress
from raydream.report.tensorboard import TensorboardLog
from raydream.store.run_folder import RunFolder, preview_file

_SHOWN = ("loss/rgb", "loss/fit", "scene/opacity")


class RunWatch:
    """Passes each step's figures on and draws the grid of all particles where pictures come.

    Nobody has to watch for a run to go on: what cannot be written is told once and left out.
    """

    def __init__(self, run: RunFolder, progress: Progress, board: TensorboardLog, num_particles: int) -> None:
        self._run, self._progress, self._board = run, progress, board
        self._labels = [f"particle {i}" for i in range(num_particles)]
        self._failed: set[str] = set()

    def phase(self, message: str) -> None:
        self._progress.phase(message)

    def row(self, step: int, row: dict[str, float]) -> None:
        self._progress.update(step, {name: row[name] for name in _SHOWN if name in row})
        self.attempt("TensorBoard's file", lambda: self._board.scalars(step, row))

    def preview(self, step: int, pictures: Sequence[np.ndarray]) -> None:
        """``pictures[i]`` are the views of particle i, ``[view, h, w, 4]``, one above the other in its column."""
        columns = [np.concatenate(on_paper(views), axis=0) for views in pictures]
        grid = preview_grid(columns, min(8, len(columns)), self._labels)
        self.attempt("a preview", lambda: self._run.write_bytes(preview_file(step), grid))
        self.attempt("TensorBoard's file", lambda: self._board.picture(step, "particles", grid))
        self.attempt("TensorBoard's file", self._board.sync)

    def close(self) -> None:
        """The last that TensorBoard is told."""
        self.attempt("TensorBoard's file", self._board.sync)

    def attempt(self, what: str, write: Callable[[], object]) -> None:
        """Writes something for people, or tells once that it cannot be; the run itself stops where its own files
        cannot be written.
        """
        try:
            write()
        except OSError as error:
            if what not in self._failed:
                self._failed.add(what)
                self._progress.phase(f"{what} could not be written, the run goes on without: {error}")
