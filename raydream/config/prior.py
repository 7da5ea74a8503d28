"""Settings of the frozen text-to-image model."""

from dataclasses import dataclass, field
from typing import Literal

from raydream.config.checks import require, require_positive
from raydream.config.names import PriorKindName

EXHIBIT_IMAGE_PX = 64
SMALL_UNET_PATCH_PX = 4  # of an exhibit's learned reference, where the picture's size is a multiple of 16


@dataclass(frozen=True)
class ExhibitConfig:
    """The mixture behind an exact score: which assets are its modes.

    ``assets`` is a folder with a manifest; empty means ``$RAYDREAM_ASSETS`` or, where that is not set, assets that the
    project makes itself. Each is drawn at ``supersample`` times the size and made smaller.
    """

    assets: str = ""
    num_modes: int = 12
    supersample: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "num_modes")
        require(1 <= self.supersample <= 16, "supersample", f"must be 1..16, got {self.supersample}")


@dataclass(frozen=True)
class PriorConfig:
    """The frozen text-to-image model: ``kind`` "diffusers" (``source`` is an alias or a folder) or "exhibit".

    ``image_px`` is the size of a render when it becomes a latent, 0 for the prior's own. ``sample_posterior`` draws the
    latent from the VAE's posterior, not its mean. ``dtype`` "auto" is bfloat16 or else float16 where a GPU is fast at
    it, for UNets also bfloat16 where a CPU is, else float32.
    """

    kind: PriorKindName = "exhibit"
    source: str = ""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    image_px: int = 0
    sample_posterior: bool = False
    allow_download: bool = False
    exhibit: ExhibitConfig = field(default_factory=ExhibitConfig)

    def __post_init__(self) -> None:
        require(self.image_px >= 0, "image_px", f"must be 0 (the prior's own) or a size, got {self.image_px}")

    @property
    def exhibit_px(self) -> int:
        """The size of an exhibit's pictures."""
        return self.image_px or EXHIBIT_IMAGE_PX

    @property
    def mixture(self) -> ExhibitConfig | None:
        """What an exact score is made of; None for any other kind."""
        return self.exhibit if self.kind == "exhibit" else None

    @property
    def lacks_source(self) -> bool:
        """Whether a folder or a name still has to be given."""
        return self.kind == "diffusers" and not self.source
