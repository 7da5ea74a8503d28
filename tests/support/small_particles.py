"""One particle driven by hand: latents of its whole picture, two views, gradients drawn by the step."""

import numpy as np
import torch
from jaxtyping import Float
from small_runs import small_config
from torch import Tensor

from raydream.config.actors import ParticleConfig, particle_config
from raydream.diffusion.latent import resize
from raydream.distill.messages import Message
from raydream.distill.particle import Particle, make_particle
from raydream.types import Render

VIEWS = 2
SETTINGS = (f"stages.0.camera.views_per_particle={VIEWS}", "stages.0.scene.bfloat16=off", "cluster.kernels=reference")


class ColorCodec:
    """Latents that see the background, as a VAE's do: the whole picture and the opacity."""

    def encode(self, render: Render, generator: torch.Generator) -> Float[Tensor, "view 4 h w"]:
        return resize(torch.cat([render.rgb, render.opacity], dim=-1).permute(0, 3, 1, 2), 16)

    def decode(self, latents: Float[Tensor, "view 4 h w"]) -> Float[Tensor, "view h w 3"]:
        raise NotImplementedError


class WhiteCodec:
    """Sees white, whatever is there."""

    def encode(self, render: Render, generator: torch.Generator) -> Float[Tensor, "view 4 h w"]:
        return ColorCodec().encode(render, generator)

    def decode(self, latents: Float[Tensor, "view 4 h w"]) -> Float[Tensor, "view h w 3"]:
        return torch.ones(len(latents), 16, 16, 3)


def make_config(*overrides: str, index: int = 0) -> ParticleConfig:
    run = small_config(*SETTINGS, *overrides, steps=1000)
    return particle_config(run, 0, index)


def new_particle(*overrides: str, index: int = 0) -> Particle:
    return make_particle(make_config(*overrides, index=index))


def some_gradient(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((VIEWS, 4, 16, 16)).astype(np.float32)


def advance(particle: Particle, steps: range) -> None:
    for step in steps:
        particle.render(step)
        assert particle.apply(step, some_gradient(step))


def assert_same(first: Message, second: Message) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert np.array_equal(first[name], second[name]), name
