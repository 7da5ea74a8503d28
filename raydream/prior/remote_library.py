"""Asset libraries that lie behind a ``pyarrow.fs`` URI: their index is copied once, each asset when it is rendered."""

import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from raydream.prior.asset_error import AssetError
from raydream.prior.asset_library import FRONTS, LVIS, MANIFEST, METADATA, OBJECT_PATHS, SUBSETS, AssetRecord
from raydream.storage import LocalFiles, RemoteFiles, resolve

_LONELY = (".glb",)  # all other kinds may name files beside them
_MAX_FILES = 1000


def is_remote(source: str) -> bool:
    """Whether a library's source is a URI."""
    return "://" in source


@contextmanager
def index_of(uri: str) -> Iterator[Path]:
    """A local copy of a library's index files, without any asset, until the end of the block.

    ValueError naming ``library.source`` where the URI cannot be reached or holds neither kind of library.
    """
    with tempfile.TemporaryDirectory(prefix="raydream-index-") as folder:
        try:
            files = resolve(uri, None)
            for name in _index_names(files):
                _copy(files, name, Path(folder))
        except (OSError, ValueError) as error:
            raise ValueError(f"library.source: cannot read {uri}: {error}") from error
        yield Path(folder)


def as_remote(record: AssetRecord, index: Path, uri: str) -> AssetRecord:
    """A record of ``index_of``'s copy as one whose file lies below the URI."""
    return replace(record, path=record.path.relative_to(index), root=uri)


@contextmanager
def local_asset(record: AssetRecord, max_bytes: int) -> Iterator[AssetRecord]:
    """The record with its file on this machine, until the end of the block; a local record is itself.

    A GLB comes alone, any other format with its whole folder. AssetError ``missing_file``, ``outside_folder`` or
    ``too_large`` (more than ``max_bytes`` in all) before anything large is copied.
    """
    if not record.root:
        yield record
        return
    name = posixpath.normpath(PurePosixPath(record.path).as_posix())
    if name.startswith(("/", "..")):
        raise AssetError("outside_folder", name[:200])
    with tempfile.TemporaryDirectory(prefix="raydream-asset-") as folder:
        try:
            files = resolve(record.root, None)
            sizes = _wanted(files, name)
            if sum(sizes.values()) > max_bytes or len(sizes) > _MAX_FILES:
                raise AssetError("too_large", f"{len(sizes)} files of {sum(sizes.values())} bytes")
            for each in sizes:
                _copy(files, each, Path(folder))
        except (OSError, ValueError) as error:
            raise AssetError("missing_file", str(error)[:200]) from error
        yield replace(record, path=Path(folder) / name, root="")


def _index_names(files: LocalFiles | RemoteFiles) -> list[str]:
    names = [name for name in (MANIFEST, FRONTS, SUBSETS, OBJECT_PATHS, LVIS) if files.exists(name)]
    if not {MANIFEST, OBJECT_PATHS} & set(names):
        raise ValueError(f"neither {MANIFEST} nor {OBJECT_PATHS} in it")
    if OBJECT_PATHS in names:
        names += [f"{METADATA}/{name}" for name in files.sizes(METADATA)]
    return names


def _wanted(files: LocalFiles | RemoteFiles, name: str) -> dict[str, int]:
    """Sizes of the asset's file and of those that it may name."""
    if not files.exists(name):
        raise AssetError("missing_file", name[:200])
    home, base = posixpath.split(name)
    sizes = {posixpath.join(home, each): size for each, size in files.sizes(home).items()}
    return {name: sizes[name]} if base.lower().endswith(_LONELY) else sizes


def _copy(files: LocalFiles | RemoteFiles, name: str, folder: Path) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(files.read(name))
