"""Settings of what pulls on a particle's renders: branches, and the reference that is learned beside them."""

from dataclasses import dataclass, field
from typing import Literal

from raydream.config.checks import require, require_not_negative, require_positive, require_share
from raydream.config.names import LEARNING_METHODS, MethodName, RenderKind
from raydream.schedule import Constant, Schedule, Steps, highest, lowest


@dataclass(frozen=True)
class GeometricPriorConfig:
    """The aligned geometric prior (SweetDreamer) behind a branch on canonical coordinate maps.

    ``source`` is "embedded" or a folder that ``jobs/finetune_agp.py`` wrote; ``prior`` the folder it was made from,
    empty for the run's own prior (an exhibit's run: the embedded one). With ``denoise_steps`` above 1 it is followed by
    DDIM from a noisy map to a whole one, which pulls (after HiFA); 1 is SDS. Particles but the first read the prompt
    with noise of ``text_noise`` times its embedding's deviation and so differ in shape (after CADS, 2310.17347); not on
    the token that every prompt starts with, which only keeps maps clean. The box is measured each ``box_every``.
    """

    source: str = "embedded"
    prior: str = ""
    denoise_steps: Schedule = Constant(1.0)
    text_noise: float = 0.0
    box_every: int = 50

    def __post_init__(self) -> None:
        require(bool(self.source), "source", "must be embedded or a folder; a run without it has no ccm branch")
        require_not_negative(self, "text_noise")
        require_positive(self, "box_every")
        require(lowest(self.denoise_steps) >= 1, "denoise_steps", "must be at least 1 everywhere")


@dataclass(frozen=True)
class BranchConfig:
    """One source of gradient on one kind of render: "rgb" and "normal" by the run's prior, "ccm" by an aligned
    geometric prior. Normals are of meshes: a picture of them, on black; in the first ``latent_steps`` they and the
    opacity are the latent itself, turned at random in each step (Fantasia3D).

    ``weight`` multiplies the branch's gradient. ``scale`` is classifier-free guidance in diffusers' convention, ``eps =
    negative + scale * (positive - negative)``, so 1 means no guidance. ``t_min`` and ``t_max`` are fractions of 1000: t
    is drawn uniformly between them. ``gradient_clip`` is a bound on each element of the gradient, 0 for none. What
    concerns view words is for "rgb", ``geometric_prior`` for "ccm".
    """

    render: RenderKind = "rgb"
    method: MethodName = "vsd"
    weight: Schedule = Constant(1.0)
    scale: float = 7.5
    weighting: Literal["one_minus_abar", "uniform", "sqrt_abar_one_minus_abar", "fantasia3d"] = "one_minus_abar"
    t_min: Schedule = Constant(0.02)
    t_max: Schedule = Steps(((0, 0.98), (5000, 0.5)))
    shared_t: bool = False
    view_dependent_prompts: bool = True
    front_deg: float = 45.0
    back_deg: float = 45.0
    overhead_deg: float = 60.0
    perp_neg: bool = False
    gradient_clip: Schedule = Constant(0.0)
    latent_steps: int = 0
    geometric_prior: GeometricPriorConfig = field(default_factory=GeometricPriorConfig)

    def __post_init__(self) -> None:
        require_not_negative(self, "scale", "latent_steps")
        require(self.render == "normal" or not self.latent_steps, "latent_steps", f"must be 0 on {self.render}")
        for name, schedule in (("t_min", self.t_min), ("t_max", self.t_max)):
            ok = lowest(schedule) >= 0 and highest(schedule) <= 1
            require(ok, name, f"must lie in [0, 1] everywhere, got {lowest(schedule):g} to {highest(schedule):g}")
        require(lowest(self.gradient_clip) >= 0, "gradient_clip", "must not be negative anywhere; 0 is none")
        learns = self.method in LEARNING_METHODS
        remedy = f"must not be {self.method} on {self.render}, whose prior has no learned reference; sds is usual"
        require(self.render == "rgb" or not learns, "method", remedy)
        whole = self.method == "sds" or highest(self.geometric_prior.denoise_steps) == 1
        require(whole, "geometric_prior.denoise_steps", f"must be 1 with {self.method}; more are for sds")

    @property
    def learns(self) -> bool:
        """Whether the reference is a model that learns from the renders."""
        return self.method in LEARNING_METHODS


def geometric_branch(source: str) -> BranchConfig:
    """SweetDreamer's branch, with the settings that suit most runs."""
    settings = GeometricPriorConfig(source)
    return BranchConfig("ccm", "sds", t_max=Constant(0.98), view_dependent_prompts=False, geometric_prior=settings)


@dataclass(frozen=True)
class LearnerConfig:
    """The learned reference of VSD: a LoRA of the prior, or a small UNet beside an exhibit's exact score.

    ``prior`` is another prior for the LoRA to stand on, an alias or a folder; empty for the one that guides.
    ``warm_up_fits`` are extra fits on the first step's views before any particle moves. ``bfloat16`` is for the small
    UNet's arithmetic; "auto" takes it where the processor is fast at it.
    """

    prior: str = ""
    rank: int = 4
    lr: float = 1e-4
    lr_warm_up_steps: int = 500
    weight_decay: float = 1e-2
    camera_dropout: float = 0.1
    fits_per_step: int = 1
    timesteps_per_view: int = 1
    warm_up_fits: int = 0
    unet_channels: tuple[int, ...] = (64, 96)
    bfloat16: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "rank", "fits_per_step", "timesteps_per_view", "lr")
        require_not_negative(self, "lr_warm_up_steps", "weight_decay", "warm_up_fits")
        require_share(self, "camera_dropout")
        channels = self.unet_channels
        ok = bool(channels) and all(width > 0 and width % 16 == 0 for width in channels)
        require(ok, "unet_channels", f"must be multiples of 16, one for each level, got {list(channels)}")
