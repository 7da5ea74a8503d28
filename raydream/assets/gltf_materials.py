"""The colours of a glTF file: base colour, what shines by itself, and the images of both. What cannot be read is left
out with a warning that names it.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from raydream.assets.asset import WRAP_CLAMP, WRAP_MIRROR, WRAP_REPEAT
from raydream.assets.error import AssetError
from raydream.assets.gltf_file import GltfFile, is_count
from raydream.assets.images import decode_texture, texture_warning
from raydream.assets.parts import BLEND_CUTOFF, DARK, Material, shines, with_emission

WRAP_MODES = {10497: WRAP_REPEAT, 33648: WRAP_MIRROR, 33071: WRAP_CLAMP}
FILTER_NEAREST = 9728
# Which image stands for a texture: one of these before the plain ``source``, which is the fallback.
READABLE_SOURCES = ("EXT_texture_webp", "EXT_texture_avif", "MSFT_texture_dds")
# A metal of the older model has its colour here and is black by its diffuse colour; any other surface has 0.04.
METAL_SPECULAR = 0.08


@dataclass(frozen=True, eq=False)
class Layer:
    """A colour of a material; ``texture`` says how its image lies on a surface, empty where there is none."""

    material: Material
    texture: dict = field(default_factory=dict)
    texture_name: str = ""


class MaterialReader:
    """Reads each material and image of a file once."""

    def __init__(self, file: GltfFile) -> None:
        self._file = file
        self._layers: dict[int, tuple[Layer, Layer | None]] = {}
        self._joined: dict[tuple[int, bool], Material] = {}
        self._images: dict[int, np.ndarray | str] = {}  # a string is why there is none

    def layers(self, index: object) -> tuple[Layer, Layer | None]:
        """Base colour and what shines by itself, of the material of a primitive; None as the index is plain white."""
        if index is None:
            return Layer(Material()), None
        spec = self._file.item("materials", index)
        assert is_count(index)
        if index not in self._layers:
            base, glow = self._base(spec), self._glow(spec)
            self._layers[index] = base, glow if glow and shines(base.material, glow.material) else None
        return self._layers[index]

    def joined(self, index: int, apart: bool) -> Material | None:
        """Both layers in one; None where that cannot be told in one image, as where they lie ``apart`` on a surface."""
        base, glow = self._layers[index]
        assert glow is not None
        if (index, apart) not in self._joined:
            alone = replace(base.material, image=None) if apart else base.material
            self._joined[index, apart] = with_emission(alone, glow.material)
        lost = apart and (base.material.factor[:3].any() or base.material.alpha_cutoff is not None)
        return None if lost else self._joined[index, apart]

    def _base(self, spec: dict) -> Layer:
        gloss = spec.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
        base = spec.get("pbrMetallicRoughness", {})
        factor = base.get("baseColorFactor") if gloss is None else gloss.get("diffuseFactor")
        texture = base.get("baseColorTexture") if gloss is None else gloss.get("diffuseTexture")
        factor = _colour([1, 1, 1, 1] if factor is None else factor, 4)
        mode = spec.get("alphaMode", "OPAQUE")
        cutoff = {"OPAQUE": None, "MASK": float(spec.get("alphaCutoff", 0.5)), "BLEND": BLEND_CUTOFF}[mode]
        if gloss is not None and not factor[:3].any() and cutoff is None:
            specular = _colour(gloss.get("specularFactor", [0, 0, 0]), 3)
            if specular.max() > METAL_SPECULAR:
                factor, texture = np.append(specular, 1.0), gloss.get("specularGlossinessTexture")
        return self._layer(texture, factor, cutoff)

    def _glow(self, spec: dict) -> Layer | None:
        """What a material emits, without its strength: a colour, not a brightness. None where that is nothing."""
        factor = _colour(spec.get("emissiveFactor", [0, 0, 0]), 3)
        if not factor.any() or "KHR_materials_unlit" in spec.get("extensions", {}):
            return None
        texture = spec.get("emissiveTexture")
        glow = self._layer(texture, np.append(factor, 1.0), None)
        image = glow.material.image
        if texture is not None and (image is None or image[..., :3].max() <= DARK):
            return None
        return glow

    def _layer(self, texture: dict | None, factor: np.ndarray, cutoff: float | None) -> Layer:
        """A factor and its texture; the factor alone, with a warning, where the image cannot be read."""
        if texture is None:
            return Layer(Material(factor, alpha_cutoff=cutoff))
        reference = self._file.item("textures", texture["index"])
        sampler = self._file.item("samplers", reference["sampler"]) if "sampler" in reference else {}
        wrap_s, wrap_t = (WRAP_MODES.get(sampler.get(key, 10497), WRAP_REPEAT) for key in ("wrapS", "wrapT"))
        smooth = sampler.get("magFilter") != FILTER_NEAREST
        image, name = self._image(reference)
        if image is None:
            return Layer(Material(factor, alpha_cutoff=cutoff))
        return Layer(Material(factor, image, (wrap_s, wrap_t), smooth, cutoff), texture, name)

    def _image(self, texture: dict) -> tuple[np.ndarray | None, str]:
        """RGBA bytes of the first of a texture's images that can be read, and its name; else None and a warning."""
        extensions = texture.get("extensions", {})
        readable = [extensions[name].get("source") for name in READABLE_SOURCES if name in extensions]
        others = [value.get("source") for name, value in extensions.items() if name not in READABLE_SOURCES]
        for source in (source for source in (*readable, texture.get("source")) if source is not None):
            image = self._decoded(source)
            if not isinstance(image, str):
                return image, self._file.image_name(source)
        named = [source for source in (*others, *readable, texture.get("source")) if source is not None]
        word = "texture_compression_unsupported" if extensions else "texture_missing"
        if named and named[0] in self._images:
            word = str(self._images[named[0]])
        self._file.source.warn(word, self._file.image_name(named[0]) if named else "")
        return None, ""

    def _decoded(self, source: object) -> np.ndarray | str:
        if not is_count(source):
            raise AssetError("bad_reference", f"images[{source!r}]")
        if source not in self._images:
            self._images[source] = self._decode(source)
        return self._images[source]

    def _decode(self, source: int) -> np.ndarray | str:
        data = b""
        try:
            data = self._file.image_bytes(source)
            return decode_texture(data, self._file.source.limits)
        except AssetError as error:
            is_compressed = error.reason == "bad_texture" and data.startswith(b"\xabKTX")
            return "texture_compression_unsupported" if is_compressed else texture_warning(error)


def _colour(value: object, width: int) -> np.ndarray:
    colour = np.nan_to_num(np.asarray(value, np.float64), nan=1.0).clip(0, 1)
    if colour.shape != (width,):
        raise AssetError("malformed", f"a colour of {width} numbers is {str(value)[:100]}")
    return colour
