"""Kinds of scenes, and the one place that chooses among them."""

import torch

from raydream.config.run import StageConfig
from raydream.scene.nerf import NerfScene
from raydream.scene.protocol import Draws, Scene
from raydream.types import Backend


def make_scene(stage: StageConfig, backend: Backend, device: torch.device, draws: Draws) -> Scene:
    """The scene of a stage at its beginning."""
    scene = NerfScene(stage.scene, stage.shading, stage.losses, backend, device, draws)
    scene.after_step(0)
    return scene
