"""USDZ: shapes, colours and what is refused, on packages that the test writes as text."""

import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gltf_writer import refusal
from PIL import Image

from raydream.assets import load as assets
from raydream.assets.asset import Asset, AssetError
from raydream.assets.files import AssetLimits
from raydream.assets.load import load_asset

needs_usd = pytest.mark.skipif(find_spec("pxr") is None, reason="no usd-core: pip install 'raydream[usd]'")

HEAD = '#usda 1.0\n(\n    upAxis = "%s"\n    metersPerUnit = 1\n)\n'
QUAD = """
def Mesh "quad" (prepend apiSchemas = ["MaterialBindingAPI"])
{
    point3f[] points = [(0, 0, 0), (2, 0, 0), (2, 1, 0), (0, 1, 0)]
    int[] faceVertexCounts = [4]
    int[] faceVertexIndices = [0, 1, 2, 3]
    texCoord2f[] primvars:st = [(0, 0), (1, 0), (1, 1), (0, 1)] (interpolation = "faceVarying")
    rel material:binding = </M>
    %s
}
"""
MATERIAL = """
def Material "M"
{
    token outputs:surface.connect = </M/S.outputs:surface>
    def Shader "S"
    {
        uniform token info:id = "UsdPreviewSurface"
        %s
        token outputs:surface
    }
    def Shader "T"
    {
        uniform token info:id = "UsdUVTexture"
        asset inputs:file = @%s@
        float2 inputs:st.connect = </M/%s.outputs:result>
        token inputs:wrapS = "clamp"
        float3 outputs:rgb
    }
    def Shader "X"
    {
        uniform token info:id = "UsdTransform2d"
        float2 inputs:in.connect = </M/R.outputs:result>
        float2 inputs:scale = (2, 1)
        float2 inputs:translation = (0.5, 0)
        float2 outputs:result
    }
    def Shader "R"
    {
        uniform token info:id = "UsdPrimvarReader_float2"
        string inputs:varname = "st"
        float2 outputs:result
    }
}
"""
TEXTURED = "color3f inputs:diffuseColor.connect = </M/T.outputs:rgb>"


def usdz(path: Path, text: str, files: dict[str, bytes] | None = None, name: str = "root.usda") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, text)
        for each, data in (files or {}).items():
            archive.writestr(each, data)
    return path


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def quad(material: str = "", up: str = "Y", more: str = "", file: str = "textures/t.png", st: str = "R") -> str:
    return HEAD % up + QUAD % more + MATERIAL % (material, file, st)


def corners(asset: Asset) -> list[list[float]]:
    return asset.vertices[asset.faces].reshape(-1, 3).tolist()


@needs_usd
def test_shape_and_constant_colour(tmp_path):
    red = "color3f inputs:diffuseColor = (1, 0, 0)"
    asset = load_asset(usdz(tmp_path / "a.usdz", quad(red)))
    assert (asset.num_faces, asset.warnings) == (2, ())
    assert asset.corner_colors.flatten(0, 1).unique(dim=0).tolist() == [[1, 0, 0]]
    assert (asset.corner_normals == torch.tensor([0.0, 0.0, 1.0])).all()
    upright = load_asset(usdz(tmp_path / "z.usdz", quad(red, up="Z")))
    assert corners(upright) == [[x, z, -y] for x, y, z in corners(asset)]
    moved = "matrix4d xformOp:transform = ((-2, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (5, 0, 0, 1))\n"
    moved += 'uniform token[] xformOpOrder = ["xformOp:transform"]'
    mirrored = load_asset(usdz(tmp_path / "m.usdz", quad(red, more=moved)))
    assert sorted(map(tuple, mirrored.vertices.tolist()))[0] == (1, 0, 0)
    assert (mirrored.corner_normals == torch.tensor([0.0, 0.0, 1.0])).all()


@needs_usd
@pytest.mark.parametrize("name", ["root.usda", "folder/root.usda", "root.usdc"])
def test_texture(tmp_path, name):
    text = quad(TEXTURED)
    if name.endswith("usdc"):
        from pxr import Sdf

        layer = Sdf.Layer.CreateAnonymous(".usda")
        layer.ImportFromString(text)
        layer.Export(str(tmp_path / name))
        text = (tmp_path / name).read_bytes()
    files = {f"{name.rpartition('/')[0]}/textures/t.png".lstrip("/"): png()}
    asset = load_asset(usdz(tmp_path / "a.usdz", text, files, name))
    assert asset.warnings == ()
    assert asset.textures.texels[0].tolist() == [200, 30, 30]
    assert asset.textures.wrap.tolist() == [[2, 0]]
    by_corner = dict(zip(map(tuple, corners(asset)), asset.corner_uv.reshape(-1, 2).tolist()))
    assert by_corner[(0, 0, 0)] == [0, 1]  # v grows upwards in USD
    assert by_corner[(2, 1, 0)] == [1, 0]
    turned = load_asset(usdz(tmp_path / "b.usdz", quad(TEXTURED, st="X"), {"textures/t.png": png()}))
    by_corner = dict(zip(map(tuple, corners(turned)), turned.corner_uv.reshape(-1, 2).tolist()))
    assert by_corner[(2, 1, 0)] == [2.5, 0]


