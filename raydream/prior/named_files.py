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
_MTL_OPTION = re.compile(r"-\w+(\s+([-+]?[\d.]+(e[-+]?\d+)?|on|off|[rgbmlz])(?=\s))*\s+", re.IGNORECASE)
_PLY_TEXTURE = re.compile(rb"^comment[ \t]+TextureFile[ \t]+([^\r\n]{1,1000})", re.MULTILINE)
_PLY_HEADER_BYTES = 2**16


def named_files(name: str, data: bytes) -> list[str]:
    """The files that ``data``, the content of file ``name``, names: normalised relative paths below its folder, once
    each; those that would lie outside are left out, as whoever reads the asset refuses them.
    """
    below = (posixpath.normpath(other.strip().replace("\\", "/")) for other in _named(name, data))
    fine = [
        other for other in below if other != "." and not other.startswith(("/", "..")) and not set(other) & {":", "\0"}
    ]
    return list(dict.fromkeys(fine))


def _named(name: str, data: bytes) -> Iterator[str]:
    match posixpath.splitext(name.lower())[1]:
        case ".glb" | ".gltf":
            text = _json_chunk(data)
            for match in _GLTF_URI.finditer(text):
                uri = _json_string(match[1])
                yield from (unquote(uri), uri)
        case ".obj":
            for match in _OBJ_LIBRARY.finditer(data):
                line = match[1].decode(errors="replace")
                yield line
                yield from line.split()
        case ".mtl":
            for match in _MTL_MAP.finditer(data):
                line = match[1].decode(errors="replace")
                yield line[place.end() :] if (place := re.match(rf"(?:{_MTL_OPTION.pattern})+", line)) else line
        case ".ply":
            for match in _PLY_TEXTURE.finditer(data[:_PLY_HEADER_BYTES]):
                yield match[1].decode(errors="replace")


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
