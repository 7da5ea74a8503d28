"""A problem small enough to know the answer: free latents of four numbers, a posed Gaussian mixture, a small MLP.

Whatever a camera looks at stands elsewhere for every camera (``camera_offset``), so a score model that mixes up its
cameras cannot be right. A "particle" here is a handful of free latents, one for each of its views; the driver takes the
place of ``Particle`` and of the loop, and everything between them is the real ``Score``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from raydream.camera import orbit_cameras
from raydream.config.actors import ScoreConfig
from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.names import MethodName
from raydream.config.prior import PriorConfig
from raydream.diffusion.analytic import MixtureDenoiser
from raydream.diffusion.guidance import PredictionType, alphas_cumprod, eps_from_v
from raydream.diffusion.text import PerpNegTexts
from raydream.distill.branches import Branch
from raydream.distill.messages import Message, pack_views
from raydream.distill.score import Score
from raydream.priors.exhibit import EXHIBIT_SCHEDULE
from raydream.schedule import Constant
from raydream.types import Cameras, Condition, Views

CPU = torch.device("cpu")
ABAR = alphas_cumprod(EXHIBIT_SCHEDULE).float()
NUM_PARTICLES, VIEWS, NUM_STEPS = 4, 64, 300
CENTERS = torch.tensor([[1.5, 0.0, 0.0, 0.0], [-1.5, 0.0, 0.0, 1.5], [0.0, 0.0, -1.5, -1.5]])
SHARES = (0.5, 0.3, 0.2)
MODE_STD = 0.5


def camera_offset(c2w: Float[Tensor, "view 4 4"]) -> Float[Tensor, "view 4"]:
    """Where a camera sees the world's origin: its own position, and 0."""
    return torch.cat([c2w[:, :3, 3], torch.zeros_like(c2w[:, :1, 3])], dim=1)


def eps_by_autograd(
    z_t: Float[Tensor, "*latent"],
    abar: float,
    means: Float[Tensor, " mode *latent"],
    probabilities: Sequence[float],
    std: float,
) -> Float64[Tensor, "*latent"]:
    """The exact noise of one view from nothing but the mixture's log-density: -sigma times its gradient."""
    z = z_t.double().requires_grad_()
    squared = (z - math.sqrt(abar) * means.double()).square().flatten(1).sum(1)
    log_each = torch.tensor(probabilities, dtype=torch.float64).log() - squared / (2 * (abar * std**2 + 1 - abar))
    (slope,) = torch.autograd.grad(torch.logsumexp(log_each, 0), z)
    return -math.sqrt(1 - abar) * slope


class ToyModes:
    """The mixture's means: ``centers`` moved by each camera's offset."""

    def __init__(self, centers: Float[Tensor, "mode 4"]) -> None:
        self.centers = centers

    def means(
        self,
        c2w: Float[Tensor, "view 4 4"],
        fov_y_deg: Float[Tensor, " view"],
        used: Int[Tensor, " used"],
        size_px: int,
    ) -> Float[Tensor, "view used 4 1 1"]:
        assert size_px == 1
        return (self.centers[used] + camera_offset(c2w)[:, None])[..., None, None]


class ToyTexts:
    """Two prompts: how probable each mode is under the positive and under the negative one."""

    def __init__(self, positive: Sequence[float], negative: Sequence[float]) -> None:
        self._positive, self._negative = torch.tensor([positive]), torch.tensor([negative])

    def prompt_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        return self._positive.expand(num_views, -1, -1)

    def negative_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        return self._negative.expand(num_views, -1, -1)

    def view_embeddings(
        self, azimuth_deg: Float[Tensor, " view"], elevation_deg: Float[Tensor, " view"]
    ) -> Float[Tensor, "view token width"]:
        return self.prompt_embeddings(len(azimuth_deg))

    def perp_neg_texts(
        self, azimuth_deg: Float[Tensor, " view"], elevation_deg: Float[Tensor, " view"]
    ) -> PerpNegTexts:
        raise AssertionError("the toy has no view words")