@needs_usd
@pytest.mark.parametrize(("text", "told"), [
    (quad(TEXTURED), "texture_missing: textures/t.png"),
    (quad(TEXTURED, file="/etc/hostname"), "texture_outside_folder: /etc/hostname"),
    (quad(TEXTURED, file="../u.png"), "texture_outside_folder: ../u.png"),
    (quad().replace("UsdPreviewSurface", "ND_standard_surface"), "material_unreadable: /M"),
    (quad() + 'def Sphere "ball" {}\n', "shape_skipped: Sphere /ball"),
    (quad() + 'def PointInstancer "many" {\ndef Sphere "ball" {}\n}\n', "instances_skipped: /many"),
    (quad(more="int[] primvars:skel:jointIndices = [0]"), "skin_ignored: /quad"),
    (quad(TEXTURED).replace("primvars:st", "primvars:uv"), "texture_coordinates_missing: st of /quad"),
])  # fmt: skip
def test_what_is_left_out_is_told(tmp_path, text, told):
    files = {} if "missing: textures" in told else {"textures/t.png": png()}
    asset = load_asset(usdz(tmp_path / "a.usdz", text, files))
    assert asset.warnings == (told,)
    assert asset.num_faces == 2


@needs_usd
def test_parts_by_material_colours_of_points_and_what_is_hidden(tmp_path):
    red = quad("color3f inputs:diffuseColor = (0, 0, 0)\ncolor3f inputs:emissiveColor = (1, 0, 0)")
    points = "color3f[] primvars:displayColor = [(0, 1, 0)]"
    plain = (QUAD % points).replace("rel material:binding = </M>", "").replace('"quad"', '"plain"')
    hidden = (QUAD % 'token visibility = "invisible"').replace('"quad"', '"hidden"')
    guide = (QUAD % 'uniform token purpose = "guide"').replace('"quad"', '"guide"')
    asset = load_asset(usdz(tmp_path / "a.usdz", red + plain + hidden + guide))
    assert asset.num_faces == 4
    assert asset.corner_colors.flatten(0, 1).unique(dim=0).tolist() == [[0, 1, 0], [1, 0, 0]]
    subset = """
    uniform token subsetFamily:materialBind:familyType = "nonOverlapping"
    def GeomSubset "some" (prepend apiSchemas = ["MaterialBindingAPI"])
    {
        uniform token elementType = "face"
        uniform token familyName = "materialBind"
        int[] indices = [1]
        rel material:binding = </M>
    }"""
    two = plain.replace("[4]", "[3, 3]").replace("[0, 1, 2, 3]", "[0, 1, 2, 0, 2, 3]").replace(points, points + subset)
    two = two.replace("[(0, 0), (1, 0), (1, 1), (0, 1)]", "[(0, 0)]").replace("faceVarying", "constant")
    asset = load_asset(usdz(tmp_path / "b.usdz", HEAD % "Y" + two + red[red.index("def Material") :]))
    assert sorted(asset.corner_colors[:, 0].tolist()) == [[0, 1, 0], [1, 0, 0]]


@needs_usd
@pytest.mark.parametrize(("text", "reason"), [
    ("", "malformed"),
    ("not usd", "malformed"),
    (HEAD % "Y", "no_faces"),
    (quad().replace("[0, 1, 2, 3]", "[0, 1, 2]"), "malformed"),
    (quad().replace("[0, 1, 2, 3]", "[0, 1, 2, 9]"), "bad_reference"),
    (quad().replace("(2, 1, 0)", "(2, nan, 0)"), "non_finite"),
    (quad() + 'def "x" (references = @/etc/passwd.usda@) {}\n', "unsupported_format"),
    (quad() + 'def "x" (prepend payload = @./other.usdc@</a>) {}\n', "unsupported_format"),
    (quad().replace("(\n", "(\n    subLayers = [@../x.usda@]\n", 1), "unsupported_format"),
    (quad() + 'def "x" (clips = {dictionary default = {asset[] assetPaths = [@/x.usda@]}}) {}\n', "unsupported_format"),
])  # fmt: skip
def test_refused(tmp_path, text, reason):
    assert refusal(usdz(tmp_path / "a.usdz", text)) == reason


@needs_usd
def test_limits_and_packages_that_lie(tmp_path):
    path = usdz(tmp_path / "a.usdz", quad())
    assert refusal(path, AssetLimits(max_faces=1)) == "too_large"
    assert refusal(path, AssetLimits(max_nodes=1)) == "too_large"
    assert refusal(usdz(tmp_path / "b.usdz", "x", name="readme.txt")) == "malformed"
    assert refusal(usdz(tmp_path / "c.usdz", quad(), name="root.usdc")) == "malformed"
    (tmp_path / "d.usdz").write_bytes(path.read_bytes()[:100])
    assert refusal(tmp_path / "d.usdz") == "malformed"


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"pip install 'raydream\[usd\]'; or convert it to GLB with Blender"):
        load_asset(usdz(tmp_path / "a.usdz", quad()))
