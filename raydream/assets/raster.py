"""Views of an asset: albedo, opacity, depth, normals and canonical coordinates, antialiased by supersampling.

``Backend.rasterize`` finds the visible face of each sample; the shading of all samples and their mean over a pixel is
one numba kernel on the CPU (``shade_cpu.py``) or its torch twin here. Faces are two-sided: an object must look the same
to views that are meant to agree about it, whichever way its maker wound the triangles.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from raydream.assets.asset import WRAP_CLAMP, WRAP_REPEAT, Asset, Textures
from raydream.camera import clip_from_world
from raydream.coordinates import canonical_coordinates, tight_box
from raydream.types import Backend, Cameras, Fragments

NUM_CHANNELS = 11  # rgb 3, alpha 1, depth 1, normal 3, ccm 3


@dataclass(frozen=True)
class AssetViews:
    """What cameras see of an asset. Every image is weighted by ``alpha``, the covered part of the pixel.

    ``rgb`` is display-space albedo (premultiplied: add ``(1 - alpha) * background``); ``depth`` the distance along the
    viewing axis; ``normal`` a world-space unit vector that faces the camera; ``ccm`` the coordinate in [0, 1]^3 of the
    asset's own tight box. Divide by ``alpha`` for the mean over the object alone.
    """

    rgb: Float[Tensor, "view h w 3"]
    alpha: Float[Tensor, "view h w 1"]
    depth: Float[Tensor, "view h w 1"]
    normal: Float[Tensor, "view h w 3"]
    ccm: Float[Tensor, "view h w 3"]


def render_asset(asset: Asset, cameras: Cameras, backend: Backend, supersample: int = 2) -> AssetViews:
    """All views of one asset; ``supersample`` samples along each side of a pixel. Not differentiable."""
    corner = F.pad(asset.vertices, (0, 1), value=1.0)
    clip = corner @ clip_from_world(cameras).transpose(1, 2)
    height_px, width_px = cameras.height_px * supersample, cameras.width_px * supersample
    fragments = backend.rasterize(clip, asset.faces, height_px, width_px)
    eyes = cameras.c2w[:, :3, 3]
    if backend.name == "numba" and find_spec("numba") is not None:
        from raydream.assets.shade_cpu import shade_samples_numba

        packed = shade_samples_numba(asset, fragments, clip, eyes, supersample)
    else:
        packed = shade_samples(asset, fragments, clip, eyes, supersample)
    rgb, alpha, depth, normal, ccm = packed.split([3, 1, 1, 3, 3], dim=-1)
    return AssetViews(rgb, alpha, depth, normal, ccm)


def shade(views: AssetViews, cameras: Cameras, ambient: float = 0.5) -> Float[Tensor, "view h w 1"]:
    """How much light a surface sends back, in [ambient, 1]: a lamp stands above and to the right of each camera.

    Not weighted by alpha; meaningless where there is nothing.
    """
    direction = F.normalize(cameras.c2w[:, :3, :3] @ cameras.c2w.new_tensor([0.4, 0.6, 1.0]), dim=-1)
    normal = views.normal / views.alpha.clamp_min(1e-6)
    cosine = (normal * direction[:, None, None]).sum(-1, keepdim=True).clamp(0, 1)
    return ambient + (1 - ambient) * cosine


def shade_samples(
    asset: Asset,
    fragments: Fragments,
    clip: Float[Tensor, "view vertex 4"],
    eyes: Float[Tensor, "view 3"],
    supersample: int,
) -> Float[Tensor, "view h w 11"]:
    """The mean over each pixel's samples of rgb, alpha, depth, normal and ccm: the plain torch truth.

    Samples without a face are shaded too and then left out: to pick the others, a host would wait for its GPU.
    """
    num_views, height, width = fragments.face.shape
    there, face = (fragments.face >= 0).flatten(), fragments.face.clamp(min=0).flatten().long()
    view = torch.arange(num_views, device=face.device).repeat_interleave(height * width, output_size=len(face))
    barycentric = fragments.barycentric.reshape(-1, 3, 1)
    corners = asset.vertices[asset.faces[face]]
    points = (barycentric * corners).sum(1)
    geometric = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    geometric = geometric * torch.sign((geometric * (eyes[view] - points)).sum(-1, keepdim=True))
    normal = F.normalize((barycentric * asset.corner_normals[face]).sum(1), dim=-1)
    normal = torch.where((normal * geometric).sum(-1, keepdim=True) < 0, -normal, normal)
    rgb = (barycentric * asset.corner_colors[face]).sum(1)
    if len(asset.textures.levels):
        texture = asset.face_texture[face]
        textured = there & (texture >= 0)
        texture = texture.clamp(min=0)
        uv = (barycentric * asset.corner_uv[face]).sum(1)
        detail = torch.where(textured, _texture_detail(asset, clip, view, face, texture, (height, width)), 0)
        rgb = torch.where(textured[:, None], rgb * sample_textures(asset.textures, texture, uv, detail), rgb)
    depth = fragments.depth.reshape(-1, 1)
    ccm = canonical_coordinates(points, tight_box(asset.vertices))
    samples = torch.cat([rgb, torch.ones_like(depth), depth, normal, ccm], dim=-1).masked_fill(~there[:, None], 0)
    blocks = samples.view(
        num_views, height // supersample, supersample, width // supersample, supersample, NUM_CHANNELS
    )
    return blocks.mean(dim=(2, 4))


def _texture_detail(
    asset: Asset,
    clip: Float[Tensor, "view vertex 4"],
    view: Int[Tensor, " n"],
    face: Int[Tensor, " n"],
    texture: Int[Tensor, " n"],
    size: tuple[int, int],
) -> Float[Tensor, " n"]:
    """log2 of texels per sample along a side, by the areas of the whole face in the texture and on the screen."""
    corners = clip[view[:, None], asset.faces[face]]
    x, y = corners[..., 0] / corners[..., 3] * (size[1] / 2), corners[..., 1] / corners[..., 3] * (size[0] / 2)
    screen = ((x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])).abs()
    uv = asset.corner_uv[face]
    first, second = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    texels = asset.textures.levels[texture, 0, 1:].prod(-1)
    covered = (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]).abs() * texels
    return 0.5 * torch.log2(covered.clamp_min(1e-20) / screen.clamp_min(1e-20))


def sample_textures(
    textures: Textures, texture: Int[Tensor, " n"], uv: Float[Tensor, "n 2"], detail: Float[Tensor, " n"]
) -> Float[Tensor, "n 3"]:
    """Texture colours in [0, 1]: trilinear where the texture is shrunk (detail > 0), else bilinear or nearest."""
    level = detail.clamp(0, textures.levels.shape[1] - 1)
    fine = level.floor().long()
    coarse = (fine + 1).clamp_max(textures.levels.shape[1] - 1)
    nearest = ~textures.smooth[texture] & (detail <= 0)
    colors = _sample_level(textures, texture, fine, uv, nearest)
    return torch.lerp(colors, _sample_level(textures, texture, coarse, uv, nearest), (level - fine)[:, None])


def _sample_level(
    textures: Textures, texture: Int[Tensor, " n"], level: Int[Tensor, " n"], uv: Float[Tensor, "n 2"], nearest: Tensor
) -> Float[Tensor, "n 3"]:
    offset, height, width = textures.levels[texture, level].unbind(-1)
    x, y = uv[:, 0] * width - 0.5, uv[:, 1] * height - 0.5
    x, y = torch.where(nearest, (x + 0.5).floor(), x), torch.where(nearest, (y + 0.5).floor(), y)
    left, top = x.floor().long(), y.floor().long()
    right_weight, bottom_weight = (x - left)[:, None], (y - top)[:, None]
    columns = [_wrap(left + step, width, textures.wrap[texture, 0]) for step in (0, 1)]
    rows = [_wrap(top + step, height, textures.wrap[texture, 1]) for step in (0, 1)]
    texel = [[textures.texels[offset + row * width + column].to(uv.dtype) for column in columns] for row in rows]
    upper, lower = (torch.lerp(left_texel, right_texel, right_weight) for left_texel, right_texel in texel)
    return torch.lerp(upper, lower, bottom_weight) / 255


def _wrap(index: Int[Tensor, " n"], size: Int[Tensor, " n"], mode: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    repeated = index % size
    folded = index % (2 * size)
    mirrored = torch.minimum(folded, 2 * size - 1 - folded)
    clamped = torch.minimum(index.clamp_min(0), size - 1)
    return torch.where(mode == WRAP_REPEAT, repeated, torch.where(mode == WRAP_CLAMP, clamped, mirrored))


def asset_to(asset: Asset, device: torch.device | str) -> Asset:
    """The asset with all its tensors on a device."""

    def tensors_of(owner: Asset | Textures) -> dict[str, Any]:
        return {name: value.to(device) for name, value in vars(owner).items() if isinstance(value, Tensor)}

    return replace(asset, **tensors_of(asset), textures=Textures(**tensors_of(asset.textures)))
