"""Each format read back by a reader that is not its writer."""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from finished_meshes import color_of_place, fine_ball, finished_ball
from PIL import Image

from raydream.assets.asset import Asset
from raydream.assets.load import load_asset
from raydream.assets.raster import sample_textures
from raydream.scene.export import write_glb
from raydream.scene.mesh_files import mesh_files
from raydream.scene.tangents import vertex_tangents
from raydream.scene.texture import vertex_normals
from raydream.types import Mesh

_VALIDATE = """
const [folder, file] = process.argv.slice(1);
const bytes = new Uint8Array(require('fs').readFileSync(file));
require(folder).validateBytes(bytes).then((report) => console.log(JSON.stringify(report)));
"""
_VALIDATOR = Path(__file__).parents[2] / ".venv" / "npm" / "node_modules" / "gltf-validator"  # where .ci/run puts it


@pytest.fixture(scope="module")
def finished() -> Mesh:
    return finished_ball(fine_ball())


@pytest.fixture(scope="module")
def validate() -> Callable[[bytes, Path], list[dict]]:
    """What Khronos' own validator has to say of a GLB: its messages of any severity but a hint."""
    place = Path(os.environ.get("RAYDREAM_GLTF_VALIDATOR", _VALIDATOR))
    if not place.is_dir() or shutil.which("node") is None:
        pytest.skip("needs node, and: npm install --prefix .venv/npm gltf-validator")

    def messages(data: bytes, folder: Path) -> list[dict]:
        file = folder / "mesh.glb"
        file.write_bytes(data)
        done = subprocess.run(["node", "-e", _VALIDATE, str(place), str(file)], capture_output=True, check=True)
        report = json.loads(done.stdout)
        assert report["info"]["totalTriangleCount"] > 0 or report["issues"]["numErrors"]
        return [message for message in report["issues"]["messages"] if message["severity"] < 3]

    return messages


def assert_right_colours(asset: Asset, mesh: Mesh) -> None:
    """The colour at the middle of each face is that of its place, within what texels blur."""
    assert asset.num_faces == len(mesh.faces)
    middle, uv = asset.vertices[asset.faces].mean(1), asset.corner_uv.mean(1)
    shown = sample_textures(asset.textures, asset.face_texture, uv, torch.zeros(len(uv)))
    assert (shown - color_of_place(middle, middle)).abs().max() < 0.06


@pytest.mark.parametrize("kind", ["obj", "usdz"])
def test_textured_formats_keep_form_and_colours(finished, tmp_path, kind):
    if kind == "usdz":
        pytest.importorskip("pxr", reason="needs usd-core")
    for name, data in mesh_files(finished, kind, "mesh").items():
        (tmp_path / name).write_bytes(data)
    asset = load_asset(tmp_path / f"mesh.{kind}", "mesh")
    assert_right_colours(asset, finished)
    corners = asset.vertices[asset.faces].sort(dim=0).values
    torch.testing.assert_close(corners, finished.vertices[finished.faces].sort(dim=0).values, atol=1e-5, rtol=0)


def test_an_obj_names_its_pictures_and_material(finished):
    files = mesh_files(finished, "obj", "mesh")
    assert sorted(files) == ["mesh.mtl", "mesh.obj", "mesh.png", "mesh_normal.png"]
    assert b"map_Kd mesh.png\nnorm mesh_normal.png\n" in files["mesh.mtl"]
    assert b"Pr 0.5\nPm 0.25\n" in files["mesh.mtl"]
    assert np.asarray(Image.open(io.BytesIO(files["mesh_normal.png"]))).mean((0, 1))[2] > 240
    assert sorted(mesh_files(replace(finished, normal_map=None), "obj", "a")) == ["a.mtl", "a.obj", "a.png"]


