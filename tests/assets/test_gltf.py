"""The glTF reader on files that the test writes itself: what must be drawn, and what must be refused and why."""

import numpy as np
import pytest
import torch
from gltf_writer import TRIANGLE, GltfWriter, refusal, skinned

from raydream.assets.asset import Asset, flat_normals
from raydream.assets.load import load_asset

SQUARE = np.array([[-1, 1, 0], [1, 1, 0], [1, -1, 0], [-1, -1, 0]], np.float32)
SQUARE_UV = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
SQUARE_FACES = np.array([0, 3, 2, 0, 2, 1], np.uint16)


def corners(asset: Asset) -> torch.Tensor:
    return asset.vertices[asset.faces]


def area(asset: Asset) -> float:
    sides = corners(asset)
    return float(torch.linalg.cross(sides[:, 1] - sides[:, 0], sides[:, 2] - sides[:, 0]).norm(dim=-1).sum() / 2)


@pytest.mark.parametrize("name", ["a.glb", "a.gltf"])
def test_positions_without_indices(tmp_path, name):
    asset = load_asset(GltfWriter().save(tmp_path / name), caption="a triangle")
    assert torch.equal(corners(asset)[0], torch.from_numpy(TRIANGLE))
    assert torch.allclose(asset.corner_normals, torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(asset.corner_colors, torch.ones(1, 3, 3))
    assert (asset.uid, asset.caption, asset.warnings) == ("a", "a triangle", ())


def test_base_colour_factor_is_linear_light(tmp_path):
    writer = GltfWriter()
    writer.material(pbrMetallicRoughness={"baseColorFactor": [0.2140411, 0.0, 1.0, 1.0]})
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert torch.allclose(
        asset.corner_colors[0, 0], torch.tensor([0.5, 0.0, 1.0]), atol=1e-5
    )  # sRGB's grey of one half


def test_texture_times_factor_is_multiplied_in_linear_light(tmp_path):
    writer = GltfWriter(SQUARE, SQUARE_FACES)
    writer.attribute("TEXCOORD_0", SQUARE_UV)
    texture = writer.texture(np.full((2, 2, 3), 188, np.uint8))  # linear 0.5029
    writer.material(pbrMetallicRoughness={"baseColorTexture": texture, "baseColorFactor": [0.5, 1, 0, 1]})
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert asset.face_texture.tolist() == [0, 0]
    assert asset.textures.texels[0].tolist() == [137, 188, 0]  # sRGB(0.2514) = 0.5383
    assert torch.equal(asset.corner_colors, torch.ones(2, 3, 3))


def test_spec_gloss_diffuse_is_the_base_colour_and_unlit_changes_nothing(tmp_path):
    writer = GltfWriter()
    gloss = {"KHR_materials_pbrSpecularGlossiness": {"diffuseFactor": [1, 0, 0, 1]}, "KHR_materials_unlit": {}}
    writer.material(extensions=gloss, pbrMetallicRoughness={"baseColorFactor": [0, 1, 0, 1]})
    writer.root["extensionsRequired"] = list(gloss)
    assert load_asset(writer.save(tmp_path / "a.glb")).corner_colors[0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.uint16])
def test_vertex_colours(tmp_path, dtype):
    colors = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]], np.float64)
    scale = 1 if dtype == np.float32 else np.iinfo(dtype).max
    writer = GltfWriter()
    writer.attribute("COLOR_0", (colors * scale).astype(dtype), normalized=dtype != np.float32)
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert torch.allclose(asset.corner_colors[0], torch.eye(3), atol=1e-6)


def test_nested_transforms_and_a_mirror_keeps_faces_outward(tmp_path):
    writer = GltfWriter()
    half = np.sqrt(0.5)
    writer.root["nodes"] = [
        {"children": [1], "translation": [10, 0, 0], "rotation": [0, 0, half, half], "scale": [-2, 1, 1]},
        {"mesh": 0, "matrix": [1, 0, 0, 0, 0, 3, 0, 0, 0, 0, 1, 0, 0, 0, 5, 1]},
    ]
    writer.attribute("NORMAL", np.tile(np.float32([0, 0, 1]), (3, 1)))
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    # (x, y, z) -> (x, 3y, z + 5) -> (-2x, 3y, z) -> a quarter turn about z -> moved by 10 along x
    expected = torch.tensor([[10.0, 0, 5], [10, -2, 5], [7, 0, 5]])
    assert torch.allclose(corners(asset)[0][[0, 2, 1]], expected, atol=1e-5)
    assert torch.allclose(flat_normals(asset.vertices, asset.faces), torch.tensor([[0.0, 0, 1]]), atol=1e-6)
    assert torch.allclose(asset.corner_normals[0], torch.tensor([0.0, 0, 1]), atol=1e-6)


