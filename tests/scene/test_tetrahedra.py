"""Marching tetrahedra against bodies whose area, volume and genus are known, and against finite differences."""

import math

import numpy as np
import pytest
import torch
import trimesh
from jaxtyping import Float, Int
from torch import Tensor

from raydream.scene.protocol import EmptyMeshError
from raydream.scene.tetrahedra import grid_points, marching_tetrahedra

LOWER = torch.tensor([-1.0, -0.9, -1.1], dtype=torch.float64)
UPPER = torch.tensor([1.1, 1.0, 1.0], dtype=torch.float64)


def ball(points: Tensor) -> Tensor:
    return 0.6 - points.norm(dim=-1)


def torus(points: Tensor) -> Tensor:
    return 0.25 - torch.stack([points[..., [0, 2]].norm(dim=-1) - 0.6, points[..., 1]], dim=-1).norm(dim=-1)


# signed distance, area, volume, Euler characteristic
BODIES = {
    "ball": (ball, 4 * math.pi * 0.6**2, 4 / 3 * math.pi * 0.6**3, 2),
    "torus": (torus, 4 * math.pi**2 * 0.6 * 0.25, 2 * math.pi**2 * 0.6 * 0.25**2, 0),
}


def grid(*num_points: int) -> Float[Tensor, "nx ny nz 3"]:
    shape = torch.Size(num_points)
    return grid_points(torch.arange(shape.numel()), shape, LOWER, UPPER).reshape(*shape, 3)


def body_of(vertices: Float[Tensor, "vertex 3"], faces: Int[Tensor, "face 3"]) -> trimesh.Trimesh:
    return trimesh.Trimesh(vertices.detach().numpy(), faces.numpy(), process=False)


def assert_closed(mesh: trimesh.Trimesh) -> None:
    """Two faces at each edge, in opposite directions, and one fan of faces around each vertex."""
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert set(mesh.faces.ravel()) == set(range(len(mesh.vertices)))
    corner_of = [{vertex: 3 * face + place for place, vertex in enumerate(row)} for face, row in enumerate(mesh.faces)]
    pairs = zip(mesh.face_adjacency, mesh.face_adjacency_edges)
    beside = [(corner_of[one][v], corner_of[other][v]) for (one, other), edge in pairs for v in edge]
    fans = trimesh.graph.connected_component_labels(np.array(beside), node_count=mesh.faces.size)
    assert len(set(fans)) == len(mesh.vertices)


@pytest.mark.parametrize("name", BODIES)
def test_area_and_volume_converge_at_second_order(name: str) -> None:
    distance, area, volume, euler = BODIES[name]
    errors = []
    for resolution in (16, 32, 64):
        points = grid(*[resolution + 1] * 3)
        mesh = body_of(*marching_tetrahedra(distance(points), torch.zeros_like(points), LOWER, UPPER))
        assert_closed(mesh)
        assert mesh.euler_number == euler
        errors.append((1 - mesh.area / area, 1 - mesh.volume / volume))
    for coarse, fine in ((0, 1), (1, 2)):
        for before, after in zip(errors[coarse], errors[fine]):
            assert before / after == pytest.approx(4, rel=0.15)
    assert 0 < errors[-1][0] < 1e-3
    assert 0 < errors[-1][1] < 3e-3


def test_vertices_lie_on_the_surface_and_faces_look_outwards() -> None:
    points = grid(20, 24, 28)
    vertices, faces = marching_tetrahedra(ball(points), torch.zeros_like(points), LOWER, UPPER)
    assert ball(vertices).abs().max() < 0.01  # of cells of 0.1
    a, b, c = vertices[faces].unbind(1)
    assert ((torch.linalg.cross(b - a, c - a) * (a + b + c)).sum(-1) > -1e-9).all()


def test_any_values_and_deformations_make_a_closed_surface(generator: torch.Generator) -> None:
    """Also zeros, and a solid that fills its box: that ends where the box does."""
    drawn = torch.randn(12, 11, 10, generator=generator, dtype=torch.float64)
    deformation = 3 * torch.randn(12, 11, 10, 3, generator=generator, dtype=torch.float64)
    for values in (drawn, drawn.round(), torch.ones_like(drawn)):
        vertices, faces = marching_tetrahedra(values, deformation, LOWER, UPPER)
        mesh = body_of(vertices, faces)
        assert mesh.is_watertight
        assert mesh.is_winding_consistent
        assert mesh.volume > 0
        cell = (UPPER - LOWER) / torch.tensor([11, 10, 9])
        assert ((vertices > LOWER - cell / 2) & (vertices < UPPER + cell / 2)).all()
    assert mesh.volume == pytest.approx(float((UPPER - LOWER).prod()), rel=0.1)


def test_gradients_are_those_of_finite_differences(generator: torch.Generator) -> None:
    points = grid(6, 7, 5)
    values = (ball(points) + 0.05 * torch.randn(points.shape[:3], generator=generator, dtype=torch.float64)) * 3
    deformation = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (values, deformation, LOWER.clone(), UPPER.clone())]
    weight = torch.randn(1000, 3, generator=generator, dtype=torch.float64)

    def pull(*inputs: Tensor) -> Tensor:
        vertices, _ = marching_tetrahedra(*inputs)
        return (vertices * weight[: len(vertices)]).sin().sum()

    assert torch.autograd.gradcheck(pull, inputs, eps=1e-6, atol=1e-6, fast_mode=True)
    gradients = torch.autograd.grad(pull(*inputs), inputs)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_a_vanished_surface_is_a_clear_error() -> None:
    points = grid(5, 5, 5)
    with pytest.raises(EmptyMeshError, match=r"vanished.*lower lr_values"):
        marching_tetrahedra(-torch.ones(5, 5, 5, dtype=torch.float64), torch.zeros_like(points), LOWER, UPPER)
