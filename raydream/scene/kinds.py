"""Kinds of scenes, and the one place that chooses among them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from raydream.config.run import StageConfig
from raydream.config.scene import MeshConfig, NerfConfig
from raydream.scene.mesh import MeshScene
from raydream.scene.nerf import NerfScene
from raydream.scene.protocol import Draws, Scene
from raydream.types import Backend


def make_scene(stage: StageConfig, backend: Backend, device: torch.device, draws: Draws) -> Scene:
    """The scene of a stage at its beginning."""
    match stage.scene:
        case NerfConfig():
            scene: Scene = NerfScene(stage.scene, stage.shading, stage.losses, backend, device, draws)
        case MeshConfig():
            scene = MeshScene(stage.scene, stage.shading, stage.losses, backend, device, draws)
    scene.after_step(0)
    return scene


def take_over(scene: Scene, state: Mapping[str, Tensor], before: Callable[[], Scene]) -> None:
    """The scene begins with the state of another, which ``before`` makes anew: one of its kind, or a mesh with a NeRF.
    ``ValueError`` where it is of other sizes.
    """
    if isinstance(scene, MeshScene) and state.keys() != scene.state().keys():
        other = before()
        if not isinstance(other, NerfScene):
            raise ValueError("stages: a mesh can start from a NeRF or a mesh only")
        other.load_state(state)
        scene.start_from_nerf(other)
    else:
        scene.load_state(state)