def test_normals_follow_a_slanting_scale(tmp_path):
    slope = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    writer = GltfWriter(slope)
    writer.attribute("NORMAL", np.full((3, 3), 3**-0.5, np.float32))
    writer.root["nodes"][0]["scale"] = [4, 1, 1]
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert torch.allclose(asset.corner_normals[0, 0], flat_normals(asset.vertices, asset.faces)[0], atol=1e-6)


def test_strips_and_fans(tmp_path):
    strip = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], np.float32)
    writer = GltfWriter(strip)
    writer.primitive["mode"] = 5
    asset = load_asset(writer.save(tmp_path / "strip.glb"))
    assert area(asset) == pytest.approx(1.0)
    assert (flat_normals(asset.vertices, asset.faces)[:, 2] == 1).all()
    fan = GltfWriter(strip[[0, 1, 3, 2]])
    fan.primitive["mode"] = 6
    assert area(load_asset(fan.save(tmp_path / "fan.glb"))) == pytest.approx(1.0)


def test_points_and_lines_are_skipped_with_a_warning_or_refused_alone(tmp_path):
    writer = GltfWriter()
    writer.root["meshes"][0]["primitives"].append({"attributes": {"POSITION": 0}, "mode": 0})
    assert load_asset(writer.save(tmp_path / "a.glb")).warnings == ("points_or_lines_skipped",)
    writer.primitive["mode"] = 1
    assert refusal(writer.save(tmp_path / "b.glb")) == "no_faces"


def test_interleaved_and_sparse_accessors(tmp_path):
    writer = GltfWriter()
    rows = np.concatenate([np.full((3, 3), 9, np.float32), TRIANGLE], axis=1)
    writer.root["accessors"][0]["bufferView"] = writer.view(rows.tobytes())
    writer.root["accessors"][0]["byteOffset"] = 12
    writer.root["bufferViews"][-1]["byteStride"] = 24
    writer.root["accessors"][0]["sparse"] = {
        "count": 1,
        "indices": {"bufferView": writer.view(np.uint16([2]).tobytes()), "componentType": 5123},
        "values": {"bufferView": writer.view(np.float32([0, 7, 0]).tobytes())},
    }
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert corners(asset)[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 7, 0]]
    writer.root["accessors"][0]["sparse"]["indices"]["bufferView"] = writer.view(np.uint16([3]).tobytes())
    assert refusal(writer.save(tmp_path / "b.glb")) == "bad_reference"


def test_quantised_positions(tmp_path):
    writer = GltfWriter()
    writer.primitive["attributes"]["POSITION"] = writer.accessor(np.int16(TRIANGLE * 32767), normalized=True)
    writer.root["extensionsRequired"] = ["KHR_mesh_quantization"]
    assert torch.allclose(corners(load_asset(writer.save(tmp_path / "a.glb")))[0], torch.from_numpy(TRIANGLE))


def test_morph_weights_of_the_node_win_over_the_mesh(tmp_path):
    writer = GltfWriter()
    writer.primitive["targets"] = [{"POSITION": writer.accessor(np.float32([[0, 0, 1]] * 3))}]
    writer.root["meshes"][0]["weights"] = [0.5]
    assert corners(load_asset(writer.save(tmp_path / "a.glb")))[0, 0].tolist() == [0, 0, 0.5]
    writer.root["nodes"][0]["weights"] = [-2]
    assert corners(load_asset(writer.save(tmp_path / "b.glb")))[0, 0].tolist() == [0, 0, -2]


def test_a_skin_stands_at_rest_by_its_joints_and_not_by_its_node(tmp_path):
    weights = [[1, 0, 0, 0], [0, 1, 0, 0], [2, 2, 0, 0]]  # the last row is not normalised
    asset = load_asset(skinned(weights).save(tmp_path / "a.glb"))
    # joint 0 lifts by 2; joint 1 lifts by 2 and moves by 4 - 1 along x
    assert torch.allclose(corners(asset)[0], torch.tensor([[0.0, 2, 0], [4, 2, 0], [1.5, 3, 0]]))


