"""The files of a generation, for download. Their names are ours: nothing that a client sends becomes part of a path."""

import os
import uuid
import zipfile
from pathlib import Path

from fastapi import HTTPException, Request
from fastapi.responses import FileResponse, Response

from raydream.store.faults import StorageError
from raydream.store.run_folder import CONFIG, METRICS, PARTICLES, PREVIEWS, REPORT, VERSIONS, RunFolder
from raydream.store.storage import LocalFiles
from serve.records import Record
from serve.schema import FINAL_STATES, MAX_METRIC_ROWS, MetricRows
from serve.settings import Settings

MEDIA_TYPES = {
    ".png": "image/png",
    ".mp4": "video/mp4",
    ".glb": "model/gltf-binary",
    ".html": "text/html; charset=utf-8",
    ".zip": "application/zip",
}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's earliest date: the same run gives the same archive
_PACKED = frozenset((".png", ".mp4"))  # compressed already


class Artefacts:
    """Reads run folders on a local path in place, others by way of the cache."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def file(self, record: Record, name: str) -> Path:
        """A local path with the content of a run folder's file; 404 where there is none (yet)."""
        run = self._run(record)
        if run is None or not run.exists(name):
            raise HTTPException(404, f"there is no {name.rpartition('/')[2]} (yet)")
        if run.local_root is not None:
            return run.local_root / name
        cache = LocalFiles(self._settings.cache / record.id)
        if record.state not in FINAL_STATES or not cache.exists(name):
            cache.write(name, run.read_bytes(name))
        return cache.path(name)

    def archive(self, record: Record) -> Path:
        """The whole run but its checkpoints and TensorBoard files, as a zip that is made once."""
        run = self._run(record)
        if run is None or record.state not in FINAL_STATES:
            raise HTTPException(404, "there is no archive before the generation has ended")
        path = self._settings.cache / record.id / "archive.zip"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
            try:
                _pack(run, temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def metrics(self, record: Record, after: int) -> MetricRows:
        """The losses by step, from after a step; thinned out evenly, the last row among them."""
        run = self._run(record)
        rows = [] if run is None else [row for row in run.read_metrics() if int(row["step"] or 0) > after]
        if len(rows) > MAX_METRIC_ROWS:
            last = len(rows) - 1
            rows = [rows[round(k * last / (MAX_METRIC_ROWS - 1))] for k in range(MAX_METRIC_ROWS)]
        kept = [{name.removeprefix("loss/"): row[name] for name in row if name.startswith("loss/")} for row in rows]
        return MetricRows.model_validate({"rows": [{"step": row["step"]} | k for row, k in zip(rows, kept)]})

    def _run(self, record: Record) -> RunFolder | None:
        if record.started_at is None:
            return None
        try:
            return RunFolder.open(self._settings.run_uri(record.id), patience_s=0.0)  # a client asks again itself
        except ValueError as error:
            if isinstance(error.__cause__, StorageError):
                raise error.__cause__ from error
            return None  # its runner has not made it yet


def has_already(request: Request, tag: str) -> bool:
    """Whether a client says that it knows what bears this ETag."""
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    return tag in known or "*" in known


def send_file(request: Request, path: Path, download_as: str | None, policy: str | None = None) -> Response:
    """A file with its ETag; answers ranges, and 304 to who has it already.

    A picture is read at once and answers no range: a run that goes on may put another one, of another length, in its
    place meanwhile.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        headers = {"ETag": f'"{found.st_mtime_ns:x}-{found.st_size:x}"'}
        if policy is not None:
            headers["Content-Security-Policy"] = policy
        if has_already(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        if download_as is not None:
            headers["Content-Disposition"] = f'attachment; filename="{download_as}"'
        if path.suffix == ".png":
            return Response(file.read(), headers=headers, media_type=MEDIA_TYPES[path.suffix])
    return FileResponse(path, headers=headers, media_type=MEDIA_TYPES[path.suffix], stat_result=found)


def _pack(run: RunFolder, path: Path) -> None:
    names = [name for name in (CONFIG, VERSIONS, METRICS, REPORT) if run.exists(name)]
    names += [*run.list_files(PARTICLES), *run.list_files(PREVIEWS)]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(f"raydream/{name}", _EPOCH)
            entry.external_attr = 0o644 << 16
            kind = zipfile.ZIP_STORED if Path(name).suffix in _PACKED else zipfile.ZIP_DEFLATED
            archive.writestr(entry, run.read_bytes(name), kind)
