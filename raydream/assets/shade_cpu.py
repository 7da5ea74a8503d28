"""The numba twin of ``raster.shade_samples``: one pass over the samples, many times quicker than the torch calls."""

import math
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from raydream.assets.asset import WRAP_CLAMP, WRAP_REPEAT, Asset
from raydream.coordinates import tight_box
from raydream.types import Fragments

NUM_CHANNELS = 11

# no_type_check keeps jaxtyping's import hook from wrapping what numba has to compile.
kernel = njit(nogil=True, cache=True, error_model="numpy")


def shade_samples_numba(
    asset: Asset,
    fragments: Fragments,
    clip: Float[Tensor, "view vertex 4"],
    eyes: Float[Tensor, "view 3"],
    supersample: int,
) -> Float[Tensor, "view h w 11"]:
    """The same as ``raster.shade_samples`` for float32 tensors on the CPU."""
    box = tight_box(asset.vertices)
    textures = asset.textures
    num_views, height_px, width_px = fragments.face.shape
    out = torch.zeros(num_views, height_px // supersample, width_px // supersample, NUM_CHANNELS)
    seen = (fragments.face, fragments.barycentric, fragments.depth, clip, eyes.contiguous())
    surface = (asset.vertices, asset.faces, asset.corner_colors, asset.corner_normals, asset.corner_uv)
    colours = (asset.face_texture, textures.texels, textures.levels, textures.wrap, textures.smooth)
    tensors = (*seen, *surface, *colours, box.minimum, box.extents)
    _shade(*(tensor.numpy() for tensor in tensors), supersample, out.numpy())
    return out


@kernel
@no_type_check
def _wrap(index, size, mode):
    if 0 <= index < size:
        return index  # nearly always; a division costs more than the rest
    if mode == WRAP_REPEAT:
        return index % size
    if mode == WRAP_CLAMP:
        return min(max(index, 0), size - 1)
    folded = index % (2 * size)
    return min(folded, 2 * size - 1 - folded)


@kernel
@no_type_check
def _texel(texels, place, weight, red, green, blue):
    return red + weight * texels[place, 0], green + weight * texels[place, 1], blue + weight * texels[place, 2]


@kernel
@no_type_check
def _sample_level(texels, offset, height, width, wrap_s, wrap_t, u, v, nearest):
    """A level's bilinear or nearest colour in [0, 255]. Scalars all the way: a view of an array would cost more."""
    x, y = u * width - np.float32(0.5), v * height - np.float32(0.5)
    if nearest:
        x, y = np.float32(math.floor(x + np.float32(0.5))), np.float32(math.floor(y + np.float32(0.5)))
    left, top = math.floor(x), math.floor(y)
    fx, fy = np.float32(x - left), np.float32(y - top)
    gx, gy = np.float32(1) - fx, np.float32(1) - fy
    column0, column1 = _wrap(left, width, wrap_s), _wrap(left + 1, width, wrap_s)
    row0, row1 = offset + _wrap(top, height, wrap_t) * width, offset + _wrap(top + 1, height, wrap_t) * width
    red = green = blue = np.float32(0)
    red, green, blue = _texel(texels, row0 + column0, gx * gy, red, green, blue)
    red, green, blue = _texel(texels, row0 + column1, fx * gy, red, green, blue)
    red, green, blue = _texel(texels, row1 + column0, gx * fy, red, green, blue)
    return _texel(texels, row1 + column1, fx * fy, red, green, blue)


@kernel
@no_type_check
def _sample_texture(texels, levels, wrap, smooth, texture, u, v, detail):
    """A texture's colour in [0, 1]: trilinear where the texture is shrunk, else bilinear or nearest."""
    level = min(max(detail, np.float32(0)), np.float32(levels.shape[1] - 1))
    fine = int(level)
    between = np.float32(level - fine)
    nearest = not smooth[texture] and detail <= 0
    wrap_s, wrap_t = wrap[texture, 0], wrap[texture, 1]
    offset, height, width = levels[texture, fine, 0], levels[texture, fine, 1], levels[texture, fine, 2]
    red, green, blue = _sample_level(texels, offset, height, width, wrap_s, wrap_t, u, v, nearest)
    if between > 0:
        fine += 1
        offset, height, width = levels[texture, fine, 0], levels[texture, fine, 1], levels[texture, fine, 2]
        red1, green1, blue1 = _sample_level(texels, offset, height, width, wrap_s, wrap_t, u, v, nearest)
        red, green, blue = (
            red + between * (red1 - red),
            green + between * (green1 - green),
            blue + between * (blue1 - blue),
        )
    unit = np.float32(1 / 255)
    return red * unit, green * unit, blue * unit


@kernel
@no_type_check
def _detail(clip, uvs, view, face, a, b, c, half_width, half_height, num_texels):
    """log2 of texels per sample along a side, by the areas of the whole face in the texture and on the screen."""
    x0, y0 = clip[view, a, 0] / clip[view, a, 3], clip[view, a, 1] / clip[view, a, 3]
    x1, y1 = clip[view, b, 0] / clip[view, b, 3] - x0, clip[view, b, 1] / clip[view, b, 3] - y0
    x2, y2 = clip[view, c, 0] / clip[view, c, 3] - x0, clip[view, c, 1] / clip[view, c, 3] - y0
    screen = abs(x1 * y2 - y1 * x2) * half_width * half_height
    u1, v1 = uvs[face, 1, 0] - uvs[face, 0, 0], uvs[face, 1, 1] - uvs[face, 0, 1]
    u2, v2 = uvs[face, 2, 0] - uvs[face, 0, 0], uvs[face, 2, 1] - uvs[face, 0, 1]
    covered = abs(u1 * v2 - v1 * u2) * num_texels
    return np.float32(0.5 * math.log2(max(covered, 1e-20) / max(screen, 1e-20)))


@kernel
@no_type_check
def _facing_normal(vertices, eyes, view, a, b, c):
    """The face's normal, of any length, on the side of the camera."""
    px, py, pz = vertices[a, 0], vertices[a, 1], vertices[a, 2]
    ux, uy, uz = vertices[b, 0] - px, vertices[b, 1] - py, vertices[b, 2] - pz
    vx, vy, vz = vertices[c, 0] - px, vertices[c, 1] - py, vertices[c, 2] - pz
    gx, gy, gz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    if gx * (eyes[view, 0] - px) + gy * (eyes[view, 1] - py) + gz * (eyes[view, 2] - pz) < 0:
        return -gx, -gy, -gz
    return gx, gy, gz


@kernel
@no_type_check
def _shade(
    face_index, barycentric, depth, clip, eyes, vertices, faces, colors, normals, uvs, face_texture,
    texels, levels, wrap, smooth, box_minimum, box_extents, supersample, out,
):  # fmt: skip
    num_views, height, width, _ = out.shape
    one = np.float32(1)
    share = np.float32(1 / (supersample * supersample))
    half_width, half_height = width * supersample / 2, height * supersample / 2
    for view in range(num_views):
        last_face, texture, detail = -1, -1, np.float32(0)
        gx = gy = gz = np.float32(0)
        for y in range(height * supersample):
            row = y // supersample
            for x in range(width * supersample):
                face = face_index[view, y, x]
                if face < 0:
                    continue
                column = x // supersample
                a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
                if face != last_face:
                    last_face, texture = face, face_texture[face]
                    gx, gy, gz = _facing_normal(vertices, eyes, view, a, b, c)
                    if texture >= 0:
                        num_texels = levels[texture, 0, 1] * levels[texture, 0, 2]
                        detail = _detail(clip, uvs, view, face, a, b, c, half_width, half_height, num_texels)
                wa, wb, wc = barycentric[view, y, x, 0], barycentric[view, y, x, 1], barycentric[view, y, x, 2]
                nx = wa * normals[face, 0, 0] + wb * normals[face, 1, 0] + wc * normals[face, 2, 0]
                ny = wa * normals[face, 0, 1] + wb * normals[face, 1, 1] + wc * normals[face, 2, 1]
                nz = wa * normals[face, 0, 2] + wb * normals[face, 1, 2] + wc * normals[face, 2, 2]
                scale = share / np.float32(math.sqrt(max(nx * nx + ny * ny + nz * nz, np.float32(1e-24))))
                if nx * gx + ny * gy + nz * gz < 0:
                    scale = -scale
                red = green = blue = one
                if texture >= 0:
                    u = wa * uvs[face, 0, 0] + wb * uvs[face, 1, 0] + wc * uvs[face, 2, 0]
                    v = wa * uvs[face, 0, 1] + wb * uvs[face, 1, 1] + wc * uvs[face, 2, 1]
                    red, green, blue = _sample_texture(texels, levels, wrap, smooth, texture, u, v, detail)
                red *= wa * colors[face, 0, 0] + wb * colors[face, 1, 0] + wc * colors[face, 2, 0]
                green *= wa * colors[face, 0, 1] + wb * colors[face, 1, 1] + wc * colors[face, 2, 1]
                blue *= wa * colors[face, 0, 2] + wb * colors[face, 1, 2] + wc * colors[face, 2, 2]
                out[view, row, column, 0] += share * red
                out[view, row, column, 1] += share * green
                out[view, row, column, 2] += share * blue
                out[view, row, column, 3] += share
                out[view, row, column, 4] += share * depth[view, y, x]
                out[view, row, column, 5] += scale * nx
                out[view, row, column, 6] += scale * ny
                out[view, row, column, 7] += scale * nz
                for axis in range(3):
                    place = wa * vertices[a, axis] + wb * vertices[b, axis] + wc * vertices[c, axis]
                    extent = box_extents[axis]
                    coordinate = (place - box_minimum[axis]) / extent if extent > 0 else np.float32(0.5)
                    out[view, row, column, 8 + axis] += share * coordinate
