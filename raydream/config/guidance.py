"""Settings of what pulls on particles: the frozen prior, the aligned geometric prior, the learned reference."""

from dataclasses import dataclass
from typing import Literal

from raydream.config.checks import require
from raydream.schedule import Constant, Schedule, Steps, highest, lowest


@dataclass(frozen=True)
class GuidanceConfig:
    """How the frozen prior turns into a gradient.

    ``scale`` is classifier-free guidance in diffusers' convention, ``eps = negative + scale * (positive -
    negative)``, so 1 means no guidance. ``t_min`` and ``t_max`` are fractions of 1000: t is drawn uniformly between
    them. ``gradient_clip`` is a bound on each element of the gradient, 0 for none.
    """

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

    def __post_init__(self) -> None:
        require(self.scale >= 0, "scale", f"must not be negative, got {self.scale}")
        _require_times(self.t_min, self.t_max)
        require(lowest(self.gradient_clip) >= 0, "gradient_clip", "must not be negative anywhere; 0 is none")


@dataclass(frozen=True)
class GeometryConfig:
    """The pull of an aligned geometric prior on each particle's canonical coordinate map (SweetDreamer).

    ``agp`` is "off", "embedded" or a folder that ``jobs/finetune_agp.py`` wrote; ``prior`` the folder it was made from,
    empty for the run's own prior (an exhibit's run: the embedded one). ``ori_weight`` and ``align_weight`` weigh the
    gradients of picture and map. With ``denoise_steps`` above 1 the AGP is followed by DDIM from a noisy map to a whole
    one, which pulls (after HiFA); 1 is SDS. Particles but the first hear the prompt with noise of ``text_noise`` times
    its embedding's deviation and so differ in shape (after CADS, 2310.17347); not on the token that every prompt starts
    with, which only keeps maps clean. The box is measured each ``box_every``.
    """

    agp: str = "off"
    prior: str = ""
    ori_weight: Schedule = Constant(1.0)
    align_weight: Schedule = Constant(1.0)
    scale: float = 7.5
    t_min: Schedule = Constant(0.02)
    t_max: Schedule = Constant(0.98)
    denoise_steps: Schedule = Constant(1.0)
    text_noise: float = 0.0
    box_every: int = 50

    def __post_init__(self) -> None:
        require(bool(self.agp), "agp", "must be off, embedded or a folder")
        _require_times(self.t_min, self.t_max)
        require(self.text_noise >= 0, "text_noise", f"must not be negative, got {self.text_noise}")
        require(lowest(self.denoise_steps) >= 1, "denoise_steps", "must be at least 1 everywhere")
        require(self.box_every >= 1, "box_every", f"must be positive, got {self.box_every}")


@dataclass(frozen=True)
class LearnerConfig:
    """The learned reference of VSD: a LoRA of the prior, or a small UNet beside an exhibit's exact score.

    ``warm_up_fits`` are extra fits on the first step's views before any particle moves. ``bfloat16`` is for the small
    UNet's arithmetic; "auto" takes it where the processor is fast at it.
    """

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
        for name in ("rank", "fits_per_step", "timesteps_per_view"):
            require(getattr(self, name) >= 1, name, f"must be positive, got {getattr(self, name)}")
        require(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        for name in ("lr_warm_up_steps", "weight_decay", "warm_up_fits"):
            require(getattr(self, name) >= 0, name, f"must not be negative, got {getattr(self, name)}")
        channels = self.unet_channels
        ok = bool(channels) and all(width > 0 and width % 16 == 0 for width in channels)
        require(ok, "unet_channels", f"must be multiples of 16, one for each level, got {list(channels)}")
        require(0 <= self.camera_dropout <= 1, "camera_dropout", f"must lie in [0, 1], got {self.camera_dropout}")


def _require_times(t_min: Schedule, t_max: Schedule) -> None:
    for name, schedule in (("t_min", t_min), ("t_max", t_max)):
        ok = lowest(schedule) >= 0 and highest(schedule) <= 1
        require(ok, name, f"must lie in [0, 1] everywhere, got {lowest(schedule):g} to {highest(schedule):g}")
