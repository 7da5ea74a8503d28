"""Which other files an asset's file names, read from its bytes without understanding the rest of it.

Patterns rather than parsers: the bytes are a stranger's, and whoever asks is not the process that may die of them.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from urllib.parse import unquote

_GLTF_URI = re.compile(rb'"uri"\s*:\s*"((?!data:)[^"]{1,1000})"')
_OBJ_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]{1,1000})", re.MULTILINE)
_MTL_MAP = re.compile(rb"^[ \t]*map_\w+[ \t]+([^\r\n]{1,1000})", re.MULTILINE | re.IGNORECASE)
_MTL_OPTIONS = re.compile(r"(-\w+(\s+([-+]?[\d.]+(e[-+]?\d+)?|on|off|[rgbmlz])(?=\s))*\s+)+", re.IGNORECASE)
_PLY_TEXTURE = re.compile(rb"^comment[ \t]+TextureFile[ \t]+([^\r\n]{1,1000})", re.MULTILINE)
_PLY_HEADER_BYTES = 2**16


def named_files(name: str, data: bytes) -> list[tuple[str, ...]]:
    """The files that ``data``, the content of file ``name``, names, each by the readings of its name, the likely first.

    Normalised relative paths; what would lie outside of the folder is left out, as whoever reads the asset refuses it.
    """
    found = (tuple(filter(None, map(_below, readings))) for readings in _named(name, data))
    return list(dict.fromkeys(filter(None, found)))


def _below(name: str) -> str:
    """A name as a normalised path below its folder, "" where it is none."""
    path = posixpath.normpath(name.strip().replace("\\", "/"))
    return "" if path == "." or path.startswith(("/", "..")) or set(path) & {":", "\0"} else path


def _named(name: str, data: bytes) -> Iterator[tuple[str, ...]]:
    match posixpath.splitext(name.lower())[1]:
        case ".glb" | ".gltf":
            for match in _GLTF_URI.finditer(_json_chunk(data)):
                uri = _json_string(match[1])
                yield tuple(dict.fromkeys((unquote(uri), uri)))
        case ".obj":
            for match in _OBJ_LIBRARY.finditer(data):
                line = match[1].decode(errors="replace").strip()
                yield (line,)
                yield from ((word,) for word in line.split() if word != line)  # several, or one with spaces
        case ".mtl":
            for match in _MTL_MAP.finditer(data):
                line = match[1].decode(errors="replace")
                options = _MTL_OPTIONS.match(line)
                yield (line[options.end() :] if options else line,)
        case ".ply":
            for match in _PLY_TEXTURE.finditer(data[:_PLY_HEADER_BYTES]):
                yield (match[1].decode(errors="replace"),)


def _json_chunk(data: bytes) -> bytes:
    """The JSON of a glTF file: all of it, or the first chunk of a GLB."""
    if not data.startswith(b"glTF"):
        return data
    return data[20 : 20 + int.from_bytes(data[12:16], "little")]


def _json_string(raw: bytes) -> str:
    try:
        return str(json.loads(b'"' + raw + b'"'))
    except ValueError:  # whoever reads the asset will say what is wrong with it
        return ""
