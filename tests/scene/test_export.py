"""Textures and files, read back by other programs or by hand from the format's own specification."""

import io
import json
import struct

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from raydream.scene.export import to_uint8, write_glb, write_png, write_turntable
from raydream.scene.isosurface import extract_mesh
from raydream.scene.texture import bake_texture
from raydream.types import Mesh

pytestmark = pytest.mark.slow

TEXTURE_PX = 256
NUMPY_TYPE = {5121: np.uint8, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
NUM_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def torus_density(points):
    distance = torch.stack([points[:, [0, 2]].norm(dim=-1) - 0.6, points[:, 1]], dim=-1).norm(dim=-1) - 0.25
    return (100 - 2000 * distance).clamp(0, 200)


def color_of_place(points):
    return 0.5 + 0.5 * torch.sin(points * torch.tensor([3.0, 4.0, 2.0]) + torch.tensor([0.0, 1.0, 2.0]))


def sample_texture(texture, uv):
    """Bilinear colours at texture coordinates (OpenGL's, see ``bake_texture``), as a viewer filters them."""
    grid = torch.stack([uv[:, 0] * 2 - 1, 1 - uv[:, 1] * 2], dim=-1)[None, None].to(texture)
    image = texture.permute(2, 0, 1)[None]
    colors = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    return colors[0, :, 0].T


@pytest.fixture(scope="module")
def bare() -> Mesh:
    return extract_mesh(torus_density, 40, max_faces=1500)


@pytest.fixture(scope="module")
def baked(bare) -> Mesh:
    return bake_texture(bare, lambda points, normals: color_of_place(points), TEXTURE_PX)


def parse_glb(data: bytes) -> tuple[dict, bytes]:
    """The JSON tree and the binary chunk, after the checks that the glTF 2.0 specification asks for (section 4.4)."""
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    json_length, json_type = struct.unpack_from("<I4s", data, 12)
    assert json_type == b"JSON"
    assert json_length % 4 == 0
    binary_length, binary_type = struct.unpack_from("<I4s", data, 20 + json_length)
    assert binary_type == b"BIN\0"
    assert binary_length % 4 == 0
    start = 28 + json_length
    assert start + binary_length == len(data)
    return json.loads(data[20 : 20 + json_length]), data[start:]


def read_accessor(tree: dict, binary: bytes, index: int) -> np.ndarray:
    accessor = tree["accessors"][index]
    view = tree["bufferViews"][accessor["bufferView"]]
    dtype, width = np.dtype(NUMPY_TYPE[accessor["componentType"]]), NUM_COMPONENTS[accessor["type"]]
    offset = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    assert offset % dtype.itemsize == 0
    assert "byteStride" not in view
    num_values = accessor["count"] * width
    assert accessor.get("byteOffset", 0) + num_values * dtype.itemsize <= view["byteLength"]
    return np.frombuffer(binary, dtype, num_values, offset).reshape(-1, width)


def read_image(tree: dict, binary: bytes) -> np.ndarray:
    (image,) = tree["images"]
    assert image["mimeType"] == "image/png"
    assert "uri" not in image
    view = tree["bufferViews"][image["bufferView"]]
    picture = Image.open(io.BytesIO(binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]))
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    return np.asarray(picture)


