"""The colours of a USD stage: UsdPreviewSurface with its textures, and displayColor. Needs usd-core.

What another kind of shader would show is left out with a warning. Source: the UsdPreviewSurface specification.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pxr import Sdf, Usd, UsdShade

from raydream.assets.asset import WRAP_CLAMP, WRAP_MIRROR, WRAP_REPEAT
from raydream.assets.images import AssetSource
from raydream.assets.parts import BLEND_CUTOFF, Material, shines, with_emission

WRAPS = {"repeat": WRAP_REPEAT, "mirror": WRAP_MIRROR, "clamp": WRAP_CLAMP, "black": WRAP_CLAMP}
DIFFUSE, COORDINATES, COLOURS = (0.18, 0.18, 0.18), "st", "displayColor"


@dataclass(frozen=True, eq=False)
class UsdMaterial:
    """A material, the primvars of its texture coordinates and colours ("": none), and what turns the coordinates (v up)
    into those of the image.
    """

    material: Material = field(default_factory=Material)
    coordinates: str = ""
    colours: str = ""
    turn: np.ndarray = field(default_factory=lambda: np.eye(2, 3))

    def lies_as(self, other: "UsdMaterial") -> bool:
        """Whether both images lie on a surface in the same way."""
        same = (self.coordinates, self.material.wrap) == (other.coordinates, other.material.wrap)
        return same and np.array_equal(self.turn, other.turn)


class UsdMaterials:
    """Reads each material of a stage once."""

    def __init__(self, source: AssetSource) -> None:
        self._source = source
        self._materials: dict[str, UsdMaterial] = {}

    def of(self, prim: Usd.Prim) -> UsdMaterial:
        """What a mesh or a part of one is painted with: its material, or the colours of its points."""
        bound = UsdShade.MaterialBindingAPI(prim).ComputeBoundMaterial()[0]
        if not bound:
            return UsdMaterial(colours=COLOURS)
        path = str(bound.GetPath())
        if path not in self._materials:
            self._materials[path] = self._read(bound)
        return self._materials[path]

    def _read(self, bound: UsdShade.Material) -> UsdMaterial:
        surface = bound.ComputeSurfaceSource()[0]
        if not surface or surface.GetShaderId() != "UsdPreviewSurface":
            self._source.warn("material_unreadable", str(bound.GetPath()))
            return UsdMaterial(colours=COLOURS)
        base = self._layer(surface, "diffuseColor", DIFFUSE)
        opacity, threshold = self._number(surface, "opacity", 1.0), self._number(surface, "opacityThreshold", 0.0)
        connected = bool(surface.GetInput("opacity")) and surface.GetInput("opacity").HasConnectedSource()
        cutoff = None if opacity >= 1 and not connected else threshold or BLEND_CUTOFF
        factor = np.append(base.material.factor[:3], 1.0 if connected else opacity)
        base = replace(base, material=replace(base.material, factor=factor, alpha_cutoff=cutoff))
        glow = self._layer(surface, "emissiveColor", (0.0, 0.0, 0.0))
        if not shines(base.material, glow.material):
            return base
        images = base.material.image is not None and glow.material.image is not None
        if base.colours or glow.colours or (images and not base.lies_as(glow)):
            self._source.warn("emissive_ignored", str(bound.GetPath()))
            return base
        placed = base if glow.material.image is None else glow
        return UsdMaterial(with_emission(base.material, glow.material), placed.coordinates, "", placed.turn)

    def _number(self, shader: UsdShade.Shader, name: str, default: float) -> float:
        value = _value(shader, name, default)
        return float(value) if isinstance(value, int | float) else default

    def _layer(self, surface: UsdShade.Shader, name: str, default: tuple[float, float, float]) -> UsdMaterial:
        """A colour that is a constant, a texture, or told at the points."""
        source = _source(surface, name)
        if source is None:
            return UsdMaterial(Material(np.array([*default, 1.0])))
        shader = UsdShade.Shader(source.GetPrim())
        kind = shader.GetShaderId() if shader else None
        if kind == "UsdUVTexture":
            return self._texture(shader, default)
        if kind is not None and kind.startswith("UsdPrimvarReader"):
            return UsdMaterial(colours=str(_value(shader, "varname", COLOURS)))
        colour = np.asarray(_value(surface, name, default), np.float64)
        if colour.shape != (3,):
            self._source.warn("material_unreadable", f"{name} of {surface.GetPath()}")
            colour = np.array(default)
        return UsdMaterial(Material(np.append(np.nan_to_num(colour).clip(0, 1), 1.0)))

    def _texture(self, shader: UsdShade.Shader, default: tuple[float, float, float]) -> UsdMaterial:
        file = _value(shader, "file", None)
        name = file.path if isinstance(file, Sdf.AssetPath) else ""
        image = self._source.texture(name)
        if image is None:
            white = (1.0, 1.0, 1.0) if any(default) else default
            return UsdMaterial(Material(np.array([*white, 1.0])))
        scale = np.asarray(_value(shader, "scale", (1, 1, 1, 1)), np.float64)[:3]
        if any(_value(shader, "bias", ())) or _value(shader, "sourceColorSpace", "auto") == "raw":
            self._source.warn("texture_options_ignored", name)
        wrap_s, wrap_t = (WRAPS.get(str(_value(shader, key, "repeat")), WRAP_REPEAT) for key in ("wrapS", "wrapT"))
        coordinates, turn = self._coordinates(shader)
        return UsdMaterial(Material(np.append(scale.clip(0, 1), 1.0), image, (wrap_s, wrap_t)), coordinates, "", turn)

    def _coordinates(self, texture: UsdShade.Shader) -> tuple[str, np.ndarray]:
        """The primvar of a texture's coordinates and what is done to them, ``[2, 3]``."""
        source, turn = _source(texture, "st"), np.eye(2, 3)
        shader = None if source is None else UsdShade.Shader(source.GetPrim())
        if shader and shader.GetShaderId() == "UsdTransform2d":
            angle = math.radians(self._number(shader, "rotation", 0.0))
            scale = np.asarray(_value(shader, "scale", (1, 1)), np.float64)
            rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            move = np.asarray(_value(shader, "translation", (0, 0)), np.float64)
            turn = np.concatenate([rotation * scale, move[:, None]], axis=1)
            source = _source(shader, "in")
            shader = None if source is None else UsdShade.Shader(source.GetPrim())
        return str(_value(shader, "varname", COORDINATES)) if shader else COORDINATES, turn


def _source(shader: UsdShade.Shader, name: str) -> Usd.Attribute | None:
    """What an input's value comes from, past all that only hands it on; None where nothing is said."""
    given = shader.GetInput(name)
    sources = UsdShade.Utils.GetValueProducingAttributes(given) if given else []
    return sources[0] if sources else None


def _value(shader: UsdShade.Shader, name: str, default: Any) -> Any:
    """An input's value at the first moment; the default where nothing is said."""
    source = _source(shader, name)
    value = None if source is None else source.Get(Usd.TimeCode.EarliestTime())
    return default if value is None else value
