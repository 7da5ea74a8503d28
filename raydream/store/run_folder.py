"""The run folder: everything a run leaves behind, on a local path or a ``pyarrow.fs`` URI.

Three promises hold on every kind of storage. A file is there whole or not at all. A checkpoint exists if and only if
its manifest, written last, does and every file has the manifest's size and hash. Nothing outside the folder is touched.

Any process may open a run folder and write its own files; metrics, commits and pruning belong to the one driver.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from pyarrow import fs

from raydream.store.faults import PATIENCE_S, StorageError
from raydream.store.storage import LocalFiles, LocalLog, RemoteFiles, RemoteLog, resolve

CONFIG = "config.json"
VERSIONS = "versions.json"
METRICS = "metrics.jsonl"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
PREVIEWS = "previews"
PARTICLES = "particles"
CHECKPOINTS = "checkpoints"
MESH, TURNTABLE, PREVIEW = "mesh.glb", "turntable.mp4", "preview.png"

_MANIFEST = "manifest.json"
_PART_OF_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

_log = logging.getLogger(__name__)

Scalar = float | int | str | None


class NoSpaceError(OSError):
    """The disk, or the quota, is full: a class of its own, as of an error in an actor only name and words arrive."""


@dataclass(frozen=True)
class FileDigest:
    """What a checkpoint's manifest says of a file; whoever writes the file gets it and passes it to the driver."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: the step to resume from and its files by name."""

    step: int
    files: dict[str, FileDigest]


def particle_file(index: int, name: str) -> str:
    """The name of a particle's artefact, e.g. ``particles/003/mesh.glb``."""
    return f"{PARTICLES}/{index:03d}/{name}"


def preview_file(step: int) -> str:
    """The name of the grid of all particles at a step."""
    return f"{PREVIEWS}/step_{step:08d}.png"


def checkpoint_file(step: int, name: str) -> str:
    """The name of a file of a step's checkpoint."""
    return f"{CHECKPOINTS}/step_{step:08d}/{name}"


def digest(data: bytes) -> FileDigest:
    """Size and hash of a file's content."""
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def check_name(name: str) -> None:
    """ValueError unless ``name`` is a relative path of plain parts (letters, digits, ``. _ -``, no leading dot)."""
    if not all(_PART_OF_NAME.fullmatch(part) for part in name.split("/")):
        raise ValueError(f"name: {name!r} is not a plain relative file name of a run folder")


