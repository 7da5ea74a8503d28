"""Which samples of its rays a NeRF scene looks at, and how many at a time."""

import dataclasses
import math

import pytest
import torch
from small_scenes import CPU, SHADING, SMALL, make_cameras, make_constant, make_scene
from torch import Tensor
from torch.nn import functional as F

from raydream.backend import load_backend
from raydream.config.scene import LossConfig
from raydream.scene.nerf import NerfScene, plain_look
from raydream.schedule import Constant

NERFACC_RULE = {"min_alpha": 0.01, "min_transmittance": 1e-4}
ALL_LOSSES = LossConfig(Constant(0.7), Constant(0.5), Constant(2.0), Constant(3.0))


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def test_pruning_leaves_the_picture_of_a_ball_alone() -> None:
    """The updated grid drops most samples and, by its threshold, next to no opacity."""
    ball = dataclasses.replace(SMALL, occupancy_resolution=16)
    draws = torch.Generator().manual_seed(0)
    scene = NerfScene(ball, SHADING, LossConfig(), load_backend("numba", "cpu"), CPU, lambda *_: draws)
    cameras = make_cameras([0.0], 24)
    cameras = dataclasses.replace(cameras, c2w=cameras.c2w.float(), fov_y_deg=cameras.fov_y_deg.float())
    scene.occupancy.values.fill_(1.0)
    whole = scene.volume(cameras, plain_look(1))
    scene.occupancy.values.zero_()
    scene.update_occupancy(torch.Generator().manual_seed(0))
    pruned = scene.volume(cameras, plain_look(1))
    assert pruned.volume is not None
    assert whole.volume is not None
    assert len(pruned.volume.weights) < 0.35 * len(whole.volume.weights)
    difference = (whole.opacity - pruned.opacity).abs()
    assert difference.mean() < 0.01  # measured 0.006
    assert difference.max() < 0.1


def test_what_cannot_be_seen_is_left_out_of_a_render(backend: str) -> None:
    """Nine tenths of a soft ball's samples; the picture changes by what they are worth, and learns the same way."""
    whole, seen = (make_scene(backend, dataclasses.replace(SMALL, **rule)) for rule in ({}, NERFACC_RULE))
    cameras = make_cameras([40.0], 16)
    renders = [scene.volume(cameras, plain_look(1)) for scene in (whole, seen)]
    every, few = (len(render.volume.weights) for render in renders if render.volume is not None)
    assert 0.05 * every < few < 0.2 * every
    difference = (renders[0].opacity - renders[1].opacity).abs()
    assert 0 < difference.mean() < 0.01  # measured 0.005
    gradients = []
    for scene, render in zip((whole, seen), renders):
        render.rgb.square().sum().backward()
        assert scene.field.table.grad is not None
        gradients.append(scene.field.table.grad.flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_thin_fog_is_not_left_out(backend: str) -> None:
    """nerfacc's rule: where all space is thinner than ``min_alpha``, what is thinner than its average is left out."""
    scene = make_scene(backend, dataclasses.replace(SMALL, initial_density_lambda=0.0, **NERFACC_RULE))
    make_constant(scene, (-8.0, 0.0, 0.0, 0.0))
    density = math.log1p(math.exp(-8.0))
    assert density * scene.step_size < NERFACC_RULE["min_alpha"]
    scene.occupancy.values.fill_(density * scene.step_size * 0.99)
    assert (scene.volume(make_cameras([0.0]), plain_look(1)).opacity > 0).any()
    scene.occupancy.values.fill_(1.0)
    assert not scene.volume(make_cameras([0.0]), plain_look(1)).opacity.any()


@pytest.mark.parametrize("normals", [False, True])
def test_tiles_learn_the_same_and_hold_less(backend: str, normals: bool) -> None:
    """Hidden layers are computed again on the way back, a tile at a time."""
    gradients, held, images = [], [], []
    for tile in (0, 700):
        config = dataclasses.replace(SMALL, tile_samples=tile, density_noise=0.5)
        scene = make_scene(backend, config, losses=ALL_LOSSES)
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            draws = torch.Generator().manual_seed(1)
            render = scene.volume(make_cameras([0.0, 120.0], 24), plain_look(2), draws, normals=normals)
        assert render.volume is not None
        assert len(render.volume.weights) > 3 * 700
        images.append(render.rgb.detach())
        (render.rgb.square().sum() + (render.normal.sum() if render.normal is not None else 0)).backward()
        gradients.append([p.grad for p in scene.parameters() if p.grad is not None])
        held.append(sum(sizes.values()))
    torch.testing.assert_close(images[0], images[1])
    assert len(gradients[0]) == len(gradients[1]) > 2
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
    assert held[1] < 0.7 * held[0]
