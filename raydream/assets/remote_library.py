"""Asset libraries that lie behind a ``pyarrow.fs`` URI: their index is copied once, each asset when it is rendered."""

import errno
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path, PurePosixPath

from raydream.assets.error import AssetError
from raydream.assets.folder_library import LISTING, OBJAVERSE_HOME, NamesIn, asset_files, check_asset_files
from raydream.assets.libraries import FRONTS, LVIS, MANIFEST, METADATA, OBJECT_PATHS, SUBSETS, AssetRecord
from raydream.assets.named_files import named_files
from raydream.store.faults import StorageError
from raydream.store.storage import LocalFiles, RemoteFiles, resolve

_MAX_FILES = 1000
_MAX_NAME_BYTES = 250  # of each part of a local path


def is_remote(source: str) -> bool:
    """Whether a library's source is a URI."""
    return "://" in source


@contextmanager
def index_of(uri: str) -> Iterator[Path]:
    """A local copy of a library's index files, without any asset, until the end of the block; where it has no index, a
    list of its asset files.

    ValueError naming ``library.source`` where the URI is none or holds no asset; StorageError where its storage is
    away.
    """
    with tempfile.TemporaryDirectory(prefix="raydream-index-") as folder:
        with _naming_source(uri):
            files = resolve(uri, None)
            names = _index_names(files)
            for name in names:
                _put(Path(folder) / name, files.read(name))
            if not names:
                _put(Path(folder) / LISTING, "\n".join(_asset_names(files, uri)).encode())
        yield Path(folder)


def remote_names(uri: str) -> NamesIn:
    """Lists the folders of a remote library; one that is not there is empty."""
    return partial(_names_in, resolve(uri, None))


def check_reachable(uri: str) -> None:
    """Raises what ``index_of`` would, without a copy of anything."""
    with _naming_source(uri):
        files = resolve(uri, None)
        if not _index_names(files):
            _asset_names(files, uri)


def as_remote(record: AssetRecord, index: Path, uri: str) -> AssetRecord:
    """A record of ``index_of``'s copy as one whose file lies below the URI."""
    return replace(record, path=record.path.relative_to(index), root=uri)


class AssetFetcher:
    """Brings the assets of remote libraries to this machine, by connections that it keeps."""

    def __init__(self) -> None:
        self._library = cache(lambda uri: resolve(uri, None))
        self._by_stem: dict[tuple[str, str], dict[str, set[str]]] = {}

    @contextmanager
    def local(self, record: AssetRecord, max_bytes: int) -> Iterator[AssetRecord]:
        """The record with its file on this machine, until the end of the block; a local record is itself.

        The file comes with those that it names and no others, and nothing is listed for it. AssetError
        ``missing_file``, ``access_denied``, ``outside_folder`` or ``too_large`` (more than ``max_bytes`` in all) before
        anything large is copied. OSError where nothing is known of the asset: the storage is away or shut, or this
        machine's disk is full.
        """
        if not record.root:
            yield record
            return
        name = posixpath.normpath(PurePosixPath(record.path).as_posix())
        if name.startswith(("/", "..")):
            raise AssetError("outside_folder", name[:200])
        with tempfile.TemporaryDirectory(prefix="raydream-asset-") as folder:
            try:
                self._fetch(record.root, name, Path(folder), max_bytes)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
                raise AssetError("missing_file", str(error)[:200]) from error
            except PermissionError as error:
                _check_readable(self._library(record.root), record.root)
                raise AssetError("access_denied", str(error)[:200]) from error
            yield replace(record, path=Path(folder) / name, root="")

    def _fetch(self, uri: str, name: str, folder: Path, max_bytes: int) -> None:
        """Copies an asset's file and those that it and they name."""
        home = posixpath.dirname(name)
        wanted: list[tuple[str, ...]] = [(name,)]
        seen = set(wanted)
        new: list[tuple[str, ...]]
        num_files = num_bytes = 0
        while wanted:
            readings = wanted.pop(0)
            each, data = self._first(uri, readings, max_bytes - num_bytes)
            if data is None:
                if readings == (name,):
                    raise FileNotFoundError(errno.ENOENT, "it is not in the library", name)
                # who reads the asset takes one of these, does without or says what is missing
                new = [(other,) for other in sorted(self._otherwise_spelt(uri, readings[0]))]
            else:
                num_files, num_bytes = num_files + 1, num_bytes + len(data)
                _put(folder / each, data)
                named = named_files(each, data)
                new = [tuple(posixpath.join(home, other) for other in names) for names in named if _fits(names)]
            new = [readings for readings in new if readings not in seen]
            if num_files + len(wanted) + len(new) > _MAX_FILES:
                raise AssetError("too_large", f"it names over {_MAX_FILES} files")
            wanted, seen = wanted + new, seen | set(new)

    def _first(self, uri: str, names: tuple[str, ...], max_bytes: int) -> tuple[str, bytes | None]:
        """The first file that is there and its content, or None."""
        for name in names:
            try:
                return name, self._library(uri).read(name, max_bytes)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            except OSError as error:
                if error.errno != errno.EFBIG:
                    raise
                raise AssetError("too_large", f"{name[-100:]}: {error.strerror}") from error
        return names[0], None

    def _otherwise_spelt(self, uri: str, name: str) -> set[str]:
        """Files that a name may mean that is not there: of its stem, in upper or lower case and any format.

        Their folder is listed once, however many assets lie in it.
        """
        home, base = posixpath.split(name)
        if (uri, home) not in self._by_stem:
            by_stem: dict[str, set[str]] = {}
            for real in _names_in(self._library(uri), home):
                by_stem.setdefault(_stem(real), set()).add(posixpath.join(home, real))
            self._by_stem[uri, home] = by_stem
        return self._by_stem[uri, home].get(_stem(base), set())


@contextmanager
def _naming_source(uri: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix("library.source: ")
        raise ValueError(f"library.source: cannot read {uri}: {reason}") from error


def _index_names(files: LocalFiles | RemoteFiles) -> list[str]:
    """The files of a library's index; none where it has none."""
    for home in ("", f"{OBJAVERSE_HOME}/"):
        names = [name for name in (MANIFEST, FRONTS, SUBSETS, OBJECT_PATHS, LVIS) if files.exists(home + name)]
        if OBJECT_PATHS in names:
            names += [f"{METADATA}/{name}" for name in files.sizes(f"{home}{METADATA}")]
        if {MANIFEST, OBJECT_PATHS} & set(names):
            return [home + name for name in names]
    return []


def _asset_names(files: LocalFiles | RemoteFiles, uri: str) -> list[str]:
    names = files.sizes("")
    check_asset_files(names, uri)
    return asset_files(names)


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0].casefold()


def _fits(names: tuple[str, ...]) -> bool:
    return all(len(part.encode()) <= _MAX_NAME_BYTES for name in names for part in name.split("/"))


def _check_readable(files: LocalFiles | RemoteFiles, uri: str) -> None:
    """StorageError where the library itself is denied, too: expired credentials say nothing of one file."""
    try:
        files.exists(MANIFEST)
    except PermissionError as error:
        raise StorageError(f"{uri.partition('?')[0]} is denied: {error}") from error


def _names_in(files: LocalFiles | RemoteFiles, folder: str) -> list[str]:
    try:
        return files.names_in(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
