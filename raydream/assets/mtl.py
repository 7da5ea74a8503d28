"""The materials of a Wavefront OBJ: its MTL files as people's programs write them, and the images that they name.

trimesh reads the shape of an OBJ, but of its materials only plain lines: textures with options, in another case, format
or place come out white there without a word. Source: the MTL format as Alias|Wavefront described it.
"""

import re
from dataclasses import dataclass, field, replace

import numpy as np

from raydream.assets.asset import WRAP_CLAMP, WRAP_REPEAT
from raydream.assets.error import AssetError
from raydream.assets.files import read_named
from raydream.assets.images import AssetSource
from raydream.assets.parts import Material, linear_from_srgb, shines, with_emission

# How many words follow each option of a map; what is not here has one.
_OPTION_WORDS = {"s": 3, "o": 3, "t": 3, "mm": 2}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
NAMES_OF_NO_MATERIAL = frozenset({"", "None", "(null)"})


@dataclass(frozen=True, eq=False)
class ObjMaterial:
    """A material and how its image lies on a surface: texture coordinates (v up) times ``scale`` plus ``offset``."""

    material: Material = field(default_factory=Material)
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)


def read_materials(obj: str, source: AssetSource) -> dict[str, ObjMaterial]:
    """The materials of all files that an OBJ names, by name; warns of files, images and names not found.

    Raises AssetError ``too_large``.
    """
    found: dict[str, ObjMaterial] = {}
    lines = re.findall(r"^[ \t]*mtllib[ \t]+(.+?)[ \t\r]*$", obj, re.MULTILINE)
    for line in dict.fromkeys(lines):
        for text in _library_texts(line, source):
            found |= _read_library(text, source)
    if found:
        used = re.findall(r"^[ \t]*usemtl[ \t]+(.+?)[ \t\r]*$", obj, re.MULTILINE)
        for name in sorted(set(used) - found.keys() - NAMES_OF_NO_MATERIAL):
            source.warn("material_missing", name)
    return found


def _library_texts(line: str, source: AssetSource) -> list[str]:
    """The files of a ``mtllib`` line: one name that may hold spaces, or several names."""
    try:
        return [decoded(read_named(source.folder, line, source.limits.max_bytes))]
    except AssetError as error:
        if error.reason == "too_large":
            raise
        names = line.split()
        if len(names) > 1:
            return [text for name in names for text in _library_texts(name, source)]
        outside = error.reason == "outside_folder"
        source.warn("material_file_outside_folder" if outside else "material_file_missing", line)
        return []


def _read_library(text: str, source: AssetSource) -> dict[str, ObjMaterial]:
    lines: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        key, value = [*line.split(maxsplit=1), "", ""][:2]
        if key.lower() == "newmtl":
            current = lines.setdefault(" ".join(value.split()), {})
        else:
            current[key.lower()] = value.strip()
    return {name: _material(values, source) for name, values in lines.items()}


def _material(values: dict[str, str], source: AssetSource) -> ObjMaterial:
    base = _layer(values.get("map_kd"), _colour(values.get("kd")), source, paints_alone=True)
    glow_colour = _colour(values.get("ke") or ("1 1 1" if "map_ke" in values else "0 0 0"))
    if not glow_colour[:3].any():
        return base
    glow = _layer(values.get("map_ke"), glow_colour, source, paints_alone=False)
    if ("map_ke" in values and glow.material.image is None) or not shines(base.material, glow.material):
        return base
    placed = base if glow.material.image is None else glow
    both = base.material.image is not None and glow.material.image is not None
    if both and _place(base) != _place(glow):
        source.warn("emissive_ignored", values["map_ke"])
        return base
    return replace(placed, material=with_emission(base.material, glow.material))


def _layer(map_line: str | None, factor: np.ndarray, source: AssetSource, paints_alone: bool) -> ObjMaterial:
    """A colour and its map. What a base's image says is all: many files say ``Kd 0 0 0`` beside it."""
    if map_line is None:
        return ObjMaterial(Material(factor))
    name, options = _split_map(map_line)
    image = source.texture(name)
    if image is None:
        return ObjMaterial(Material(factor))
    if [float(word) for word in options.get("mm", "0 1").split()] not in ([0], [0, 1]) or "imfchan" in options:
        source.warn("texture_options_ignored", map_line)
    wrap = WRAP_CLAMP if options.get("clamp", "").lower() == "on" else WRAP_REPEAT
    material = Material(np.ones(4) if paints_alone else factor, image, (wrap, wrap))
    return ObjMaterial(material, _pair(options.get("s"), 1.0), _pair(options.get("o"), 0.0))


def _split_map(line: str) -> tuple[str, dict[str, str]]:
    """The file of a ``map_`` line, which may hold spaces, and its options: ``-s 2 2 1 -clamp on my wood.png``."""
    options: dict[str, str] = {}
    rest = line.strip()
    while match := re.match(r"-([a-z]+)\s+", rest):
        option, rest = match[1], rest[match.end() :]
        most = _OPTION_WORDS.get(option, 1)
        words = rf"(?:{_NUMBER}\s+){{1,{most}}}" if most > 1 else r"\S+\s+"
        value = re.match(words, rest)
        if value is None:
            break
        options[option], rest = value[0].strip(), rest[value.end() :]
    return rest, options


def _pair(option: str | None, default: float) -> tuple[float, float]:
    numbers = [] if option is None else [float(word) for word in option.split()]
    u, v = [*numbers, default, default][:2]
    return u, v


def _colour(value: str | None) -> np.ndarray:
    """A colour as it is shown, as linear RGBA; white where the line is missing or no colour."""
    words = re.findall(_NUMBER, value or "1 1 1")
    shown = [float(word) for word in (words * 3 if len(words) == 1 else words)[:3]]
    shown = shown if len(shown) == 3 else [1.0, 1.0, 1.0]
    return np.append(linear_from_srgb(np.clip(shown, 0, 1)), 1.0)


def _place(placed: ObjMaterial) -> tuple[object, ...]:
    return (placed.scale, placed.offset, placed.material.wrap)


def decoded(text: bytes) -> str:
    """Text of a file that does not say its encoding."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return text.decode("cp1252", errors="replace")
