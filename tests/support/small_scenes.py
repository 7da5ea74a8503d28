"""Scenes small enough for float64 and finite differences, and cameras to look at them."""

import dataclasses

import torch

from raydream.backend import load_backend
from raydream.camera import orbit_cameras
from raydream.config.scene import HashGridConfig, LossConfig, NerfConfig, ShadingConfig
from raydream.distill.particle import Particle
from raydream.scene.nerf import NerfScene
from raydream.types import Cameras

CPU = torch.device("cpu")
GRID = HashGridConfig(num_levels=3, log2_table_size=9, base_resolution=4, max_resolution=16)
SMALL = NerfConfig(grid=GRID, hidden_width=16, samples_per_diagonal=48, occupancy_resolution=8, bfloat16="off")
SCENE_MODE = dataclasses.replace(SMALL, initial_density_lambda=-10.0, initial_density_radius=2.5)
NO_LOSSES = LossConfig()
SHADING = ShadingConfig()


def make_scene(
    backend: str, config: NerfConfig = SMALL, full: bool = True, losses: LossConfig = NO_LOSSES
) -> NerfScene:
    """A scene in float64 with a field that is far from its plain start; ``full``: no cell is skipped."""
    generator = torch.Generator().manual_seed(3)
    scene = NerfScene(config, SHADING, losses, load_backend(backend, "cpu"), CPU, lambda *_: generator).double()
    with torch.no_grad():
        scene.field.table.copy_(torch.randn(scene.field.table.shape, generator=generator, dtype=torch.float64) * 0.5)
    scene.occupancy.values.fill_(float(full))
    return scene


def make_constant(scene: NerfScene, raw: tuple[float, float, float, float]) -> None:
    """One raw output (density and three colours, before their activations) everywhere."""
    with torch.no_grad():
        scene.field.table.fill_(1.0)
        scene.field.hidden.fill_(1 / scene.field.layout.num_features)
        scene.field.head.copy_(torch.tensor(raw)[:, None].expand(4, SMALL.hidden_width) / SMALL.hidden_width)


def make_cameras(azimuth_deg: list[float], image_px: int = 12) -> Cameras:
    view = len(azimuth_deg)
    elevation, distance, fov = (torch.full((view,), number, dtype=torch.float64) for number in (20.0, 3.0, 45.0))
    return orbit_cameras(torch.tensor(azimuth_deg, dtype=torch.float64), elevation, distance, fov, image_px, image_px)


def nerf_of(particle: Particle) -> NerfScene:
    """A particle's scene, where that is a NeRF."""
    assert isinstance(particle.scene, NerfScene)
    return particle.scene