def test_nan_skin_weights_are_replaced_and_unknown_joints_refused(tmp_path):
    writer = skinned([[np.nan, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert asset.warnings == ("skin_weights_replaced",)
    assert torch.allclose(corners(asset)[0], torch.tensor([[0.0, 2, 0], [1, 2, 0], [0, 3, 0]]))
    writer.root["skins"][0]["joints"] = [1]
    assert refusal(writer.save(tmp_path / "b.glb")) == "bad_reference"


def test_instances(tmp_path):
    writer = GltfWriter()
    places = np.float32([[0, 0, 0], [5, 0, 0], [0, 0, 9]])
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": writer.accessor(places)}}}
    writer.root["nodes"][0]["extensions"] = extension
    writer.root["extensionsRequired"] = list(extension)
    assert torch.allclose(corners(load_asset(writer.save(tmp_path / "a.glb")))[:, 0], torch.from_numpy(places))


def test_texture_transform_turns_and_second_uv_set_is_used(tmp_path):
    writer = GltfWriter(SQUARE, SQUARE_FACES)
    writer.attribute("TEXCOORD_0", np.zeros((4, 2), np.float32))
    writer.attribute("TEXCOORD_1", SQUARE_UV)
    texture = writer.texture(np.zeros((2, 2, 3), np.uint8))
    texture["extensions"] = {
        "KHR_texture_transform": {"offset": [0.5, 0.25], "rotation": np.pi / 2, "scale": [2, 3], "texCoord": 1}
    }
    writer.material(pbrMetallicRoughness={"baseColorTexture": texture})
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    by_corner = {
        tuple(p): uv for p, uv in zip(corners(asset).view(-1, 3).tolist(), asset.corner_uv.view(-1, 2), strict=True)
    }
    # a quarter turn counter-clockwise as one sees the image: (u, v) -> (v, -u), with v downwards
    assert torch.allclose(by_corner[(1, 1, 0)], torch.tensor([0.5 + 0.0, 0.25 - 2.0]), atol=1e-6)
    assert torch.allclose(by_corner[(-1, -1, 0)], torch.tensor([0.5 + 3.0, 0.25 + 0.0]), atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "cutoff", "expected"), [("OPAQUE", 0.5, 4.0), ("MASK", 0.5, 1.0), ("MASK", 0.2, 3.0), ("BLEND", 0.5, 3.0)]
)
def test_alpha_masks_become_geometry(tmp_path, mode, cutoff, expected):
    alpha = np.array([[255, 0], [100, 100]], np.uint8)
    image = np.concatenate([np.full((2, 2, 3), 90, np.uint8), alpha[..., None]], axis=-1)
    image[0, 1, :3] = (255, 0, 255)
    writer = GltfWriter(SQUARE, SQUARE_FACES)
    writer.attribute("TEXCOORD_0", SQUARE_UV)
    writer.material(
        pbrMetallicRoughness={"baseColorTexture": writer.texture(image)}, alphaMode=mode, alphaCutoff=cutoff
    )
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert area(asset) == pytest.approx(expected, abs=0.03)
    covered = corners(asset).mean(1)
    hidden = (covered[:, 0] > 0.05) & (covered[:, 1] > 0.05)  # the transparent quarter is top right
    assert bool(hidden.any()) == (mode == "OPAQUE")
    assert (asset.textures.texels == torch.tensor([255, 0, 255])).all(-1).any() == (mode == "OPAQUE")  # else it bleeds


def test_constant_alpha(tmp_path):
    writer = GltfWriter()
    writer.root["meshes"][0]["primitives"].append({"attributes": {"POSITION": 0}})  # an opaque one beside it
    for alpha, mode, drawn in ((0.6, "MASK", True), (0.4, "MASK", False), (0.4, "BLEND", True), (0.0, "BLEND", False)):
        writer.material(pbrMetallicRoughness={"baseColorFactor": [1, 1, 1, alpha]}, alphaMode=mode)
        asset = load_asset(writer.save(tmp_path / "a.glb"))
        assert (asset.num_faces, asset.warnings) == (1 + drawn, ())
    del writer.root["meshes"][0]["primitives"][1]
    asset = load_asset(writer.save(tmp_path / "a.glb"))  # nothing else is there: drawn opaque
    assert (asset.num_faces, asset.warnings) == (1, ("alpha_ignored",))


def test_attributes_of_the_wrong_length_are_left_out_with_a_warning(tmp_path):
    writer = GltfWriter()
    writer.attribute("NORMAL", np.zeros((2, 3), np.float32))
    writer.attribute("COLOR_0", np.zeros((5, 3), np.float32))
    asset = load_asset(writer.save(tmp_path / "a.glb"))
    assert set(asset.warnings) == {"normal_ignored", "color_0_ignored"}
    assert torch.isfinite(asset.corner_normals).all()


def test_faces_out_of_range_are_dropped_but_not_all_of_them(tmp_path):
    asset = load_asset(GltfWriter(indices=np.uint16([0, 1, 2, 0, 1, 9])).save(tmp_path / "a.glb"))
    assert (asset.num_faces, asset.warnings) == (1, ("faces_out_of_range_dropped",))
    assert refusal(GltfWriter(indices=np.uint16([0, 1, 9])).save(tmp_path / "b.glb")) == "no_faces"
