"""What is measured of finished particles, and by what means; needs no torch to be checked."""

from dataclasses import dataclass

from raydream.config.checks import require, require_not_negative, require_positive

NUM_VIEWS = 12


@dataclass(frozen=True)
class EvaluateConfig:
    """How particles are looked at and who judges them.

    Every particle is seen from ``NUM_VIEWS`` azimuths at one elevation. ``prior`` (a diffusers folder or alias; empty:
    the run's own) and ``clip`` (a folder in transformers' layout) judge words. ``assets`` is a folder with a manifest,
    empty for the run's or ``$RAYDREAM_ASSETS``, whose objects show what fronts and backs look like. ``captions`` are
    the wrong candidates of R-precision; where there are none they are made from words. ``prompt`` and ``label`` stand
    in for those of a run's configuration. So many ``checked_assets``, real and glued, are put before the judges of
    words too, to see whether they know a front (a prior on a CPU needs about a minute for each).
    """

    prior: str = ""
    clip: str = ""
    assets: str = ""
    captions: tuple[str, ...] = ()
    prompt: str = ""
    label: str = ""
    num_candidates: int = 10
    judged_views: int = 4
    image_px: int = 64
    elevation_deg: float = 15.0
    background: float = 0.75
    timesteps: tuple[int, ...] = (400, 500, 600, 700, 800)
    num_noises: int = 4
    checked_assets: int = 0

    def __post_init__(self) -> None:
        require(self.num_candidates >= 2, "num_candidates", f"must be at least 2, got {self.num_candidates}")
        divides = self.judged_views > 0 and NUM_VIEWS % self.judged_views == 0
        require(divides, "judged_views", f"must divide {NUM_VIEWS}, got {self.judged_views}")
        require(32 <= self.image_px <= 1024, "image_px", f"must lie in 32..1024, got {self.image_px}")
        require(-60 <= self.elevation_deg <= 60, "elevation_deg", f"must lie in -60..60, got {self.elevation_deg}")
        require(0 <= self.background <= 1, "background", f"must lie in 0..1, got {self.background}")
        times = bool(self.timesteps) and all(0 <= t <= 999 for t in self.timesteps)
        require(times, "timesteps", f"must be one or more of 0..999, got {list(self.timesteps)}")
        require_positive(self, "num_noises")
        require_not_negative(self, "checked_assets")
