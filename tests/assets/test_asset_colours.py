"""The colours of asset files as people's programs write them: the right one, or a warning with the file's name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from gltf_writer import GltfWriter
from PIL import Image

from raydream.assets.asset import Asset
from raydream.assets.error import AssetError, loses_colours, warning, word_of
from raydream.assets.files import AssetLimits
from raydream.assets.images import decode_texture
from raydream.assets.load import load_asset

UV = np.float32([[0, 0], [1, 0], [0, 1]])
RED = Image.new("RGB", (8, 8), (200, 30, 30))
OBJ = "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl skin\nf 1/1 2/2 3/3\n"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(colour_type: int, *pixel: int) -> bytes:
    """A PNG of 4 x 4 pixels of 16 bits, which PIL itself does not write in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(f">{len(pixel)}H", *(257 * value for value in pixel)) * 4
    head = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")


GREY16 = np.full((4, 4), 64 * 257, np.uint16)
IMAGES = {
    "grey of 16 bits": (png16(0, 64), (64, 64, 64, 255)),
    "grey and alpha of 16 bits": (png16(4, 64, 128), (64, 64, 64, 128)),
    "RGB of 16 bits": (png16(2, 200, 30, 30), (200, 30, 30, 255)),
    "RGBA of 16 bits": (png16(6, 200, 30, 30, 128), (200, 30, 30, 128)),
    "TIFF of 16 bits": (encoded(Image.fromarray(GREY16), "TIFF"), (64, 64, 64, 255)),
    "black and white": (encoded(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255, 255)),
    "palette": (encoded(RED.quantize(4), "PNG"), (200, 30, 30, 255)),
    "palette with a hole": (encoded(Image.new("P", (4, 4)), "PNG", transparency=0), (0, 0, 0, 0)),
    "CMYK": (encoded(RED.convert("CMYK"), "JPEG", quality=100), (200, 30, 30, 255)),
    "GIF": (encoded(RED, "GIF"), (200, 30, 30, 255)),
    "TGA": (encoded(RED, "TGA"), (200, 30, 30, 255)),
    "DDS": (encoded(RED, "DDS"), (200, 30, 30, 255)),
    "WebP": (encoded(RED, "WEBP", lossless=True), (200, 30, 30, 255)),
    "AVIF": (encoded(RED, "AVIF", quality=100), (200, 30, 30, 255)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_has_its_colour(name):
    data, colour = IMAGES[name]
    found = decode_texture(data, AssetLimits())
    assert found.shape[2] == 4
    assert np.abs(found[0, 0].astype(int) - colour).max() <= 2  # AVIF and JPEG lose a little


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_numbers_that_are_no_colours_are_refused_not_guessed(mode):
    with pytest.raises(AssetError) as caught:
        decode_texture(encoded(Image.new(mode, (4, 4)), "TIFF"), AssetLimits())
    assert caught.value.reason == "bad_texture"


def textured(data: bytes, texture: dict, **material: object) -> GltfWriter:
    """A triangle whose texture 0 is ``texture``, of the images 0 (unreadable) and 1 (``data``)."""
    writer = GltfWriter()
    writer.attribute("TEXCOORD_0", UV)
    writer.root["images"] = [
        {"bufferView": writer.view(b"\xabKTX 20\xbb\r\n\x1a\n" + bytes(99)), "mimeType": "image/ktx2", "name": "skin"},
        {"bufferView": writer.view(data)},
    ]
    writer.root["textures"] = [texture]
    writer.material(**(material or {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}))
    if "extensions" in texture:
        writer.root["extensionsRequired"] = list(texture["extensions"])
    return writer


def colour_of(asset: Asset) -> tuple[int, ...]:
    """The display colour of an asset that has one."""
    assert (asset.face_texture == asset.face_texture[0]).all()
    colour = asset.corner_colors.flatten(0, 1)[0] * 255
    if asset.face_texture[0] >= 0:
        offset = asset.textures.levels[asset.face_texture[0], 0, 0]
        colour = asset.corner_colors.flatten(0, 1)[0] * asset.textures.texels[offset]
    return tuple(colour.round().int().tolist())


@pytest.mark.parametrize(("extension", "kind"), [("webp", "WEBP"), ("avif", "AVIF"), ("dds", "DDS"), ("plain", "PNG")])
def test_image_extensions_of_gltf(tmp_path, extension, kind):
    names = {"webp": "EXT_texture_webp", "avif": "EXT_texture_avif", "dds": "MSFT_texture_dds"}
    texture = {"extensions": {names[extension]: {"source": 1}}} if extension in names else {"source": 1}
    data = encoded(RED, kind, **({"quality": 100} if kind in ("WEBP", "AVIF") else {}))
    asset = load_asset(textured(data, texture).save(tmp_path / "a.glb"))
    assert np.abs(np.subtract(colour_of(asset), (200, 30, 30))).max() <= 2
    assert asset.warnings == ()


def test_ktx2_is_told_with_the_name_of_the_image_and_its_fallback_used(tmp_path):
    data, basis = encoded(RED, "PNG"), {"KHR_texture_basisu": {"source": 0}}
    for texture in ({"extensions": basis}, {"source": 0}):
        asset = load_asset(textured(data, texture).save(tmp_path / "a.glb"))
        assert (colour_of(asset), asset.warnings) == (
            (255, 255, 255),
            ("texture_compression_unsupported: skin",),
        )
    writer = textured(data, {"extensions": basis, "source": 1})
    assert colour_of(load_asset(writer.save(tmp_path / "b.glb"))) == (200, 30, 30)
    broken = textured(b"RIFF", {"extensions": {"EXT_texture_webp": {"source": 1}}})
    assert load_asset(broken.save(tmp_path / "c.glb")).warnings == ("texture_unreadable: images[1]",)


def test_a_texture_without_coordinates_is_told(tmp_path):
    writer = textured(encoded(RED, "PNG"), {"source": 1})
    del writer.primitive["attributes"]["TEXCOORD_0"]
    assert load_asset(writer.save(tmp_path / "a.glb")).warnings == ("texture_coordinates_missing: images[1]",)


BLACK, BLUE = {"baseColorFactor": [0, 0, 0, 1]}, {"baseColorFactor": [0, 0, 1, 1]}
IMAGE = {"index": 0}


@pytest.mark.parametrize(("material", "colour"), [
    ({"pbrMetallicRoughness": BLACK, "emissiveTexture": IMAGE, "emissiveFactor": [1, 1, 1]}, (200, 30, 30)),
    ({"pbrMetallicRoughness": BLACK, "emissiveFactor": [1, 0, 0]}, (255, 0, 0)),
    ({"pbrMetallicRoughness": BLUE, "emissiveTexture": IMAGE, "emissiveFactor": [1, 1, 1]}, (200, 30, 255)),
    ({"pbrMetallicRoughness": {"baseColorTexture": IMAGE}, "emissiveFactor": [0, 1, 0]}, (200, 255, 30)),
    ({"pbrMetallicRoughness": {"baseColorTexture": IMAGE}, "emissiveTexture": IMAGE, "emissiveFactor": [1, 1, 1]},
     (200, 30, 30)),
    # white all over: what converters leave of an emissive image that they drop
    ({"pbrMetallicRoughness": {"baseColorTexture": IMAGE}, "emissiveFactor": [1, 1, 1]}, (200, 30, 30)),
    ({"pbrMetallicRoughness": BLUE, "emissiveFactor": [0.8, 0.8, 0.8]}, (0, 0, 255)),
    ({"pbrMetallicRoughness": BLACK, "emissiveFactor": [1, 1, 1]}, (255, 255, 255)),
    ({"pbrMetallicRoughness": BLUE, "emissiveTexture": IMAGE}, (0, 0, 255)),  # the factor is black by default
    ({"pbrMetallicRoughness": BLUE, "emissiveFactor": [1, 0, 0], "extensions": {"KHR_materials_unlit": {}}},
     (0, 0, 255)),
    ({"pbrMetallicRoughness": BLACK, "emissiveFactor": [1, 0, 0],
      "extensions": {"KHR_materials_emissive_strength": {"emissiveStrength": 9}}}, (255, 0, 0)),
    ({"extensions": {"KHR_materials_pbrSpecularGlossiness": {"diffuseFactor": [0, 0, 0, 1],
                                                            "specularFactor": [1, 0, 0]}}}, (255, 0, 0)),
    ({"extensions": {"KHR_materials_pbrSpecularGlossiness": {"diffuseFactor": [0, 0, 0, 1]}}}, (0, 0, 0)),
])  # fmt: skip
def test_what_shines_shows_its_colour(tmp_path, material, colour):
    asset = load_asset(textured(encoded(RED, "PNG"), {"source": 1}, **material).save(tmp_path / "a.glb"))
    assert (colour_of(asset), asset.warnings) == (colour, ())


@pytest.mark.parametrize(("second_uv", "white_vertices", "expected"), [
    (UV, True, (200, 0, 0)),  # the same coordinates again for each texture, as many exporters write them
    (UV[::-1], True, None),
    (UV, False, None),
])  # fmt: skip
def test_emission_that_no_single_image_can_hold_is_told(tmp_path, second_uv, white_vertices, expected):
    writer = GltfWriter()
    writer.attribute("TEXCOORD_0", UV)
    writer.attribute("TEXCOORD_1", np.ascontiguousarray(second_uv))
    writer.attribute("COLOR_0", np.full((3, 3), 1 if white_vertices else 0.5, np.float32))
    files = [encoded(Image.new("RGB", (2, 2), colour), "PNG") for colour in ((100, 0, 0), (200, 0, 0))]
    writer.root["images"] = [
        {"bufferView": writer.view(data), "name": name} for data, name in zip(files, ("skin", "lamp"))
    ]
    writer.root["textures"] = [{"source": 0}, {"source": 1}]
    glow = {"emissiveTexture": {"index": 1, "texCoord": 1}, "emissiveFactor": [1, 1, 1]}
    writer.material(pbrMetallicRoughness={"baseColorTexture": {"index": 0}}, **glow)
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    if expected:
        assert (colour_of(asset), asset.warnings) == (expected, ())
    else:
        assert asset.warnings == ("emissive_ignored: lamp",)
    del writer.primitive["attributes"]["COLOR_0"]
    writer.material(pbrMetallicRoughness={"baseColorTexture": {"index": 0}} | BLACK, **glow)
    assert colour_of(load_asset(writer.save(tmp_path / "b.glb"))) == (200, 0, 0)  # a black base hides nothing


def obj(folder: Path, map_line: str, files: dict[str, bytes], more: str = "", text: str = OBJ) -> Asset:
    """An OBJ in ``folder`` whose MTL says so of its texture."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "m.mtl").write_text(f"newmtl skin\nKd 1 1 1\n{more}map_Kd {map_line}\n")
    (folder / "a.obj").write_text(text)
    return load_asset(folder / "a.obj")


PNG = encoded(RED, "PNG")
FOUND = {
    "other case": ("T.PNG", "t.png"),
    "folder in other case": (r"Textures\T.png", "textures/t.png"),
    "quotes": ('"t.png"', "t.png"),
    "spaces": ("my wood 2.png", "my wood 2.png"),
    "quotes and spaces": ('"my wood.png"', "my wood.png"),
    "options": ("-s 1 1 1 -o 0.0 0.0 0.0 -mm 0 1 -bm 1.0 -blendu on -clamp off t.png", "t.png"),
    "fewer numbers": ("-s 1 -o 0 0 -texres 512 t.png", "t.png"),
    "options and spaces": ("-s 1 1 1 my wood.png", "my wood.png"),
    "a number for a name": ("-s 1 1 1 4.png", "4.png"),
    "path of Windows": (r"C:\models\t.png", "t.png"),
    "path of Unix": ("/home/someone/T.png", "t.png"),
    "folder above": (r"..\textures\t.png", "t.png"),
    "umlaut in two characters": ("w\u00e4.png", "wa\u0308.png"),
}


@pytest.mark.parametrize("name", FOUND)
def test_obj_finds_its_texture(tmp_path, name):
    line, file = FOUND[name]
    asset = obj(tmp_path, line, {file: PNG})
    assert (colour_of(asset), asset.warnings) == ((200, 30, 30), ())


@pytest.mark.parametrize(("suffix", "kind"), [("gif", "GIF"), ("tif", "TIFF"), ("tga", "TGA"), ("bmp", "BMP")])
def test_obj_textures_of_other_formats(tmp_path, suffix, kind):
    assert colour_of(obj(tmp_path, f"t.{suffix}", {f"t.{suffix}": encoded(RED, kind)})) == (200, 30, 30)


@pytest.mark.parametrize(("line", "told"), [
    ("absent.png", "texture_missing: absent.png"),
    ("sub/t.png", "texture_missing: sub/t.png"),  # t.png may be another asset's
    ("t.psd", "texture_unreadable: t.psd"),
    ("../secret.png", "texture_outside_folder: ../secret.png"),
    ("{outside}/secret.png", "texture_outside_folder: {outside}/secret.png"),
    ("D:/secret.png", "texture_outside_folder: D:/secret.png"),
    ("link.png", "texture_outside_folder: link.png"),
    ("-mm 0.5 2 t.png", "texture_options_ignored: -mm 0.5 2 t.png"),
])  # fmt: skip
def test_only_the_texture_is_left_out_and_nothing_outside_is_read(tmp_path, line, told):
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "asset").mkdir()
    (tmp_path / "asset" / "link.png").symlink_to(tmp_path / "secret.png")
    line, told = (words.replace("{outside}", str(tmp_path)) for words in (line, told))
    asset = obj(tmp_path / "asset", line, {"t.png": PNG, "t.psd": b"8BPS"})
    assert asset.warnings == (told[:150],)
    assert colour_of(asset) == ((200, 30, 30) if "-mm" in line else (255, 255, 255))
    assert loses_colours(asset.warnings)


def test_two_textures_of_the_name_are_not_guessed_between(tmp_path):
    asset = obj(tmp_path, r"C:\t.png", {"one/t.png": PNG, "two/T.png": PNG})
    assert word_of(asset.warnings[0]) == "texture_outside_folder"


def test_obj_options_move_the_texture(tmp_path):
    asset = obj(tmp_path, "-clamp on -s 2 4 1 -o 0.5 0.25 t.png", {"t.png": PNG})
    found = {tuple(p): uv for p, uv in zip(asset.vertices[asset.faces[0]].tolist(), asset.corner_uv[0].tolist())}
    assert found[(1, 0, 0)] == pytest.approx([2.5, 1 - 0.25])
    assert found[(0, 1, 0)] == pytest.approx([0.5, 1 - 4.25])
    assert asset.textures.wrap.tolist() == [[2, 2]]


def test_obj_materials_that_shine_and_several_files_of_materials(tmp_path):
    shining = obj(tmp_path, "absent.png", {}, more="Kd 0 0 0\nKe 1 0 0\n")
    assert (colour_of(shining), len(shining.warnings)) == ((255, 0, 0), 1)
    (tmp_path / "n.mtl").write_text("newmtl skin\nKd 0 1 0\nKe 0 0 0\n")
    for line in ("mtllib absent.mtl\nmtllib n.mtl", "mtllib N.MTL", "mtllib absent.mtl n.mtl"):
        (tmp_path / "b.obj").write_text(OBJ.replace("mtllib m.mtl", line))
        asset = load_asset(tmp_path / "b.obj")
        assert colour_of(asset) == (0, 255, 0)
        assert asset.warnings == (("material_file_missing: absent.mtl",) if "absent" in line else ())
    (tmp_path / "c.obj").write_text(OBJ.replace("m.mtl", "n.mtl").replace("usemtl skin", "usemtl Skin"))
    assert load_asset(tmp_path / "c.obj").warnings == ("material_missing: Skin",)


def test_vertex_colours_of_an_obj_beside_a_plain_material(tmp_path):
    """As MeshLab writes them."""
    text = "mtllib m.mtl\nv 0 0 0 1 0 0\nv 1 0 0 1 0 0\nv 0 1 0 1 0 0\nusemtl skin\nf 1 2 3\n"
    (tmp_path / "m.mtl").write_text("newmtl skin\nKd 0.75 0.75 0.75\n")
    (tmp_path / "a.obj").write_text(text)
    assert colour_of(load_asset(tmp_path / "a.obj")) == (255, 0, 0)


def test_texture_of_a_ply(tmp_path):
    head = "ply\nformat ascii 1.0\ncomment TextureFile T.png\nelement vertex 3\n"
    head += "".join(f"property float {name}\n" for name in ("x", "y", "z", "s", "t"))
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "a.ply").write_text(head + "0 0 0 0 0\n1 0 0 1 0\n0 1 0 0 1\n3 0 1 2\n")
    assert load_asset(tmp_path / "a.ply").warnings == ("texture_missing: T.png",)
    (tmp_path / "t.png").write_bytes(encoded(Image.fromarray(GREY16), "PNG"))
    asset = load_asset(tmp_path / "a.ply")
    assert (colour_of(asset), asset.warnings) == ((64, 64, 64), ())


def test_huge_texture_of_an_obj_is_refused_as_that_of_any_other(tmp_path):
    obj(tmp_path, "t.png", {"t.png": PNG})
    with pytest.raises(AssetError, match="too_large"):
        load_asset(tmp_path / "a.obj", limits=AssetLimits(max_texture_px=10))


def test_words_of_warnings():
    assert warning("texture_missing", "a\nb: \x1b[31m.png") == "texture_missing: a?b: ?[31m.png"
    assert word_of("texture_missing: a: b") == "texture_missing"
    assert loses_colours(["emissive_ignored"])
    assert not loses_colours(["points_or_lines_skipped", "normal_ignored"])
