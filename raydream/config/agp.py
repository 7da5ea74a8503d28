"""Settings of the aligned geometric prior's fine-tuning. Importable without torch; strict JSON by ``strict_json``."""

from dataclasses import dataclass, field
from typing import Literal

from raydream.config.checks import require, require_positive, require_share
from raydream.config.train import StageSettings


@dataclass(frozen=True)
class AgpModelConfig:
    """What of the prior is trained: every weight with ``rank`` 0, else updates of that rank (LoRA) on all its linear
    and convolution layers, with the first and last convolution, the biases and the norms in full. All weights take less
    time a step on a CPU, updates less memory and disk: with ``export_rank`` above 0 all weights are trained and the
    finished model is written as the nearest updates of that rank. ``gradient_checkpointing`` trades a third more
    arithmetic for most of the activations' memory.
    """

    rank: int = 64
    export_rank: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.rank <= 1024, "rank", f"must be 0 (all weights) to 1024, got {self.rank}")
        require(0 <= self.export_rank <= 1024, "export_rank", f"must be 0 (as trained) to 1024, got {self.export_rank}")
        require(not (self.rank and self.export_rank), "export_rank", "needs rank 0: updates are written as they are")


@dataclass(frozen=True)
class AgpDataConfig:
    """Which objects, and what is said of them.

    ``nouns`` names the objects, empty takes all. A caption is the object's first ("original") with
    ``original_probability``, else one of the others (a captioner's, in SweetDreamer's recipe) or, with
    ``noun_probability`` of the rest, its noun and perhaps any colour. View words are added with
    ``view_word_probability`` where the front is known. ``text_dropout`` and ``camera_dropout`` are per view.
    """

    nouns: tuple[str, ...] = ()
    known_fronts_only: bool = False
    original_probability: float = 0.4
    noun_probability: float = 0.6
    view_word_probability: float = 0.3
    text_dropout: float = 0.1
    camera_dropout: float = 0.1

    def __post_init__(self) -> None:
        require_share(self, "original_probability", "noun_probability", "view_word_probability")
        require_share(self, "text_dropout", "camera_dropout")


@dataclass(frozen=True)
class AgpGridConfig:
    """The pictures that are drawn while it trains: a row for each prompt, a column for each azimuth.

    Empty ``prompts`` takes the most frequent nouns. Distance and field of view are the middle of the training cameras'.
    """

    prompts: tuple[str, ...] = ()
    azimuths_deg: tuple[float, ...] = (0.0, 45.0, 90.0, 180.0, 270.0)
    elevation_deg: float = 15.0
    cfg_scale: float = 4.0
    sample_steps: int = 20

    def __post_init__(self) -> None:
        require(bool(self.azimuths_deg), "azimuths_deg", "must name at least one camera")
        require_positive(self, "sample_steps")


@dataclass(frozen=True)
class AgpConfig:
    """One fine-tuning. ``stage.batch_size`` is that of one worker; checkpoints are ``save_every_steps`` apart.

    It begins as the prior, or as the AGP in folder ``start``, which was made from ``start_prior``: after a prior has
    learned more, its AGP need not begin anew.
    """

    seed: int = 0
    start: str = ""
    start_prior: str = ""
    model: AgpModelConfig = field(default_factory=AgpModelConfig)
    data: AgpDataConfig = field(default_factory=AgpDataConfig)
    stage: StageSettings = field(default_factory=lambda: StageSettings(num_steps=20_000, batch_size=32, lr=2e-4))
    grid: AgpGridConfig = field(default_factory=AgpGridConfig)
    bfloat16: Literal["auto", "on", "off"] = "auto"
    save_every_steps: int = 500
    sample_every_steps: int = 2000
    log_every_steps: int = 20
    keep_checkpoints: int = 2
    num_threads: int = 1

    def __post_init__(self) -> None:
        require(bool(self.start) == bool(self.start_prior), "start_prior", "must be given with start, and only then")
        require_positive(self, "save_every_steps", "sample_every_steps", "log_every_steps", "num_threads")
        require(self.keep_checkpoints >= 2, "keep_checkpoints", f"must be at least 2, got {self.keep_checkpoints}")
