"""A mesh as a USDZ package, by usd-core: one binary layer and its pictures, with UsdPreviewSurface's material."""

import tempfile
from pathlib import Path

import numpy as np
from pxr import Gf, Sdf, Usd, UsdGeom, UsdShade, Vt

from raydream.scene.export import normal_picture, to_uint8, write_png
from raydream.scene.texture import vertex_normals
from raydream.types import Mesh


def write_usdz(mesh: Mesh, unlit: bool = False) -> bytes:
    """The bytes of the package, +y up and metres, as glTF means its units."""
    assert mesh.texture is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "color.png").write_bytes(write_png(to_uint8(mesh.texture)))
        if mesh.normal_map is not None:
            (folder / "normal.png").write_bytes(write_png(normal_picture(mesh.normal_map)))
        stage = Usd.Stage.CreateNew(str(folder / "mesh.usdc"))
        UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
        UsdGeom.SetStageMetersPerUnit(stage, 1.0)
        root = UsdGeom.Xform.Define(stage, "/asset")
        stage.SetDefaultPrim(root.GetPrim())
        surface = _surface(stage, mesh)
        UsdShade.MaterialBindingAPI.Apply(surface.GetPrim()).Bind(_material(stage, mesh, unlit))
        stage.GetRootLayer().Save()
        packed = folder / "mesh.usdz"
        with Sdf.ZipFileWriter.CreateNew(str(packed)) as package:
            for file in [folder / "mesh.usdc", *sorted(folder.glob("*.png"))]:  # the layer must come first
                package.AddFile(str(file), file.name)
        return packed.read_bytes()


def _surface(stage: Usd.Stage, mesh: Mesh) -> UsdGeom.Mesh:
    vertices, faces = mesh.vertices.numpy().astype(np.float32), mesh.faces.numpy().astype(np.int32)
    surface = UsdGeom.Mesh.Define(stage, "/asset/mesh")
    surface.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(vertices))
    surface.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(faces), 3, np.int32)))
    surface.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(faces.reshape(-1)))
    surface.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(vertex_normals(vertices, faces).astype(np.float32)))
    surface.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    surface.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)  # else viewers would round it
    surface.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(np.stack([vertices.min(0), vertices.max(0)])))
    assert mesh.uv is not None
    places = UsdGeom.PrimvarsAPI(surface).CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.vertex)
    places.Set(Vt.Vec2fArray.FromNumpy(mesh.uv.numpy().astype(np.float32)))
    return surface


def _material(stage: Usd.Stage, mesh: Mesh, unlit: bool) -> UsdShade.Material:
    material = UsdShade.Material.Define(stage, "/asset/baked")
    shader = _shader(stage, "/asset/baked/surface", "UsdPreviewSurface")
    reader = _shader(stage, "/asset/baked/st", "UsdPrimvarReader_float2")
    reader.CreateInput("varname", Sdf.ValueTypeNames.String).Set("st")
    place = reader.CreateOutput("result", Sdf.ValueTypeNames.Float2)
    color = _texture(stage, "color", place, "sRGB")
    shader.CreateInput("roughness", Sdf.ValueTypeNames.Float).Set(mesh.roughness)
    shader.CreateInput("metallic", Sdf.ValueTypeNames.Float).Set(mesh.metallic)
    shown = "emissiveColor" if unlit else "diffuseColor"
    shader.CreateInput(shown, Sdf.ValueTypeNames.Color3f).ConnectToSource(color)
    if unlit:
        shader.CreateInput("diffuseColor", Sdf.ValueTypeNames.Color3f).Set(Gf.Vec3f(0, 0, 0))
    if mesh.normal_map is not None:
        normal = _texture(stage, "normal", place, "raw")
        shader.CreateInput("normal", Sdf.ValueTypeNames.Normal3f).ConnectToSource(normal)
    material.CreateSurfaceOutput().ConnectToSource(shader.CreateOutput("surface", Sdf.ValueTypeNames.Token))
    return material


def _texture(stage: Usd.Stage, name: str, place: UsdShade.Output, color_space: str) -> UsdShade.Output:
    texture = _shader(stage, f"/asset/baked/{name}", "UsdUVTexture")
    texture.CreateInput("file", Sdf.ValueTypeNames.Asset).Set(f"{name}.png")
    texture.CreateInput("sourceColorSpace", Sdf.ValueTypeNames.Token).Set(color_space)
    texture.CreateInput("st", Sdf.ValueTypeNames.Float2).ConnectToSource(place)
    for axis in ("wrapS", "wrapT"):
        texture.CreateInput(axis, Sdf.ValueTypeNames.Token).Set("clamp")
    if color_space == "raw":  # from a picture's [0, 1] to [-1, 1]
        texture.CreateInput("scale", Sdf.ValueTypeNames.Float4).Set(Gf.Vec4f(2, 2, 2, 1))
        texture.CreateInput("bias", Sdf.ValueTypeNames.Float4).Set(Gf.Vec4f(-1, -1, -1, 0))
    return texture.CreateOutput("rgb", Sdf.ValueTypeNames.Float3)


def _shader(stage: Usd.Stage, path: str, kind: str) -> UsdShade.Shader:
    shader = UsdShade.Shader.Define(stage, path)
    shader.CreateIdAttr(kind)
    return shader
