"""Finished assets as the bytes of files that other programs open: GLB, PNG and MP4.

Axes and units are left alone: +y is up and the front (azimuth 0) faces +z, in the world as in glTF. Colours are sRGB,
which is what textures and pictures hold.
"""

import io
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import trimesh
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from raydream.scene.tangents import vertex_tangents
from raydream.scene.texture import vertex_normals
from raydream.types import Mesh

MIN_VIDEO_SIDE_PX = 256


class TurntableError(RuntimeError):
    """There is no film: ffmpeg is not here, failed, or had no room for its work."""


def write_glb(mesh: Mesh, unlit: bool = False) -> bytes:
    """A binary glTF 2.0 file of a textured mesh, everything inside, with normals and the mesh's material; with tangents
    (``tangents.py``) where it has a normal map.

    Lit by default: viewers then show the form, and a scene trained with shading has a true albedo. ``unlit`` asks them
    (KHR_materials_unlit) for the texture as it is, which repeats the renders of a scene whose albedo holds its light.
    Raises ValueError for a mesh without a texture.
    """
    if mesh.texture is None or mesh.uv is None:
        raise ValueError("mesh.texture: a GLB needs a baked texture")

    def sign(tree: dict) -> None:
        tree["asset"]["generator"] = "raydream"
        attributes = tree["meshes"][0]["primitives"][0]["attributes"]
        if "_TANGENT" in attributes:  # trimesh marks what it does not know as ours
            attributes["TANGENT"] = attributes.pop("_TANGENT")
        if unlit:
            tree["extensionsUsed"] = [*tree.get("extensionsUsed", []), "KHR_materials_unlit"]
            tree["materials"][0]["extensions"] = {"KHR_materials_unlit": {}}

    uv, vertices, faces = mesh.uv.cpu().numpy(), mesh.vertices.detach().cpu().numpy(), mesh.faces.cpu().numpy()
    normals = vertex_normals(vertices, faces)
    material = trimesh.visual.material.PBRMaterial(
        name="baked",
        baseColorTexture=Image.fromarray(to_uint8(mesh.texture)),
        normalTexture=None if mesh.normal_map is None else Image.fromarray(normal_picture(mesh.normal_map)),
        metallicFactor=mesh.metallic,
        roughnessFactor=mesh.roughness,
        doubleSided=False,
    )
    solid = trimesh.Trimesh(
        vertices=vertices,
        faces=faces,
        vertex_normals=normals,
        visual=trimesh.visual.TextureVisuals(uv=uv, material=material),
        process=False,
    )
    if mesh.normal_map is not None:
        solid.vertex_attributes["_TANGENT"] = vertex_tangents(vertices, normals, faces, uv).astype(np.float32)
    scene = trimesh.Scene()
    scene.add_geometry(solid, node_name="asset", geom_name="asset")
    return trimesh.exchange.gltf.export_glb(scene, include_normals=True, tree_postprocessor=sign)


def normal_picture(normals: Float[Tensor, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Unit vectors as glTF's and most other formats' pictures have them: -1 is 0 and 1 is 255."""
    return to_uint8(normals * 0.5 + 0.5)


def write_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A PNG file of one picture."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def write_turntable(frames: list[UInt8[np.ndarray, "h w 3"]], fps: int) -> bytes:
    """An H.264 MP4 film that every browser plays: 4:2:0, even sizes, BT.709 and tagged so, index before the data.

    Small frames are enlarged to at least 256 px (Lanczos), odd sides get one more pixel. Raises TurntableError with
    ffmpeg's own words if it fails.
    """
    film = np.stack([_for_video(frame) for frame in frames])
    _, height, width, _ = film.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    convert = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"
    tag = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    codec = ["-c:v", "libx264", "-crf", "18", "-preset", "medium", "-threads", "1", "-movflags", "+faststart"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "turntable.mp4"
            command = [_ffmpeg(), "-v", "error", *source, "-vf", f"{convert},{tag}", *codec]
            result = subprocess.run([*command, str(path)], input=film.tobytes(), capture_output=True, check=False)
            if result.returncode != 0:
                reason = result.stderr.decode(errors="replace").strip()
                raise TurntableError(f"ffmpeg could not write the turntable: {reason}")
            return path.read_bytes()
    except OSError as error:
        raise TurntableError(f"ffmpeg could not write the turntable: {error}") from error


def to_uint8(image: Float[Tensor, "*pixel 3"]) -> UInt8[np.ndarray, "*pixel 3"]:
    """Colours in [0, 1], rounded to the nearest of 256 levels."""
    return (image.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()


def _ffmpeg() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise TurntableError(str(error)) from error


def _for_video(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "even_h even_w 3"]:
    height, width, _ = frame.shape
    scale = -(-MIN_VIDEO_SIDE_PX // min(height, width))
    if scale > 1:
        frame = np.asarray(Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.LANCZOS))
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
