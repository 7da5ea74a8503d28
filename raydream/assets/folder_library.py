"""Which assets lie in a folder: by its manifest, in Objaverse's layout, or as they are, named by their files."""

import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from raydream.assets.files import CONVERTERS, SUFFIXES, is_hidden
from raydream.assets.libraries import (
    MANIFEST,
    OBJECT_PATHS,
    AssetRecord,
    iterate_objaverse_folder,
    read_manifest_folder,
)

OBJAVERSE_HOME = "hf-objaverse-v1"  # what Objaverse's own package makes in ~/.objaverse
LISTING = "asset_files.txt"  # stands for the files themselves in the copy of a remote library's index
# Names that say nothing of an object: those of exporters, of download sites and of their folders.
_EMPTY_WORDS = frozenset({
    "model", "models", "mesh", "meshes", "scene", "scenes", "object", "objects", "asset", "assets", "untitled",
    "unnamed", "textured", "texture", "textures", "source", "output", "export", "exports", "file", "files", "format",
    "default", "root", "main", "data", "glb", "glbs", "gltf", "obj", "ply", "stl", "usdz", "normalized", "version",
})  # fmt: skip
_MARKS = frozenset({"copy", "final", "lod"})

NamesIn = Callable[[str], Iterable[str]]
_log = logging.getLogger(__name__)


def read_library(folder: Path, uids: frozenset[str], names_in: NamesIn) -> Iterable[AssetRecord]:
    """The records of a folder of any kind, or of the copy of a remote one's index; of Objaverse only ``uids`` if there
    are any. ``names_in`` lists the names in a folder of the library itself.

    ValueError naming ``assets`` where an index is broken, or ``library.source`` where there is no asset.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest_folder(folder)
    if (folder / OBJECT_PATHS).is_file():
        return iterate_objaverse_folder(folder, uids, names_in)
    home = folder / OBJAVERSE_HOME
    if (home / OBJECT_PATHS).is_file():
        return iterate_objaverse_folder(home, uids, lambda name: names_in(f"{OBJAVERSE_HOME}/{name}"))
    if (folder / LISTING).is_file():
        return _records_of_files(folder, (folder / LISTING).read_text(encoding="utf-8").splitlines())
    names = _find_files(folder)
    check_asset_files(names, str(folder))
    return _records_of_files(folder, names)


def check_library(folder: Path) -> None:
    """ValueError naming ``library.source`` where a folder on this machine has neither an index nor an asset."""
    indices = (MANIFEST, OBJECT_PATHS, f"{OBJAVERSE_HOME}/{OBJECT_PATHS}")
    if not any((folder / name).is_file() for name in indices):
        check_asset_files(_find_files(folder), str(folder))


def _find_files(folder: Path) -> list[str]:
    """The files below a folder, by their relative names."""
    return [(Path(home) / name).relative_to(folder).as_posix() for home, _, names in os.walk(folder) for name in names]


def names_below(folder: Path) -> NamesIn:
    """Lists the folders of a library on this machine; one that is not there is empty."""
    return lambda name: os.listdir(folder / name) if (folder / name).is_dir() else []


def asset_files(names: Iterable[str]) -> list[str]:
    """Those of the relative names that are of asset files, hidden ones left out."""
    return [name for name in names if name.lower().endswith(SUFFIXES) and not is_hidden(name)]


def check_asset_files(names: Iterable[str], source: str) -> None:
    """ValueError naming ``library.source`` where none of the names is of an asset: what was looked for, what is there
    instead, and how to convert it.
    """
    names = list(names)
    if asset_files(names):
        return
    kinds = Counter(posixpath.splitext(name.lower())[1] for name in names if not is_hidden(name))
    there = ", ".join(f"{count} {kind[:20] or 'without suffix'}" for kind, count in kinds.most_common(5))
    converter = next((f"; convert {kind} with {CONVERTERS[kind]}" for kind in kinds if kind in CONVERTERS), "")
    raise ValueError(
        f"library.source: no asset in {source}: looked for {MANIFEST}, {OBJECT_PATHS} (also in {OBJAVERSE_HOME}/) and, "
        f"in it and below, {', '.join('*' + suffix for suffix in SUFFIXES)}; there are {there or 'no files'}{converter}"
    )


def plain_name(path: PurePosixPath) -> str | None:
    """What a file is called in plain words, by its own name or that of the nearest folder that says something:
    ``red_chair-03.glb`` and ``RedChair/scene.gltf`` are a "red chair"; None where nothing does.
    """
    parts = (path.stem, *(folder.name for folder in path.parents))
    return next((words for part in parts if (words := _plain_words(part))), None)


def _records_of_files(folder: Path, names: Iterable[str]) -> list[AssetRecord]:
    """A record for each object; of one in several formats side by side the first of ``SUFFIXES`` is taken."""
    by_object: dict[str, list[str]] = {}
    for name in asset_files(names):
        stem, suffix = posixpath.splitext(name)
        by_object.setdefault(stem, []).append(suffix)
    num_others = sum(len(suffixes) - 1 for suffixes in by_object.values())
    if num_others:
        _log.warning("library: %d files are another format of one beside them; left out", num_others)
    rank = {suffix: number for number, suffix in enumerate(SUFFIXES)}
    chosen = (stem + min(found, key=lambda each: (rank[each.lower()], each)) for stem, found in by_object.items())
    return [_record_of_file(folder, name) for name in sorted(chosen)]


def _record_of_file(folder: Path, name: str) -> AssetRecord:
    path = PurePosixPath(name)
    called = plain_name(path)
    folders = [words for parent in path.parents if (words := _plain_words(parent.name))]
    return AssetRecord(
        uid=name,
        path=folder / name,
        captions=(called,) if called else (),
        tags=tuple(dict.fromkeys(folders)),
        category=folders[0] if folders else None,
    )


def _plain_words(name: str) -> str:
    """A name in lower-case words without numbers, codes and the marks of versions; empty where that leaves nothing."""
    if re.fullmatch(r"[0-9a-fA-F-]{16,}", name):
        return ""  # a hash
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[\W_]+", spaced.lower())]
    kept = [word for word in words if word not in _MARKS and not re.search(r"\d", word)]
    kept = [word for word in kept if len(word) > 1 or word > "\x7f"]  # one letter is a word in Chinese, not in English
    return "" if set(kept) <= _EMPTY_WORDS else " ".join(kept)
