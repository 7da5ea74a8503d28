"""Surfaces whose form, colours and normals are known, finished as a run finishes them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from raydream.config.cluster import OutputConfig
from raydream.scene.finish import finish_mesh
from raydream.scene.isosurface import extract_surface
from raydream.types import Mesh

SMALL = OutputConfig(mesh_max_faces=500, texture_px=256, normal_map=True, roughness=0.5, metallic=0.25)
_WAVES, _HEIGHT = 12.0, 0.03


def height_above(points: Tensor) -> Tensor:
    """The distance (about) to a ball with waves that 500 faces do not show."""
    return points.norm(dim=-1) - 0.6 - _HEIGHT * torch.sin(_WAVES * points).prod(-1)


def wavy_density(points: Tensor) -> Tensor:
    return (100 - 2000 * height_above(points)).clamp(0, 200)


def wavy_normal(points: Tensor) -> Tensor:
    with torch.enable_grad():
        points = points.double().requires_grad_()
        (gradient,) = torch.autograd.grad(height_above(points).sum(), points)
    return F.normalize(gradient, dim=-1)


def color_of_place(points: Tensor, normals: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.sin(points * torch.tensor([3.0, 4.0, 2.0]) + torch.tensor([0.0, 1.0, 2.0]))


def fine_ball() -> Mesh:
    return extract_surface(wavy_density, 72)


def finished_ball(surface: Mesh) -> Mesh:
    return finish_mesh(surface, color_of_place, SMALL)
