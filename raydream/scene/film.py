"""Pictures of a finished mesh as a viewer shows it: its texture under a lamp, which is what makes form visible."""

import numpy as np
import torch
from jaxtyping import UInt8

from raydream.assets.asset import WRAP_CLAMP, Asset
from raydream.assets.parts import Material, Part, build_asset
from raydream.assets.raster import render_asset, shade
from raydream.scene.export import to_uint8
from raydream.scene.texture import vertex_normals
from raydream.types import Backend, Cameras, Mesh

_SUPERSAMPLE = 2


def mesh_asset(mesh: Mesh) -> Asset:
    """A textured mesh as the rasteriser takes it, on the CPU. ``ValueError`` where it has no texture."""
    if mesh.texture is None or mesh.uv is None:
        raise ValueError("mesh.texture: pictures need a baked texture")
    vertices, faces = mesh.vertices.detach().cpu().numpy(), mesh.faces.cpu().numpy()
    rgb = to_uint8(mesh.texture)
    part = Part(
        positions=vertices,
        triangles=faces,
        material=Material(image=np.dstack([rgb, np.full_like(rgb[..., :1], 255)]), wrap=(WRAP_CLAMP, WRAP_CLAMP)),
        normals=vertex_normals(vertices, faces),
        uv=mesh.uv.cpu().numpy() * (1, -1) + (0, 1),  # v down, as in glTF
    )
    return build_asset("", "", [part], [])


@torch.no_grad()
def lit_pictures(asset: Asset, cameras: Cameras, backend: Backend) -> UInt8[np.ndarray, "view h w 4"]:
    """Straight colour and alpha; the lamp stands above and to the right of each camera (``shade``)."""
    views = render_asset(asset, cameras, backend, _SUPERSAMPLE)
    color = views.rgb / views.alpha.clamp(min=1e-4) * shade(views, cameras)
    return (torch.cat([color, views.alpha], dim=-1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