def test_a_usdz_has_the_material(finished, tmp_path):
    usd = pytest.importorskip("pxr.Usd", reason="needs usd-core")
    from pxr import UsdGeom, UsdShade

    path = tmp_path / "mesh.usdz"
    path.write_bytes(mesh_files(finished, "usdz", "mesh")["mesh.usdz"])
    stage = usd.Stage.Open(str(path))
    assert UsdGeom.GetStageUpAxis(stage) == "Y"
    shader = UsdShade.Shader(stage.GetPrimAtPath("/asset/baked/surface"))
    assert shader.GetInput("roughness").Get() == 0.5
    assert shader.GetInput("metallic").Get() == 0.25
    (normal,) = shader.GetInput("normal").GetConnectedSources()[0]
    assert normal.source.GetPrim().GetName() == "normal"
    bright = tmp_path / "bright.usdz"  # another file: USD reads the first one while it is open
    bright.write_bytes(mesh_files(finished, "usdz", "mesh", unlit=True)["mesh.usdz"])
    unlit = usd.Stage.Open(str(bright))
    shader = UsdShade.Shader(unlit.GetPrimAtPath("/asset/baked/surface"))
    assert shader.GetInput("emissiveColor").HasConnectedSource()
    assert not shader.GetInput("diffuseColor").HasConnectedSource()
    validation = pytest.importorskip("pxr.UsdValidation", reason="only newer releases of usd-core check files")
    every = validation.ValidationRegistry().GetOrLoadAllValidators()
    assert len(every) > 20
    errors = validation.ValidationContext(every).Validate(stage)
    assert [error.GetErrorAsString() for error in errors] == []


@pytest.mark.parametrize("kind", ["stl", "ply"])
def test_formats_without_textures_are_closed(finished, kind):
    (data,) = mesh_files(finished, kind, "mesh").values()
    loaded = trimesh.load_mesh(io.BytesIO(data), file_type=kind)
    assert isinstance(loaded, trimesh.Trimesh)
    assert loaded.is_watertight
    assert len(loaded.faces) == len(finished.faces)
    assert loaded.volume == pytest.approx(trimesh.Trimesh(finished.vertices, finished.faces).volume, rel=1e-5)
    if kind == "ply":
        points = torch.from_numpy(np.asarray(loaded.vertices)).float()
        shown = torch.from_numpy(np.asarray(loaded.visual.vertex_colors)[:, :3] / 255).float()
        assert (shown - color_of_place(points, points)).abs().max() < 0.06


def test_a_mesh_without_a_texture_and_an_unknown_format_are_refused(finished):
    with pytest.raises(ValueError, match=r"mesh\.texture"):
        mesh_files(Mesh(finished.vertices, finished.faces), "ply", "mesh")
    with pytest.raises(ValueError, match=r"mesh_formats: unknown 'fbx'"):
        mesh_files(finished, "fbx", "mesh")


def test_a_glb_has_material_normal_map_and_tangents(finished):
    (loaded,) = trimesh.load_scene(io.BytesIO(write_glb(finished)), file_type="glb").geometry.values()
    material = loaded.visual.material
    assert (material.roughnessFactor, material.metallicFactor) == (0.5, 0.25)
    told = np.asarray(material.normalTexture)[..., :3] / 255 * 2 - 1
    np.testing.assert_allclose(told, finished.normal_map.numpy(), atol=0.5 / 255 * 2 + 1e-6)
    vertices, faces = finished.vertices.numpy(), finished.faces.numpy()
    tangents = vertex_tangents(vertices, vertex_normals(vertices, faces), faces, finished.uv.numpy())
    data = write_glb(finished)
    assert tangents.astype(np.float32).tobytes() in data
    assert b'"TANGENT"' in data
    assert b'"TANGENT"' not in write_glb(replace(finished, normal_map=None))


@pytest.mark.parametrize("unlit", [False, True])
@pytest.mark.parametrize("normal_map", [False, True])
def test_khronos_validator_finds_nothing(finished, validate, tmp_path, unlit, normal_map):
    mesh = finished if normal_map else replace(finished, normal_map=None)
    assert validate(write_glb(mesh, unlit), tmp_path) == []


def test_khronos_validator_would_find_something(finished, validate, tmp_path):
    damaged = write_glb(finished).replace(b'"TANGENT"', b'"TANGENS"')
    assert validate(damaged, tmp_path)


def test_mip_levels_mix_no_background_in(finished):
    """At quarter size texels near a chart's rim still have its colours: they were bled over it."""
    size = finished.texture.shape[0] // 4
    small = finished.texture.reshape(size, 4, size, 4, 3).mean((1, 3))
    asset_uv = finished.uv[finished.faces].mean(1)
    column, row = (asset_uv[:, 0] * size).long(), ((1 - asset_uv[:, 1]) * size).long()
    middle = finished.vertices[finished.faces].mean(1)
    off = (small[row, column] - color_of_place(middle, middle)).abs()
    assert off.mean() < 0.03
    assert off.max() < 0.25  # black instead of the bled colours: 0.6 and more