class MlpLearner(nn.Module):
    """A v-prediction MLP of the noisy latent, the noise level and the camera's position.

    It answers 0 at first, which is the score of N(0, 1) data.
    """

    prediction_type: PredictionType = "v_prediction"
    dtype = torch.float32

    def __init__(self, seed: int, width: int = 96) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(13, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 4)
            )
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def eps(self, z_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return eps_from_v(self.predict(z_t, t, cond), z_t, ABAR[t])

    def predict(self, z_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        abar = ABAR[t][:, None]
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        position = cond.c2w[:, :3, 3] * cond.camera_weight[:, None]
        log_snr = ((abar + 1e-4) / (1 - abar)).log() / 4
        features = torch.cat([z_t.flatten(1), signal, sigma, log_snr, signal * position, sigma * position], dim=1)
        return self.network(features)[:, :, None, None]

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def toy_score(
    method: MethodName,
    seed: int = 0,
    scale: float = 1.0,
    positive: Sequence[float] = SHARES,
    negative: Sequence[float] = SHARES,
) -> Score:
    """The real score model over the toy's prior."""
    branch = BranchConfig(method=method, scale=scale, t_max=Constant(0.98))
    learner = LearnerConfig(lr=2e-2, lr_warm_up_steps=1, weight_decay=0.0, camera_dropout=0.0, timesteps_per_view=4)
    config = ScoreConfig(
        0, NUM_PARTICLES, seed, "a toy", "", (branch,), learner, 0, PriorConfig(), "reference", "float32"
    )
    prior = MixtureDenoiser(ToyModes(CENTERS), ABAR, MODE_STD)
    return Score(
        config,
        CPU,
        [Branch(branch, prior, ToyTexts(positive, negative), ABAR)],
        MlpLearner(seed) if branch.learns else None,
    )


def toy_cameras(num_views: int, generator: torch.Generator) -> Cameras:
    """Cameras at distance 1, anywhere around."""
    azimuth = 360 * torch.rand(num_views, generator=generator) - 180
    elevation = 120 * torch.rand(num_views, generator=generator) - 60
    return orbit_cameras(azimuth, elevation, torch.ones(num_views), torch.full((num_views,), 45.0), 1, 1)


def toy_messages(positions: Float[Tensor, "particle view 4"], cameras: Cameras, step: int) -> list[Message]:
    """What the particles say at a step: each free latent as its own camera sees it."""
    latents = positions.flatten(0, 1) + camera_offset(cameras.c2w)
    fields = (latents[:, :, None, None], cameras.c2w, cameras.fov_y_deg, cameras.azimuth_deg, cameras.elevation_deg)
    parts = zip(*(field.split(positions.shape[1]) for field in fields))
    return [pack_views({"rgb": Views(*part)}, step, "float32") for part in parts]


def distil(score: Score, seed: int = 0, num_steps: int = NUM_STEPS) -> Float[Tensor, "latent 4"]:
    """Where N(0, 1) latents end up: guide, move, fit, in the loop's own order, at a falling learning rate.

    Each latent keeps its camera: with new ones at every step the error of a mixed-up camera would average out.
    """
    draws = torch.Generator().manual_seed(seed)
    positions = torch.randn(NUM_PARTICLES, VIEWS, 4, generator=draws)
    cameras = toy_cameras(NUM_PARTICLES * VIEWS, draws)
    everyone = range(NUM_PARTICLES)
    for step in range(num_steps):
        messages = toy_messages(positions, cameras, step)
        *gradients, _ = score.guide(step, "rgb", everyone, *messages)
        rate = 0.5 * (1 - step / num_steps)
        positions = positions - rate * torch.stack([torch.from_numpy(gradient) for gradient in gradients])[..., 0, 0]
        score.fit(step, everyone, *messages)
    return positions.flatten(0, 1)


@dataclass(frozen=True)
class Clusters:
    """Latents by the centre that is nearest: their share, their spread, and how far from the centre their mean is."""

    shares: list[float]
    std: list[float]
    offset: list[float]

    @classmethod
    def of(cls, latents: Float[Tensor, "latent 4"], centers: Float[Tensor, "mode 4"] = CENTERS) -> "Clusters":
        nearest = torch.cdist(latents, centers).argmin(1)
        groups = [latents[nearest == mode] for mode in range(len(centers))]
        return cls(
            [len(group) / len(latents) for group in groups],
            [float((group - group.mean(0)).square().mean().sqrt()) for group in groups],
            [float((group.mean(0) - center).norm()) for group, center in zip(groups, centers)],
        )

    def agree(self, shares: Sequence[float]) -> bool:
        """Whether these are draws of the mixture, as far as an MLP that learns on the way can bring them.

        An empty cluster has no mean (nan) and fails.
        """
        return (
            all(abs(found - wanted) < 0.08 for found, wanted in zip(self.shares, shares))
            and all(0.4 < std < 0.6 for std in self.std)
            and all(offset < 0.25 for offset in self.offset)
        )
