"""``Score`` over the tiny diffusers prior, and views for it: three particles, whatever is drawn is drawn from seeds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from raydream.camera import orbit_cameras
from raydream.config.actors import ScoreConfig
from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.names import MethodName
from raydream.config.prior import PriorConfig
from raydream.distill.messages import Message, pack_views
from raydream.distill.score import Score, make_score
from raydream.schedule import Constant
from raydream.types import Views

SEED, SCALE, PROMPT, NEGATIVE = 5, 7.5, "a cube", "blurry"
GUIDANCE = BranchConfig(scale=SCALE, t_max=Constant(0.98))
# large steps, so that a few fits make a learned reference that is far from the frozen model
LEARNER = LearnerConfig(lr=1e-2, lr_warm_up_steps=1, camera_dropout=0.3)


def new_score(
    folder: Path,
    method: MethodName = "vsd",
    guidance: BranchConfig = GUIDANCE,
    learner: LearnerConfig = LEARNER,
    dtype: Literal["float32", "float16"] = "float32",
) -> Score:
    """A score model on the folder's prior with one branch."""
    prior, branch = PriorConfig(kind="diffusers", source=str(folder), dtype=dtype), replace(guidance, method=method)
    return make_score(ScoreConfig(0, 3, SEED, PROMPT, NEGATIVE, (branch,), learner, 0, prior, "reference", "float32"))


def views_of(step: int, counts: Sequence[int] = (2, 2, 2), channels: int = 4) -> list[Message]:
    """One message from each particle, with as many views as ``counts`` says; azimuths all around."""
    draws, view = torch.Generator().manual_seed(100 + step), sum(counts)
    azimuth, elevation = torch.linspace(-170, 150, view), torch.linspace(-5, 70, view)
    cameras = orbit_cameras(azimuth, elevation, torch.full((view,), 2.8), torch.full((view,), 45.0), 64, 64)
    latents = torch.randn(view, channels, 16, 16, generator=draws)
    fields = (latents, cameras.c2w, cameras.fov_y_deg, cameras.azimuth_deg, cameras.elevation_deg)
    parts = zip(*(field.split(list(counts)) for field in fields))
    return [pack_views({"rgb": Views(*part)}, step, "float32") for part in parts]


def learn(score: Score, num_steps: int) -> Score:
    """The same score model after so many fits."""
    for step in range(num_steps):
        score.fit(step, range(3), *views_of(step))
    return score
