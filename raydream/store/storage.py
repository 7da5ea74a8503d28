"""Whole files below one folder, on a local path or any ``pyarrow.fs`` filesystem, and logs that grow line by line.

``run_folder.py`` gives them their meaning and checks every name; here only the two kinds of storage differ.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from raydream.store.faults import PATIENCE_S, patiently

_LINES_PER_PART = 64
_LOCK = ".driver_lock"  # a leading dot: no name that the run folder accepts reaches it
_ATOMIC_PUT = frozenset({"s3", "gcs", "abfs"})  # an object appears when its upload is complete

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


def resolve(uri: str, filesystem: fs.FileSystem | None, patience_s: float = PATIENCE_S) -> "LocalFiles | RemoteFiles":
    """The storage that a path or URI names; OSError or ValueError where there is none that we can reach.

    A remote one is asked again for ``patience_s`` while it is busy or away, see ``faults.py``.
    """
    if filesystem is None and "://" not in uri:
        return LocalFiles(Path(uri).expanduser().resolve())
    path = uri
    if filesystem is None:
        filesystem, path = patiently(lambda: fs.FileSystem.from_uri(uri), uri.partition("?")[0], patience_s)
    if isinstance(filesystem, fs.LocalFileSystem):
        return LocalFiles(Path(path).resolve())
    return RemoteFiles(filesystem, path.rstrip("/"), patience_s)


class LocalFiles:
    """Files below a path; names are checked by the caller, links that lead out of the folder here."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        path = self.root / name
        if not path.resolve().is_relative_to(self.root):
            raise ValueError(f"name: {name!r} follows a link out of the run folder")
        return path

    def make_empty_root(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)  # FileExistsError where it is a file
        if any(self.root.iterdir()):
            raise FileExistsError("it exists and is not empty; choose another, or go on with it by --resume")

    def write(self, name: str, data: bytes) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk before a manifest may follow
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The content; OSError ``EFBIG``, before anything is read, where it has more than ``max_bytes``."""
        path = self.path(name)
        if max_bytes is not None:
            _check_size(name, path.stat().st_size, max_bytes)
        return path.read_bytes()

    def open(self, name: str) -> pa.NativeFile:
        """A file of which only parts are read."""
        return pa.memory_map(str(self.path(name)))

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of each file below a folder, by its name relative to the folder."""
        top = self.path(folder)
        paths = (Path(parent) / name for parent, _, names in os.walk(top) for name in names if not name.startswith("."))
        return {path.relative_to(top).as_posix(): path.lstat().st_size for path in paths}

    def names_in(self, folder: str) -> list[str]:
        """The names of the files that lie in a folder itself."""
        return [path.name for path in self.path(folder).iterdir() if path.is_file()]

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        shutil.rmtree(self.path(folder))

    def sweep_temporary(self) -> None:
        """Remove what writers that were killed left behind."""
        for path in self.root.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        try:
            handle = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"resume: cannot write to {self.root}: {error}") from error
        with os.fdopen(handle, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"resume: {self.root} is in use by another driver: {file.read().strip()}") from error
            except OSError as error:  # some network filesystems have no locks
                _log.warning("%s: no file locks here (%s); see that no second driver uses it", self.root, error)
            file.truncate(0)
            print(f"pid {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
            yield


class RemoteFiles:
    """The same below a path of any ``pyarrow.fs`` filesystem.

    Each call is made again, as a whole, while the storage is busy or away; see ``faults.py`` for what it raises.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, patience_s: float = PATIENCE_S) -> None:
        self.filesystem, self.root, self.patience_s = filesystem, root, patience_s
        self.puts_are_atomic = filesystem.type_name in _ATOMIC_PUT

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def make_empty_root(self) -> None:
        if self._ask("", lambda: self.filesystem.get_file_info(self.root)).type == fs.FileType.File:
            raise FileExistsError("it is a file")
        everything = fs.FileSelector(self.root, allow_not_found=True)
        if self._ask("", lambda: self.filesystem.get_file_info(everything)):
            raise FileExistsError("it exists and is not empty; choose another, or go on with it by --resume")

    def write(self, name: str, data: bytes) -> None:
        self._ask(name, lambda: self._write(self.path(name), data))

    def _write(self, path: str, data: bytes) -> None:
        if self.puts_are_atomic:
            self._put(path, data)
            return
        folder = path.rpartition("/")[0]
        self.filesystem.create_dir(folder, recursive=True)
        temporary = f"{folder}/.{uuid.uuid4().hex}.tmp"
        self._put(temporary, data)
        self.filesystem.move(temporary, path)

    def _put(self, path: str, data: bytes) -> None:
        with self.filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        return self._ask(name, lambda: self._read(name, max_bytes))

    def _read(self, name: str, max_bytes: int | None) -> bytes:
        if max_bytes is None:
            with self._open_stream(name) as stream:
                return stream.read()
        with self._open_file(name) as file:
            _check_size(name, file.size(), max_bytes)
            return file.read()

    def _open_stream(self, name: str) -> pa.NativeFile:
        with self._missing_for_sure(name):
            return self.filesystem.open_input_stream(self.path(name), compression=None)

    def _open_file(self, name: str) -> pa.NativeFile:
        with self._missing_for_sure(name):
            return self.filesystem.open_input_file(self.path(name))

    @contextmanager
    def _missing_for_sure(self, name: str) -> Iterator[None]:
        """Takes no file of an fsspec filesystem for missing because of a fault, as pyarrow does there."""
        try:
            yield
        except FileNotFoundError as error:
            if not self.filesystem.type_name.startswith("py::fsspec"):
                raise
            self.filesystem.handler.fs.info(self.path(name))  # raises what the fault was, or that it is missing
            raise ConnectionError(f"{self.path(name)} was away for a moment") from error

    def open(self, name: str) -> pa.NativeFile:
        file = self._ask(name, lambda: self._open_file(name))
        return pa.PythonFile(_PatientFile(file, self.path(name), self.patience_s), mode="r")

    def exists(self, name: str) -> bool:
        return self._ask(name, lambda: self.filesystem.get_file_info(self.path(name))).type == fs.FileType.File

    def sizes(self, folder: str) -> dict[str, int]:
        start = len(self.path(folder).rstrip("/")) + 1
        infos = self._infos(folder, recursive=True)
        return {info.path[start:]: info.size for info in infos if not info.base_name.startswith(".")}

    def names_in(self, folder: str) -> list[str]:
        return [info.base_name for info in self._infos(folder, recursive=False)]

    def delete(self, name: str) -> None:
        if self.exists(name):
            self._ask(name, lambda: self._gone(self.filesystem.delete_file, name))

    def delete_folder(self, folder: str) -> None:
        self._ask(folder, lambda: self._gone(self.filesystem.delete_dir, folder))

    def _gone(self, delete: Callable[[str], None], name: str) -> None:
        try:
            delete(self.path(name))
        except FileNotFoundError:  # a call before did it, whose answer was lost
            _log.debug("%s is gone already", self.path(name))

    def _infos(self, folder: str, recursive: bool) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path(folder).rstrip("/"), allow_not_found=True, recursive=recursive)
        infos = self._ask(folder, lambda: self.filesystem.get_file_info(selector))
        return [info for info in infos if info.type == fs.FileType.File]

    def _ask(self, name: str, ask: Callable[[], _Answer]) -> _Answer:
        return patiently(ask, self.path(name), self.patience_s)


class _PatientFile:
    """The Python file that pyarrow's readers see of a remote one: a read that fails of what passes is made again."""

    def __init__(self, file: pa.NativeFile, path: str, patience_s: float) -> None:
        self._file, self._path, self._patience_s = file, path, patience_s
        self._size = patiently(file.size, path, patience_s)
        self._place = 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        place, left = self._place, self._size - self._place
        wanted = left if size < 0 else min(size, left)
        if wanted <= 0:
            return b""
        data = patiently(lambda: self._file.read_at(wanted, place), self._path, self._patience_s)
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        self._file.close()
        self.closed = True


def _check_size(name: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise OSError(errno.EFBIG, f"it has {size_bytes} bytes, over {max_bytes}", name)


class LocalLog:
    """Lines in one file that grows."""

    def __init__(self, files: LocalFiles, name: str) -> None:
        self.files, self.name = files, name

    def append(self, data: bytes) -> None:
        with open(self.files.path(self.name), "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a writer was killed, or the disk was full, in the middle of a line
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(data)

    def read(self) -> bytes:
        """All lines that have their end; what follows the last one was cut off, or is being written."""
        data = self.files.read(self.name) if self.files.exists(self.name) else b""
        return data[: data.rfind(b"\n") + 1]

    def replace(self, data: bytes) -> None:
        self.files.write(self.name, data)

    def flush(self) -> None:
        if self.files.exists(self.name):
            with open(self.files.path(self.name), "rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        self.flush()


class RemoteLog:
    """Lines where files cannot grow: numbered parts in ``<name>.parts``, merged into one file at the end."""

    def __init__(self, files: RemoteFiles, name: str) -> None:
        self.files, self.name = files, name
        self.parts_folder = f"{name}.parts"
        self.buffer: list[bytes] = []

    def append(self, data: bytes) -> None:
        self.buffer += data.splitlines(keepends=True)
        if len(self.buffer) >= _LINES_PER_PART:
            self.flush()

    def read(self) -> bytes:
        names = [self.name] if self.files.exists(self.name) else []
        names += [f"{self.parts_folder}/{part}" for part in self._parts()]
        lines = [line for name in names for line in self.files.read(name).splitlines(keepends=True)]
        # Two equal lines are one row told twice, by a merge that was cut off before it deleted the parts.
        return b"".join(dict.fromkeys(lines + self.buffer))

    def replace(self, data: bytes) -> None:
        self.files.write(self.name, data)
        for part in self._parts():
            self.files.delete(f"{self.parts_folder}/{part}")
        self.buffer.clear()

    def flush(self) -> None:
        if self.buffer:
            parts = self._parts()
            number = int(parts[-1].removesuffix(".jsonl")) + 1 if parts else 0
            self.files.write(f"{self.parts_folder}/{number:08d}.jsonl", b"".join(self.buffer))
            self.buffer.clear()

    def close(self) -> None:
        if self.buffer or self._parts():
            self.replace(self.read())

    def _parts(self) -> list[str]:
        return sorted(self.files.sizes(self.parts_folder))
