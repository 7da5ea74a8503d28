"""What a run asks of its frozen text-to-image model; see ``exhibit.py`` for the simplest that answers."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.run import RunConfig
from raydream.diffusion.latent import LatentCodec
from raydream.diffusion.layout import PredictionType
from raydream.diffusion.text import PerpNegTexts
from raydream.types import Condition, Denoiser, Latents, PerView


@runtime_checkable
class LearnedReference(Protocol):
    """A denoiser that learns what the particles look like now; ``predict`` is in its own parametrisation."""

    @property
    def prediction_type(self) -> PredictionType: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its arithmetic: gradients that pass through float16 need a scaled loss."""
        ...

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents: ...

    def predict(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents: ...

    def trainable(self) -> dict[str, torch.nn.Parameter]: ...


@runtime_checkable
class Texts(Protocol):
    """What the score model tells its denoisers; see ``TextBank``."""

    def prompt_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]: ...

    def negative_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]: ...

    def view_embeddings(self, azimuth_deg: PerView, elevation_deg: PerView) -> Float[Tensor, "view token width"]: ...

    def perp_neg_texts(self, azimuth_deg: PerView, elevation_deg: PerView) -> PerpNegTexts: ...


@runtime_checkable
class PriorKind(Protocol):
    """A frozen text-to-image model that a run can be guided by; see ``exhibit.py`` for the simplest."""

    def check(self, run: RunConfig) -> RunConfig:
        """The run with everything named outright that every machine and every resume must mean alike. ``ValueError``
        naming the field for what this kind cannot do or find, before anything heavy loads.
        """
        ...

    def nouns(self) -> list[str] | None:
        """The objects that it knows; None where its vocabulary is open."""
        ...

    def codec(self, device: torch.device) -> LatentCodec:
        """How renders become what its denoiser works on."""
        ...

    def denoiser(self, prompt: str, backend: str, device: torch.device) -> tuple[Denoiser, Float[Tensor, " t"]]:
        """The frozen model, of the caller's own, and ``abar`` of all its timesteps."""
        ...

    def texts(
        self, prompt: str, negative_prompt: str, branch: BranchConfig, backend: str, device: torch.device
    ) -> Texts:
        """What the denoiser is told in a branch."""
        ...

    def learner(self, denoiser: Denoiser, config: LearnerConfig, init: torch.Generator) -> LearnedReference:
        """A reference beside the denoiser that learns from renders; the same ``init`` starts it the same anywhere."""
        ...
