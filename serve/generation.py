"""One generation from its record to its run folder, as often as it takes: a runner that died is followed by another,
which goes on from the last checkpoint.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from raydream.cluster.runtime import Runtime
from raydream.config import strict_json
from raydream.config.run import RunConfig
from raydream.distill.artefacts import on_paper
from raydream.distill.loop import RunFailed
from raydream.distill.watch import RunWatch
from raydream.report.progress import Progress, seconds_per_step
from raydream.runs import advance
from raydream.scene.export import write_png
from raydream.store.run_folder import MESH, PREVIEW, RunFolder, particle_file
from raydream.store.storage import LocalFiles, resolve
from serve.files import GenerationFiles, is_for_want_of_room
from serve.plan import config_of
from serve.records import Records, RecordsAway
from serve.settings import Settings

_log = logging.getLogger(__name__)
_REPORT_EVERY_S = 0.5
_LOCK_PATIENCE_S = 60.0  # until the kernel has taken the lock from a runner that was killed


class GenerationWatch:
    """Tells the record how far the run is and writes pictures; sets ``stop`` once the generation is another's."""

    def __init__(
        self,
        run: RunFolder,
        inner: RunWatch,
        progress: Progress,
        report: Callable[[dict[str, object]], bool],
        stop: threading.Event,
    ) -> None:
        self.stop = stop
        self._run, self._inner, self._progress, self._report = run, inner, progress, report
        self._reported_at = float("-inf")

    def phase(self, message: str) -> None:
        self._inner.phase(message)
        self._send({"phase": message})

    def row(self, step: int, row: dict[str, float]) -> None:
        self._inner.row(step, row)
        if time.monotonic() - self._reported_at >= _REPORT_EVERY_S:
            self._send(self._progress_of(step, row))

    def preview(self, step: int, pictures: Sequence[np.ndarray]) -> None:
        for index, views in enumerate(pictures):
            png = write_png(on_paper(views)[0])
            self._inner.attempt("a picture", partial(self._run.write_bytes, particle_file(index, PREVIEW), png))
        self._inner.preview(step, pictures)
        self._send({"preview_step": step, "step": step})

    def _progress_of(self, step: int, row: dict[str, float]) -> dict[str, object]:
        step_s = seconds_per_step(self._progress.durations_s)
        eta_s = None if step_s is None else step_s * (self._progress.total_steps - step - 1)
        losses = {name.removeprefix("loss/"): value for name, value in row.items() if name.startswith("loss/")}
        finite = {name: value for name, value in losses.items() if np.isfinite(value)}
        return {"step": step + 1, "eta_s": eta_s, "losses": finite}

    def _send(self, values: dict[str, object]) -> None:
        self._reported_at = time.monotonic()
        if not self._report(values):
            self.stop.set()


MakeRuntime = Callable[[RunConfig, GenerationWatch], Runtime]


class GenerationRun:
    """An attempt at a generation; ``stop`` ends it at a checkpoint."""

    def __init__(self, records: Records, settings: Settings, generation_id: str, attempt: int) -> None:
        self._records, self._settings = records, settings
        self._files = GenerationFiles(settings)
        self._id, self._attempt = generation_id, attempt
        self._stop = threading.Event()

    def stop(self) -> None:
        """Asks for an end at the next checkpoint."""
        self._stop.set()

    def run(self, make_runtime: MakeRuntime) -> None:
        """Runs or resumes it and writes how it ended into the record. Raises nothing."""
        try:
            config, run = self._open()
            with ExitStack() as stack:
                _lock(run, stack)
                stack.callback(run.close)
                if self._pipeline(config, run, make_runtime):
                    meshes = [i for i in range(config.n) if run.exists(particle_file(i, MESH))]
                    num_steps = config.num_steps
                    last = {"phase": "done", "meshes": meshes, "step": num_steps, "preview_step": num_steps}
                    self._records.end(self._id, self._attempt, "finished", last)
            if not self._settings.keep_checkpoints and self._has_finished():
                self._files.delete_checkpoints(self._id)
        except RecordsAway as error:  # it is nobody's then, and the next runner goes on from the last checkpoint
            _log.warning("generation %s cannot be told of: %s", self._id, error)
        except Exception as error:  # the record must not wait for a runner that is gone
            self._end_badly(error)

    def _has_finished(self) -> bool:
        record = self._records.get(self._id)
        return record is not None and (record.state, record.attempt) == ("finished", self._attempt)

    def _end_badly(self, error: Exception) -> None:
        """Tells how it failed; where it only lacked room on the disk, it waits for that."""
        try:
            if is_for_want_of_room(error) or self._files.want_of_room():
                _log.warning("generation %s waits for room on the disk: %s", self._id, error)
                self._records.put_back(self._id, self._attempt, "waiting for room on the service's disk")
            elif isinstance(error, RunFailed | ValueError):
                _log.warning("generation %s failed: %s", self._id, error)
                self._fail("The run failed", str(error))
            else:
                _log.error("generation %s failed", self._id, exc_info=error)
                self._fail("Internal error", f"{type(error).__name__}; the service's log says more")
        except RecordsAway as away:  # the next runner finds out the same
            _log.warning("generation %s cannot be told of: %s", self._id, away)

    def _open(self) -> tuple[RunConfig, RunFolder]:
        """The run folder that exists already, with its own settings, or a new one."""
        record = self._records.get(self._id)
        assert record is not None
        wanted, uri = config_of(record, self._settings), self._settings.run_uri(self._id)
        try:
            run = RunFolder.open(uri)
        except ValueError:
            files = resolve(uri, None)
            if isinstance(files, LocalFiles):
                files.sweep_temporary()  # of a runner that was killed while it began
            return wanted, RunFolder.create(uri, strict_json.dumps(wanted))
        saved = strict_json.loads(RunConfig, run.read_config())
        return dataclasses.replace(saved, cluster=wanted.cluster), run

    def _pipeline(self, config: RunConfig, run: RunFolder, make_runtime: MakeRuntime) -> bool:
        def watched_by(inner: RunWatch, progress: Progress) -> GenerationWatch:
            watches.append(GenerationWatch(run, inner, progress, self._report, self._stop))
            return watches[0]

        watches: list[GenerationWatch] = []
        if self._stop.is_set():
            return False
        reached = advance(config, run, lambda _: make_runtime(config, watches[0]), self._stop, watched_by)
        return reached == config.num_steps and not self._stop.is_set()

    def _report(self, values: dict[str, object]) -> bool:
        try:
            return self._records.progress(self._id, self._attempt, values)
        except RecordsAway as error:  # for a moment, it may be: the next news may arrive
            _log.warning("generation %s: its news were lost: %s", self._id, error)
            return True

    def _fail(self, title: str, detail: str) -> None:
        values = {"phase": "failed", "error_title": title, "error_detail": detail}
        self._records.end(self._id, self._attempt, "failed", values)


def _lock(run: RunFolder, stack: ExitStack) -> None:
    """Takes the run folder's lock, and waits for it: who held it may have been killed just now."""
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            stack.enter_context(run.lock())
            return
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
