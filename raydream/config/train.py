"""Settings of the embedded prior's training. Importable without torch; strict JSON and ``--set`` by ``strict_json``."""

from dataclasses import dataclass, field
from typing import Literal

from raydream.config.checks import require, require_not_negative, require_positive, require_range, require_share

# Caption heads that name no shape ("a stack of coins") or several ("a light" is a lamp, a traffic light, a torch).
VAGUE_NOUNS = (
    "group", "stack", "set", "pile", "light", "frame", "block", "container", "roll", "slice", "patch", "pad", "pair",
    "character", "part", "piece", "half", "post", "target", "trap", "box", "dog", "gun", "can", "sign", "plant",
)  # fmt: skip
# An alias is trained as another word for the same object, so that the two are never played against each other.
ALIASES = (
    ("couch", "sofa"),
    ("mug", "cup"),
    ("fridge", "refrigerator"),
    ("burger", "hamburger"),
    ("shotgun", "rifle"),
    ("bookshelf", "bookcase"),
    ("pillar", "column"),
    ("lantern", "lamp"),
    ("carpet", "rug"),
    ("van", "car"),
    ("woman", "man"),
)


def _require_levels(channels: tuple[int, ...], norm_groups: int) -> None:
    require(norm_groups >= 1, "norm_groups", f"must be positive, got {norm_groups}")
    ok = bool(channels) and all(count >= 1 and count % norm_groups == 0 for count in channels)
    require(ok, "channels", f"must be multiples of norm_groups ({norm_groups}), got {list(channels)}")


@dataclass(frozen=True)
class WordsConfig:
    """Which objects are trained and what captions say of them.

    ``nouns`` names the objects; empty takes every noun of at least ``min_assets`` assets but those ``left_out``, the
    most frequent ``max_nouns`` of them (0: all). ``licences`` are SPDX identifiers, and "unknown" for none. Objects
    whose ``warnings`` tell of lost colours are trained with ``colour_warnings`` only. ``held_out_per_noun`` colours of
    each noun are never trained together with it, ``held_out_assets`` of its assets (but at least one) not at all, nor a
    share ``held_out_views`` of the angles. ``assets_per_noun`` trains only so many, the most typical ones of each noun
    (0: all): where compute is short, few objects well drawn beat many blobs. Sides are not told of views within
    ``side_margin_deg`` of where one becomes the other: what is seen from a corner is neither a front view nor a side
    view.
    """

    nouns: tuple[str, ...] = ()
    min_assets: int = 8
    max_nouns: int = 0
    left_out: tuple[str, ...] = VAGUE_NOUNS
    aliases: tuple[tuple[str, str], ...] = ALIASES
    licences: tuple[str, ...] = ("CC0-1.0",)
    colour_warnings: bool = False
    held_out_per_noun: int = 1
    held_out_assets: float = 0.1
    held_out_views: float = 0.0
    assets_per_noun: int = 0
    natural_colour_probability: float = 0.6
    view_probability: float = 0.5
    side_margin_deg: float = 15.0
    own_caption_probability: float = 0.1
    template_probability: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require(self.min_assets >= 2, "min_assets", f"must be at least 2 (one is held out), got {self.min_assets}")
        require_not_negative(self, "max_nouns", "assets_per_noun")
        require(bool(self.licences), "licences", "must name at least one licence")
        require(0 <= self.held_out_per_noun <= 5, "held_out_per_noun", f"must be 0..5, got {self.held_out_per_noun}")
        require(0 <= self.side_margin_deg < 45, "side_margin_deg", f"must be 0..45, got {self.side_margin_deg}")
        require(0 < self.held_out_assets < 1, "held_out_assets", f"must lie in (0, 1), got {self.held_out_assets}")
        require_share(self, "natural_colour_probability", "view_probability", "own_caption_probability")
        require_share(self, "template_probability", "dropout", "held_out_views")