def on_surface(values: np.ndarray, faces: np.ndarray, face: np.ndarray, share: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((values[faces[face]] * share[:, :, None]).sum(1)).float()


def random_places(faces: np.ndarray, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(len(faces), size=count), rng.dirichlet([1, 1, 1], size=count)


def assert_colors_are_of_their_place(colors: torch.Tensor, points: torch.Tensor) -> None:
    # A texel is 0.013 wide here and colours change by at most 2 per unit: up to 0.02 at the edge of a chart, where
    # texels are held at its outline, 0.002 from rounding to 8 bits. Measured: mean 0.0007 (0.0016 at the vertices),
    # worst 0.0094.
    error = (colors - color_of_place(points)).abs()
    assert error.mean() < 0.003
    assert error.max() < 0.02


def test_glb_is_well_formed(baked):
    tree, binary = parse_glb(write_glb(baked))
    assert tree["asset"]["version"] == "2.0"
    (buffer,) = tree["buffers"]
    assert "uri" not in buffer
    assert 0 <= len(binary) - buffer["byteLength"] < 4
    for view in tree["bufferViews"]:
        assert view["byteOffset"] % 4 == 0
        assert view["byteOffset"] + view["byteLength"] <= buffer["byteLength"]
    (primitive,) = tree["meshes"][0]["primitives"]
    assert primitive.get("mode", 4) == 4
    assert set(primitive["attributes"]) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    arrays = {name: read_accessor(tree, binary, index) for name, index in primitive["attributes"].items()}
    indices = read_accessor(tree, binary, primitive["indices"])
    assert {len(array) for array in arrays.values()} == {len(baked.vertices)}
    assert indices.max() < len(baked.vertices)
    position = tree["accessors"][primitive["attributes"]["POSITION"]]
    assert position["min"] == pytest.approx(arrays["POSITION"].min(0).tolist(), abs=0)
    assert position["max"] == pytest.approx(arrays["POSITION"].max(0).tolist(), abs=0)
    np.testing.assert_array_equal(arrays["POSITION"], baked.vertices.numpy())  # no node or axis turns it
    assert all("matrix" not in node or np.allclose(node["matrix"], np.eye(4).ravel()) for node in tree["nodes"])
    np.testing.assert_array_equal(indices.reshape(-1, 3), baked.faces.numpy())
    np.testing.assert_allclose(np.linalg.norm(arrays["NORMAL"], axis=-1), 1, atol=1e-5)
    assert (arrays["TEXCOORD_0"] >= 0).all()
    assert (arrays["TEXCOORD_0"] <= 1).all()


def test_glb_material_and_unlit_choice(baked):
    lit, _ = parse_glb(write_glb(baked))
    (material,) = lit["materials"]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert material["pbrMetallicRoughness"].get("roughnessFactor", 1) == 1
    assert material["pbrMetallicRoughness"].get("baseColorFactor", [1, 1, 1, 1]) == [1, 1, 1, 1]
    assert lit["textures"][material["pbrMetallicRoughness"]["baseColorTexture"]["index"]]["source"] == 0
    assert not material.get("doubleSided", False)
    assert "extensionsUsed" not in lit
    unlit, _ = parse_glb(write_glb(baked, unlit=True))
    assert unlit["extensionsUsed"] == ["KHR_materials_unlit"]
    assert unlit["materials"][0]["extensions"] == {"KHR_materials_unlit": {}}


def test_glb_shows_the_colour_of_each_place(baked):
    tree, binary = parse_glb(write_glb(baked))
    (primitive,) = tree["meshes"][0]["primitives"]
    faces = read_accessor(tree, binary, primitive["indices"]).reshape(-1, 3)
    points, uv = (
        on_surface(read_accessor(tree, binary, primitive["attributes"][name]), faces, *random_places(faces))
        for name in ("POSITION", "TEXCOORD_0")
    )
    texture = torch.from_numpy(read_image(tree, binary).astype(np.float32) / 255)
    opengl_uv = torch.stack([uv[:, 0], 1 - uv[:, 1]], dim=-1)  # glTF counts v from the top
    assert_colors_are_of_their_place(sample_texture(texture, opengl_uv), points)


def test_glb_opens_in_trimesh(baked):
    (loaded,) = trimesh.load_scene(io.BytesIO(write_glb(baked)), file_type="glb").geometry.values()
    assert len(loaded.faces) == len(baked.faces)
    np.testing.assert_allclose(loaded.bounds[1], baked.vertices.amax(0).numpy(), atol=1e-6)
    assert loaded.visual.material.baseColorTexture.size == (TEXTURE_PX, TEXTURE_PX)
    loaded.merge_vertices(merge_tex=True, merge_norm=True)
    assert loaded.is_watertight  # the cuts of the texture are no holes


def test_normals_are_smooth_across_cuts(baked):
    tree, binary = parse_glb(write_glb(baked))
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]
    points, normals = (read_accessor(tree, binary, attributes[name]) for name in ("POSITION", "NORMAL"))
    _, first, same = np.unique(points, axis=0, return_index=True, return_inverse=True)
    assert len(first) < len(points)
    np.testing.assert_array_equal(normals, normals[first][same.reshape(-1)])
    ring = points * [1, 0, 1]
    outwards = points - 0.6 * ring / np.linalg.norm(ring, axis=-1, keepdims=True)
    outwards /= np.linalg.norm(outwards, axis=-1, keepdims=True)
    cosine = (normals * outwards).sum(-1)
    assert cosine.mean() > 0.98
    assert cosine.min() > 0.75  # 1,500 faces are coarse: 30 degrees off at the worst vertex


def test_texture_has_no_unpainted_texel_and_baking_keeps_the_shape(bare):
    baked = bake_texture(bare, lambda points, normals: torch.tensor([0.2, 0.4, 0.6]).expand(len(points), 3), 64)
    assert (baked.texture == torch.tensor([0.2, 0.4, 0.6])).all()
    assert torch.equal(baked.vertices[baked.faces], bare.vertices[bare.faces])


def test_a_mesh_without_texture_is_refused(bare):
    with pytest.raises(ValueError, match=r"mesh\.texture"):
        write_glb(bare)


def color_bars(count: int, height: int, width: int) -> list[np.ndarray]:
    """Frames of two flat colours, different in each frame, the left one saturated."""
    frames = []
    for index in range(count):
        frame = np.empty((height, width, 3), dtype=np.uint8)
        frame[:, : width // 2] = [(200, 40, 30), (30, 180, 60), (20, 60, 220)][index % 3]
        frame[:, width // 2 :] = 20 + 10 * index
        frames.append(frame)
    return frames


def read_film(data: bytes, path) -> tuple[dict, np.ndarray]:
    path.write_bytes(data)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


@pytest.mark.parametrize(("height", "width", "film_size"), [(64, 96, (384, 256)), (301, 257, (258, 302))])
def test_turntable_decodes_to_its_frames(tmp_path, height, width, film_size):
    frames = color_bars(12, height, width)
    data = write_turntable(frames, fps=24)
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # the index first: it plays while it loads
    meta, film = read_film(data, tmp_path / "film.mp4")
    assert (meta["codec"], meta["fps"], meta["size"]) == ("h264", 24.0, film_size)
    assert meta["pix_fmt"].startswith("yuv420p(tv, bt709,")
    assert len(film) == len(frames)
    middle = film.shape[1] // 2
    for shown, frame in zip(film, frames):
        for share in (1 / 4, 3 / 4):
            color = frame[height // 2, int(width * share)].astype(int)
            # 4:2:0 in 8 bits at quality 18; measured at most 2 levels of 255.
            assert np.abs(shown[middle, int(film.shape[2] * share)] - color).max() <= 4


def test_turntable_reports_what_ffmpeg_says():
    with pytest.raises(RuntimeError, match="ffmpeg"):
        write_turntable(color_bars(2, 64, 64), fps=-1)


def test_png_is_lossless_and_colours_are_rounded():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(write_png(image)))), image)
    levels = to_uint8(torch.tensor([[-0.1, 0.0, 0.5 / 255 - 1e-4], [0.5 / 255 + 1e-4, 1.0, 1.2]]))
    assert levels.tolist() == [[0, 0, 0], [1, 255, 255]]
