"""A scene of your own: a flat picture in the place of a NeRF, as in ProlificDreamer's 2D experiments.

python examples/custom_scene.py --out pictures.png                      SDS above, VSD below; about a minute and a half
python examples/custom_scene.py --prompt "a blue car" --steps 400

By SDS all pictures go to the same blurred mode; by VSD, which knows where they are already, they differ and are
sharper. The loop in ``distil`` is the whole algorithm, which ``distill/loop.py`` runs on a cluster. A scene that runs
are to have by name belongs into ``scene/kinds.py``: see docs/extending.md.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from raydream.config.actors import particle_config, score_config
from raydream.config.cluster import OutputConfig
from raydream.config.names import MethodName
from raydream.config.presets import make_preset
from raydream.config.run import RunConfig
from raydream.coordinates import Box
from raydream.distill.particle import Particle
from raydream.distill.score import make_score
from raydream.priors.kinds import prior_kind
from raydream.scene.isosurface import EmptyMeshError
from raydream.schedule import Constant
from raydream.seeds import generator
from raydream.types import Cameras, Latents, Mesh, Render

SIZE_PX, LEARNING_RATE = 16, 0.03  # of the embedded prior's latents


class PictureScene(nn.Module):
    """The same picture from everywhere, kept as a latent: three channels travel as colour, the fourth as opacity."""

    def __init__(self, init: torch.Generator) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, SIZE_PX, SIZE_PX, 4, generator=init))

    def render(self, cameras: Cameras, step: int, ccm_box: Box | None = None) -> Render:
        picture = self.latent.expand(cameras.num_views, -1, -1, -1)
        color, opacity = picture[..., :3], picture[..., 3:]
        return Render(color, color, opacity, torch.zeros_like(opacity))

    def preview(self, cameras: Cameras) -> Render:
        return self.render(cameras, 0)

    def regularizers(self, render: Render, step: int) -> dict[str, Float[Tensor, ""]]:
        return {}

    def param_groups(self) -> list[dict[str, object]]:
        return [{"params": [self.latent], "lr": LEARNING_RATE}]

    def after_step(self, step: int) -> None:
        """Nothing but the picture has to be kept up."""

    def state(self) -> dict[str, Tensor]:
        return self.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict(state)

    def surface(self, output: OutputConfig) -> Mesh:
        raise EmptyMeshError(0.0, None)

    def box(self) -> Box | None:
        return None


class LatentCodec:
    """The picture is a latent already: no VAE between it and the prior."""

    def encode(self, render: Render, generator: torch.Generator) -> Latents:
        return torch.cat([render.foreground, render.opacity], dim=-1).permute(0, 3, 1, 2)

    def decode(self, latents: Latents) -> Float[Tensor, "view h w 3"]:
        raise ValueError("ask the prior's own codec for pixels")


def picture_run(prompt: str, method: MethodName, num_pictures: int, steps: int) -> RunConfig:
    """The embedded preset for one view a step, without geometry, words of sides and what concerns pixels."""
    run = make_preset("embedded", steps)
    stage = run.stages[0].with_method(method).with_geometric_prior("off")
    (branch,) = stage.branches
    stage = dataclasses.replace(
        stage,
        lr_scale=Constant(1.0),
        branches=(dataclasses.replace(branch, view_dependent_prompts=False),),
        losses=dataclasses.replace(stage.losses, round_trip=Constant(0.0)),
        camera=dataclasses.replace(stage.camera, views_per_particle=1),
        learner=dataclasses.replace(stage.learner, camera_dropout=1.0),
    )
    return dataclasses.replace(run, prompt=prompt, n=num_pictures, stages=(stage,))


def distil(run: RunConfig) -> Float[Tensor, "view h w 3"]:
    """All pictures at the end of a run, one for each particle."""
    device, everyone = torch.device("cpu"), list(range(run.n))
    score = make_score(score_config(run, 0, 0))
    particles = [
        Particle(
            particle_config(run, 0, i), device, PictureScene(generator(run.seed, "scene", i, 0)), codec=LatentCodec()
        )
        for i in everyone
    ]
    for step in range(run.num_steps):
        views = [particle.render(step) for particle in particles]
        *gradients, _ = score.guide(step, "rgb", everyone, *views)
        for particle, gradient in zip(particles, gradients):
            assert isinstance(gradient, np.ndarray)
            particle.apply(step, gradient)
        score.fit(step, everyone, *views)  # learns nothing by SDS
    pixels = prior_kind(run.prior).codec(device)
    latents = [particle.scene.state()["latent"].detach().permute(0, 3, 1, 2) for particle in particles]
    return pixels.decode(torch.cat(latents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a red chair")
    parser.add_argument("--n", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="pictures.png")
    args = parser.parse_args()
    if not Path(args.out).resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {Path(args.out).resolve().parent}")
    methods: tuple[MethodName, ...] = ("sds", "vsd")
    rows = [torch.cat([*distil(picture_run(args.prompt, method, args.n, args.steps))], dim=1) for method in methods]
    sheet = (torch.cat(rows) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(sheet).save(args.out)
    for method, row in zip(methods, rows):
        pictures = torch.stack(row.chunk(args.n, dim=1))
        apart = (pictures - pictures.mean(0)).square().mean().sqrt()
        print(f"{method}: pictures differ from their mean by {apart:.3f}")


if __name__ == "__main__":
    main()
