"""Where an asset's files are read from: its own folder, or the archive that it came in. Nothing else is ever opened.

Files come from strangers: every name in one may lead elsewhere, and every size may be a lie.
"""

import io
import os
import posixpath
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote

from raydream.assets.error import AssetError
from raydream.store.faults import is_passing

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".usdz", ".zip")
CONVERTERS = {
    ".fbx": "Blender (File, Export, glTF 2.0) or FBX2glTF",
    ".dae": "Blender (File, Export, glTF 2.0) or COLLADA2GLTF",
} | dict.fromkeys((".blend", ".3ds", ".usd", ".usda", ".usdc"), "Blender (File, Export, glTF 2.0)")
_MAX_NAMES = 4000  # that are looked at for one that is spelt otherwise
_MAX_MEMBERS = 20_000
# What an archive is taken for where it holds several models: the kinds that say most of colours first.
_PREFERRED = (".glb", ".gltf", ".obj", ".ply", ".stl")


@dataclass(frozen=True)
class AssetLimits:
    """What one asset may cost; more than this and it is refused with ``too_large`` before memory is spent on it."""

    max_bytes: int = 512 * 2**20
    max_faces: int = 2_000_000
    max_vertices: int = 6_000_000
    max_nodes: int = 100_000
    max_texture_px: int = 2**26
    texture_side_px: int = 1024  # larger images are reduced to this, not refused


@runtime_checkable
class Folder(Protocol):
    """The files that an asset may name, by relative URIs or paths, percent-encoded or not."""

    def read(self, name: str, max_bytes: int) -> bytes:
        """A file's content; AssetError ``missing_file``, ``outside_folder`` or ``too_large``."""

    def names(self) -> list[str]:
        """The files that are there, as far as they are looked through for one that is spelt otherwise."""


@dataclass(frozen=True)
class DiskFolder:
    """A folder of this machine; ``names`` are of its files and of those one level below."""

    path: Path

    def read(self, name: str, max_bytes: int) -> bytes:
        return read_limited(resolve_inside(self.path, name), max_bytes)

    def names(self) -> list[str]:
        names = list(islice(self._walk(), _MAX_NAMES + 1))
        return sorted(names) if len(names) <= _MAX_NAMES else []  # else a library, not the folder of one asset

    def _walk(self) -> Iterator[str]:
        below = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry)
                    else:
                        yield entry.name
            for folder in below:
                with os.scandir(folder) as entries:
                    yield from (f"{folder.name}/{entry.name}" for entry in entries)
        except OSError as error:  # what may not be listed is not looked through
            if is_passing(error):
                raise


@dataclass
class ZipFolder:
    """An archive, read in place: nothing is unpacked, so nothing can be written anywhere. ``home`` is the model's
    folder in it, ``bytes_left`` how much may still be unpacked of it.
    """

    archive: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]
    home: str
    bytes_left: int

    def read(self, name: str, max_bytes: int) -> bytes:
        for candidate in (unquote(name), name):
            path = posixpath.normpath(posixpath.join(self.home, candidate.replace("\\", "/")))
            if _leads_away(candidate) or path.startswith(("/", "..")):
                raise AssetError("outside_folder", name[:200])
            if path in self.members:
                return self._unpack(self.members[path], max_bytes)
        raise AssetError("missing_file", name[:200])

    def names(self) -> list[str]:
        return [posixpath.relpath(name, self.home or ".") for name in sorted(self.members)]

    def _unpack(self, member: zipfile.ZipInfo, max_bytes: int) -> bytes:
        limit = min(max_bytes, self.bytes_left)
        try:
            with self.archive.open(member) as file:
                data = file.read(limit + 1)
        except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise AssetError("malformed", f"{member.filename[:100]} in the archive: {error}"[:200]) from error
        if len(data) > limit:
            raise AssetError("too_large", f"{member.filename[:100]} in the archive unpacks to over {limit} bytes")
        self.bytes_left -= len(data)
        return data