class RunFolder:
    """One run's files. Picklable where its filesystem is; a process elsewhere opens the same ``uri``."""

    def __init__(self, uri: str, files: LocalFiles | RemoteFiles) -> None:
        """Not for callers: use ``create`` or ``open``."""
        # absolute: another process has another working directory
        self.uri = str(files.root) if isinstance(files, LocalFiles) else uri
        self._files = files
        self._metrics = LocalLog(files, METRICS) if isinstance(files, LocalFiles) else RemoteLog(files, METRICS)

    @classmethod
    def create(cls, uri: str, config_json: str, filesystem: fs.FileSystem | None = None) -> "RunFolder":
        """A new run folder that holds its resolved configuration.

        ``filesystem``: where ``uri`` is a path of, for storage that a URI alone cannot reach. ValueError naming ``out``
        where ``uri`` is a file, a folder that is not empty, or cannot be written.
        """
        try:
            files = resolve(uri, filesystem)
            files.make_empty_root()
            files.write(CONFIG, config_json.encode())
        except (OSError, ValueError) as error:
            raise ValueError(f"out: cannot start a run in {uri!r}: {error}") from error
        return cls(uri, files)

    @classmethod
    def open(cls, uri: str, filesystem: fs.FileSystem | None = None, patience_s: float = PATIENCE_S) -> "RunFolder":
        """An existing run folder; ValueError naming ``resume`` where it is none or its configuration is damaged.

        ``patience_s``: how long a remote storage that is busy or away is asked again, here and in every later call.
        """
        try:
            files = resolve(uri, filesystem, patience_s)
            config = json.loads(files.read(CONFIG))
        except FileNotFoundError as error:
            raise ValueError(f"resume: {uri!r} is not a run folder: it has no {CONFIG}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"resume: cannot read {CONFIG} of {uri!r}: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"resume: {CONFIG} of {uri!r} is damaged: not a JSON object")
        return cls(uri, files)

    @property
    def local_root(self) -> Path | None:
        """The folder's path, for libraries that only write to paths; None where it is not on a local disk."""
        return self._files.root if isinstance(self._files, LocalFiles) else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the driver while it writes; ValueError naming ``resume`` where another driver holds it.

        The kernel's file lock rather than the existence of a file: it goes with its process, however that dies, so it
        cannot become stale and needs no guess whether a pid on another host still lives. The file's text only tells who
        holds it. Object stores have no lock that ``pyarrow.fs`` can reach, so there this does nothing.
        """
        if not isinstance(self._files, LocalFiles):
            yield
            return
        with self._files.lock():
            self._files.sweep_temporary()
            yield

    def read_config(self) -> str:
        """The resolved configuration as JSON."""
        return self._files.read(CONFIG).decode()

    def write_bytes(self, name: str, data: bytes) -> FileDigest:
        """Put a file, replacing an older one at once; a reader sees the old or the new content, never a part."""
        check_name(name)
        with _naming(name):
            self._files.write(name, data)
        return digest(data)

    def write_text(self, name: str, text: str) -> FileDigest:
        """Put a UTF-8 text file."""
        return self.write_bytes(name, text.encode())

    def read_bytes(self, name: str) -> bytes:
        """A file's content; FileNotFoundError where there is none."""
        check_name(name)
        return self._files.read(name)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        check_name(name)
        return self._files.exists(name)

    def delete(self, name: str) -> None:
        """Take a file away."""
        check_name(name)
        self._files.delete(name)

    def list_files(self, folder: str) -> dict[str, int]:
        """Size in bytes by name of all files at any depth below ``folder``, sorted; none where it is missing."""
        check_name(folder)
        return {f"{folder}/{name}": size for name, size in sorted(self._files.sizes(folder).items())}

    def append_metrics(self, rows: Iterable[Mapping[str, Scalar]]) -> None:
        """Add one JSON line a row; each has a ``step``. A number that JSON lacks (NaN, infinity) becomes null."""
        lines = []
        for row in rows:
            assert isinstance(row["step"], int), row
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            lines.append(json.dumps(finite, allow_nan=False) + "\n")
        if lines:
            with _naming(METRICS):
                self._metrics.append("".join(lines).encode())

    def read_metrics(self) -> list[dict[str, Scalar]]:
        """All whole rows in the order of writing; a damaged line is skipped with a warning."""
        rows = []
        for line in self._metrics.read().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
            else:
                _log.warning("%s: skipped a damaged line of %s", self.uri, METRICS)
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows at and after ``step``: a run that resumes there writes them again."""
        kept = [row for row in self.read_metrics() if cast(int, row["step"]) < step]
        with _naming(METRICS):
            self._metrics.replace("".join(json.dumps(row) + "\n" for row in kept).encode())

    def close(self) -> None:
        """Write what is buffered; on an object store, merge the metrics' parts into one file."""
        with _naming(METRICS):
            self._metrics.close()

    def write_checkpoint_file(self, step: int, name: str, data: bytes) -> FileDigest:
        """Put one file of a checkpoint that is being made; it counts from ``commit_checkpoint`` on."""
        return self.write_bytes(checkpoint_file(step, name), data)

    def commit_checkpoint(self, step: int, files: Mapping[str, FileDigest]) -> None:
        """Make the checkpoint exist: metrics are flushed, then the manifest is written, last.

        OSError where a file is missing or has another size; hashes are compared when the checkpoint is read.
        """
        assert files
        assert _MANIFEST not in files
        checkpoint = Checkpoint(step, dict(files))
        self._check_sizes(checkpoint)
        with _naming(METRICS):
            self._metrics.flush()
        manifest = {"step": step, "files": {name: asdict(entry) for name, entry in sorted(files.items())}}
        self.write_text(checkpoint_file(step, _MANIFEST), json.dumps(manifest, indent=1))

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint of which every byte verifies; damaged ones are skipped with a warning.

        StorageError where the storage is away, which says nothing of a checkpoint.
        """
        for step in reversed(self._steps(re.escape(_MANIFEST))):
            try:
                checkpoint = self._read_manifest(step)
                for name in checkpoint.files:
                    self._read_verified(checkpoint, name)
                return checkpoint
            except StorageError:  # it may be whole: an older one in its place would throw steps away
                raise
            except (OSError, ValueError) as error:
                _log.warning("%s: checkpoint of step %d is damaged and skipped: %s", self.uri, step, error)
        return None

    def read_checkpoint_file(self, step: int, name: str) -> bytes:
        """A file of a committed checkpoint; OSError or ValueError where it is not what the manifest says."""
        return self._read_verified(self._read_manifest(step), name)

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all but the newest ``keep`` whole checkpoints and what unfinished ones before them left.

        Whole means by size here: one that only its hash betrays still counts, so ``keep`` should be at least 2.
        """
        assert keep >= 1
        whole = [step for step in self._steps(re.escape(_MANIFEST)) if self._is_whole(step)]
        for step in self._steps(".*"):
            if whole and step < whole[-1] and step not in whole[-keep:]:
                self._files.delete(checkpoint_file(step, _MANIFEST))  # first: half a deletion is no checkpoint
                self._files.delete_folder(f"{CHECKPOINTS}/step_{step:08d}")

    def drop_unfinished_checkpoints(self) -> None:
        """Delete what was written of checkpoints that never came to exist: it only takes room, on a full disk above
        all. Not while anybody writes one.
        """
        finished = self._steps(re.escape(_MANIFEST))
        for step in self._steps(".*"):
            if step not in finished:
                self._files.delete_folder(f"{CHECKPOINTS}/step_{step:08d}")

    def _steps(self, file_pattern: str) -> list[int]:
        """The steps, rising, that have a file of a matching name."""
        pattern = re.compile(rf"step_(\d{{8,}})/{file_pattern}")
        matches = (pattern.fullmatch(name) for name in self._files.sizes(CHECKPOINTS))
        return sorted({int(match[1]) for match in matches if match})

    def _read_manifest(self, step: int) -> Checkpoint:
        manifest = json.loads(self._files.read(checkpoint_file(step, _MANIFEST)))
        try:
            files = {name: FileDigest(**entry) for name, entry in manifest["files"].items()}
            same_step = manifest["step"] == step
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"its manifest is malformed: {error!r}") from error
        if not same_step:
            raise ValueError(f"its manifest is that of step {manifest['step']}")
        return Checkpoint(step, files)

    def _read_verified(self, checkpoint: Checkpoint, name: str) -> bytes:
        if name not in checkpoint.files:
            raise FileNotFoundError(f"the checkpoint of step {checkpoint.step} has no file {name!r}")
        data = self.read_bytes(checkpoint_file(checkpoint.step, name))
        if digest(data) != checkpoint.files[name]:
            raise OSError(f"{checkpoint_file(checkpoint.step, name)} is not what the manifest says")
        return data

    def _check_sizes(self, checkpoint: Checkpoint) -> None:
        sizes = self._files.sizes(f"{CHECKPOINTS}/step_{checkpoint.step:08d}")
        for name, entry in checkpoint.files.items():
            if sizes.get(name) != entry.size_bytes:
                found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise OSError(f"{checkpoint_file(checkpoint.step, name)} {found}, expected {entry.size_bytes} bytes")

    def _is_whole(self, step: int) -> bool:
        try:
            self._check_sizes(self._read_manifest(step))
        except StorageError:  # what cannot be seen now must not be pruned for it
            raise
        except (OSError, ValueError):
            return False
        return True


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """``NoSpaceError`` with the file's name where there is no room for it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(error.errno, os.strerror(error.errno), name) from error
        raise