@dataclass(frozen=True)
class LookConfig:
    """How a render is finished on the fly: its colours, its light (at least ``ambient``), the grey behind it."""

    recolour_probability: float = 0.5
    ambient: tuple[float, float] = (0.55, 1.0)
    background: tuple[float, float] = (0.5, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        require_share(self, "recolour_probability")
        require_range(self.ambient, "ambient", 0.0, 1.0)
        require_range(self.background, "background", 0.0, 1.0)


@dataclass(frozen=True)
class StageSettings:
    """Length and pace of one training stage.

    The learning rate warms up and then falls along a cosine to a twentieth. It is at its end after ``num_steps`` or,
    if ``minutes`` is not 0, after so many minutes of training, whichever is first; only with 0 is a resumed run the
    same as an uninterrupted one. ``batch_size`` is that of one worker.
    """

    num_steps: int
    batch_size: int
    lr: float
    minutes: float = 0.0
    warm_up_steps: int = 100
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "batch_size", "lr")
        require_not_negative(self, "minutes")
        require(0 <= self.ema_decay < 1, "ema_decay", f"must lie in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class VaeConfig:
    """An ``AutoencoderKL`` of 4 latent channels; each level after the first halves the image.

    ``start`` is the folder of a finished prior, or "embedded", whose VAE is trained further: what it learnt of edges
    and colours holds for other objects too.
    """

    start: str = ""
    channels: tuple[int, ...] = (16, 32, 64)
    norm_groups: int = 16
    kl_weight: float = 3e-5
    l1_weight: float = 0.1
    stage: StageSettings = field(
        default_factory=lambda: StageSettings(num_steps=2500, batch_size=16, lr=1.5e-3, ema_decay=0.995)
    )

    def __post_init__(self) -> None:
        _require_levels(self.channels, self.norm_groups)


@dataclass(frozen=True)
class UnetConfig:
    """A ``UNet2DConditionModel`` and its ``CLIPTextModel``; ``attention`` are the levels that read the text.

    ``pooled_text`` adds the pooled text to the time embedding, which reaches every level: a small UNet learns its nouns
    sooner than by attention alone. Timesteps are trained uniformly or, with ``t_logit_std`` above 0, so that the logit
    of t / 1000 is normal (arXiv 2403.03206): shapes are decided in the middle, and there a short training is best
    spent. ``contrast`` is the weight of a second loss, by which a render is explained better by its caption than by one
    with another side, colour or noun: side words change little in a render, and the plain loss hardly teaches them. It
    takes up to half as long again. The shipped prior had 2, late in its training; 8 and more destroyed what side words
    do in a prior at its beginning.
    """

    channels: tuple[int, ...] = (64, 128, 192)
    attention: tuple[int, ...] = (1,)
    num_heads: int = 4
    norm_groups: int = 32
    text_width: int = 192
    text_layers: int = 2
    text_heads: int = 6
    num_tokens: int = 24
    pooled_text: bool = True
    zero_terminal_snr: bool = True
    t_logit_mean: float = 0.0
    t_logit_std: float = 0.0
    contrast: float = 0.0
    stage: StageSettings = field(default_factory=lambda: StageSettings(num_steps=30000, batch_size=32, lr=5e-4))

    def __post_init__(self) -> None:
        _require_levels(self.channels, self.norm_groups)
        require_positive(self, "num_heads", "text_layers")
        require_not_negative(self, "t_logit_std", "contrast")
        ok = self.text_heads >= 1 and self.text_width >= 1 and self.text_width % self.text_heads == 0
        require(ok, "text_width", f"must be a multiple of text_heads ({self.text_heads}), got {self.text_width}")
        ok = all(0 <= level < len(self.channels) for level in self.attention)
        require(ok, "attention", f"must name levels 0..{len(self.channels) - 1}, got {list(self.attention)}")
        require(self.num_tokens >= 8, "num_tokens", f"must be at least 8, got {self.num_tokens}")


@dataclass(frozen=True)
class GateConfig:
    """How much is measured by ``gate.py``."""

    num_renders: int = 400
    num_noises: int = 1
    timesteps: tuple[int, ...] = (500, 800)
    num_classified: int = 50
    classifier_noises: int = 8
    classifier_timesteps: tuple[int, ...] = (400, 500, 600, 700, 800)
    cfg_scale: float = 4.0
    sample_steps: int = 25

    def __post_init__(self) -> None:
        times = (*self.timesteps, *self.classifier_timesteps)
        require(all(0 <= t <= 999 for t in times), "timesteps", f"must lie in 0..999, got {list(times)}")


@dataclass(frozen=True)
class TrainConfig:
    """One prior: words, look, models, the two stages, and how often it is saved and looked at.

    ``start`` is the folder of a finished prior of the same models to go on from, or "embedded": its words and its VAE
    stay, its UNet and text encoder are the first weights.
    """

    seed: int = 0
    start: str = ""
    words: WordsConfig = field(default_factory=WordsConfig)
    look: LookConfig = field(default_factory=LookConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    bfloat16: Literal["auto", "on", "off"] = "auto"
    save_every_s: float = 120.0
    sample_every_s: float = 600.0
    log_every_steps: int = 20
    num_threads: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "num_threads", "log_every_steps")