def open_archive(data: bytes, max_bytes: int) -> ZipFolder:
    """The files of a zip, of which at most ``max_bytes`` are unpacked; AssetError ``malformed`` or ``too_large``."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        infos = archive.infolist()
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise AssetError("malformed", f"zip: {error}"[:200]) from error
    if len(infos) > _MAX_MEMBERS:
        raise AssetError("too_large", f"an archive of {len(infos)} files")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = posixpath.normpath(info.filename.replace("\\", "/"))
        if not info.is_dir() and not is_hidden(name) and not name.startswith("/"):
            members.setdefault(name, info)
    return ZipFolder(archive, members, "", max_bytes)


def choose_model(folder: ZipFolder) -> tuple[ZipFolder, str, list[str]]:
    """The archive as the folder of the model that it is taken for, that model's name in it, and its other models.

    Raises AssetError ``unsupported_format`` where it has none that is read; archives in archives are not opened.
    """
    suffix = {name: posixpath.splitext(name)[1].lower() for name in folder.members}
    models = [name for name in folder.members if suffix[name] in _PREFERRED]
    if not models:
        others = sorted(CONVERTERS.keys() & suffix.values())
        told = f"; {why_unsupported(others[0])}" if others else ""
        raise AssetError("unsupported_format", f"an archive without {', '.join(_PREFERRED)}{told}")
    models.sort(key=lambda name: (_PREFERRED.index(suffix[name]), -folder.members[name].file_size, name))
    return replace(folder, home=posixpath.dirname(models[0])), posixpath.basename(models[0]), models[1:]


def read_named(folder: Folder, name: str, max_bytes: int) -> bytes:
    """A texture or a file of materials as people's files name it: in quotes, in another case, by a path of the machine
    that it was made on. What is taken instead lies in the same ``folder`` and is the only one of that name.

    Raises AssetError as ``Folder.read`` does for the name as it stands.
    """
    name = name.strip().strip("\"'").strip()
    try:
        return folder.read(name, max_bytes)
    except AssetError as error:
        if error.reason not in ("missing_file", "outside_folder"):
            raise
        # beside other assets of a library lie other textures of the same name, in an archive only its own
        whole_path = error.reason == "missing_file" and isinstance(folder, DiskFolder)
        found = _like(folder.names(), name, whole_path)
        if found is None:
            raise
    return folder.read(found, max_bytes)


def _like(names: list[str], wanted: str, whole_path: bool) -> str | None:
    """The one name with the longest end in common with ``wanted``, by whole parts of the path, and of several the one
    that lies highest; None if there is none or no such one.
    """
    parts = _parts(unquote(wanted))
    ranks = {}
    for name in names:
        common_end = posixpath.commonprefix([_parts(name)[::-1], parts[::-1]])
        ranks[name] = (len(common_end), -len(_parts(name)))
    highest = max(ranks.values(), default=(0, 0))
    best = [name for name, rank in ranks.items() if rank == highest]
    least = len(parts) if whole_path else 1
    return best[0] if parts[-1] and highest[0] >= least and len(best) == 1 else None


def _parts(name: str) -> list[str]:
    path = posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    return path.casefold().split("/")


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file; AssetError ``missing_file`` or ``too_large``. Never blocks on a pipe or device.

    OSError where its disk is away, which says nothing of the file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise AssetError("missing_file", f"{path.name} is not a regular file")
        if status.st_size > max_bytes:
            raise AssetError("too_large", f"{path.name} has {status.st_size} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if is_passing(error):
            raise
        raise AssetError("missing_file", str(error)) from error


def resolve_inside(folder: Path, name: str) -> Path:
    """Where a file named by an asset lies; AssetError ``outside_folder`` unless that is truly below ``folder``.

    ``name`` is a relative URI, percent-encoded or not. Links are followed before the check.
    """
    for candidate in (unquote(name), name):
        if _leads_away(candidate):
            raise AssetError("outside_folder", name[:200])
        try:
            path = (folder / candidate.replace("\\", "/")).resolve()
            exists = path.exists()
        except (OSError, RuntimeError) as error:  # a name too long, a loop of links
            if is_passing(error):
                raise
            raise AssetError("missing_file", str(error)[:200]) from error
        if not path.is_relative_to(folder.resolve()):
            raise AssetError("outside_folder", name[:200])
        if exists:
            return path
    raise AssetError("missing_file", name[:200])


def _leads_away(name: str) -> bool:
    """Whether a name is a URL or has a drive letter."""
    return re.match(r"[A-Za-z][\w+.-]*:", name) is not None or "\0" in name


def why_unsupported(suffix: str) -> str:
    """What to tell a person whose asset has another suffix: what turns it into one that is read."""
    converter = CONVERTERS.get(suffix.lower())
    if converter:
        return f"{suffix.lower()} is not read; convert it with {converter}"
    return f"{suffix[:20] or 'a file without suffix'} is not read; {', '.join(SUFFIXES)} are"


def is_hidden(name: str) -> bool:
    """Whether a relative path is of no interest to people: what programs keep for themselves."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
