"""From a prior's name to its parts: the frozen denoiser, the texts, and the learned reference beside it.

What is frozen stays loaded in the process: setting up the next run with the same prior reads no weights again.
"""

import copy
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.backend import load_backend
from raydream.config.run import ParticleConfig, PriorConfig, ScoreConfig
from raydream.diffusion.analytic import MixtureDenoiser
from raydream.diffusion.codec import make_codec
from raydream.diffusion.guidance import PredictionType, alphas_cumprod
from raydream.diffusion.latent import LatentCodec
from raydream.diffusion.prompts import bank_prompts
from raydream.diffusion.text import PerpNegTexts, TextBank, encode_prompts
from raydream.diffusion.weight_files import file_stamps
from raydream.precision import has_fast_bfloat16
from raydream.priors.find import resolve_agp, resolve_agp_prior, resolve_prior
from raydream.seeds import generator
from raydream.types import Condition, Denoiser

# Stable Diffusion's noise schedule, taken on to zero signal: only there do the modes of an exhibit, 70 apart in a
# space of 16,384 dimensions, melt into one another, so that particles can still choose among them.
EXHIBIT_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
}

Part = TypeVar("Part")


class Shelf:
    """Frozen parts by all that they depend on. What went unused the longest goes before another one is loaded."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._parts: OrderedDict[Hashable, object] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, load: Callable[[], Part]) -> Part:
        """The part of ``key``, loaded where it is not here; whoever gets it must not change it."""
        with self._lock:
            if key not in self._parts:
                while len(self._parts) >= self._num_places:
                    self._parts.popitem(last=False)
                self._parts[key] = load()
            self._parts.move_to_end(key)
            return self._parts[key]  # type: ignore[return-value]  # a key is only ever used with one kind of part

    def clear(self) -> None:
        """Lets go of everything."""
        with self._lock:
            self._parts.clear()


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Big models one of a kind: most processes only ever see one, and two may not fit. Modes and texts are small.
_DENOISERS, _AGPS, _CODECS, _TEXTS, _MODES = Shelf(1), Shelf(1), Shelf(1), Shelf(16), Shelf(4)


@runtime_checkable
class Learner(Protocol):
    """A denoiser that learns what the particles look like now; ``predict`` is in its own parametrisation."""

    @property
    def prediction_type(self) -> PredictionType: ...

    def eps(
        self, z_t: Float[Tensor, "view 4 h w"], t: Int[Tensor, " view"], cond: Condition
    ) -> Float[Tensor, "view 4 h w"]: ...

    def predict(
        self, z_t: Float[Tensor, "view 4 h w"], t: Int[Tensor, " view"], cond: Condition
    ) -> Float[Tensor, "view 4 h w"]: ...

    def trainable(self) -> dict[str, torch.nn.Parameter]: ...


@runtime_checkable
class Texts(Protocol):
    """What the score model tells its denoisers; see ``TextBank``."""

    def prompt_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]: ...

    def negative_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]: ...

    def view_embeddings(
        self, azimuth_deg: Float[Tensor, " view"], elevation_deg: Float[Tensor, " view"]
    ) -> Float[Tensor, "view token width"]: ...

    def perp_neg_texts(
        self, azimuth_deg: Float[Tensor, " view"], elevation_deg: Float[Tensor, " view"]
    ) -> PerpNegTexts: ...


class MixtureTexts:
    """The words of an exhibit: every prompt means "one of the modes", all equally likely."""

    def __init__(self, num_modes: int, device: torch.device) -> None:
        self._embedding = torch.full((1, num_modes), 1.0 / num_modes, device=device)

    def prompt_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        return self._embedding.expand(num_views, -1, -1)

    def negative_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        return self.prompt_embeddings(num_views)

    def view_embeddings(
        self, azimuth_deg: Float[Tensor, " view"], elevation_deg: Float[Tensor, " view"]
    ) -> Float[Tensor, "view token width"]:
        return self.prompt_embeddings(len(azimuth_deg))

    def perp_neg_texts(
        self, azimuth_deg: Float[Tensor, " view"], elevation_deg: Float[Tensor, " view"]
    ) -> PerpNegTexts:
        raise ValueError("perp_neg: an exhibit has no view words; switch it off or choose another prior")


@dataclass(frozen=True)
class Prior:
    """All that the score model is made of. ``learner`` is None where nothing is learned (SDS, SJC)."""

    denoiser: Denoiser
    texts: Texts
    alphas_cumprod: Float[Tensor, " t"]
    learner: Learner | None


def load_prior(config: ScoreConfig, device: torch.device) -> Prior:
    """Loads or builds the prior of a run; the learned reference starts the same in every replica."""
    init = generator(config.seed, "learner", 0, 0)
    match config.prior.kind:
        case "exhibit":
            return _exhibit(config, device, init)
        case "diffusers":
            return _diffusers(config, device, init)


def forget_priors() -> None:
    """Lets go of all that stayed loaded, as if the process were new."""
    for shelf in (_DENOISERS, _AGPS, _CODECS, _TEXTS, _MODES):
        shelf.clear()


def _exhibit(config: ScoreConfig, device: torch.device, init: torch.Generator) -> Prior:
    from raydream.assets.exhibit import asset_folder
    from raydream.assets.library import MANIFEST
    from raydream.assets.procedural import PROCEDURAL
    from raydream.priors.exhibit_modes import ExhibitModes

    abar = alphas_cumprod(EXHIBIT_SCHEDULE).float().to(device)
    source = str(asset_folder(config.prior.exhibit.assets) or PROCEDURAL)
    exhibit = dataclasses.replace(config.prior.exhibit, assets=source)
    files = () if source == PROCEDURAL else file_stamps(Path(source), MANIFEST)  # which lists all others
    modes = _MODES.get(
        (config.prompt, exhibit, config.backend, device, files),
        lambda: ExhibitModes.load(config.prompt, exhibit, load_backend(config.backend, device.type), device),
    )
    denoiser = MixtureDenoiser(modes, abar, config.prior.exhibit.mode_std)
    unet: Learner | None = None
    if config.method == "vsd":
        from raydream.diffusion.small_unet import SmallUnetLearner

        learner, size_px = config.learner, config.prior.exhibit_px
        unet = SmallUnetLearner(learner.unet_channels, size_px, abar, learner.bfloat16, init).to(device)
    return Prior(denoiser, MixtureTexts(modes.num_modes, device), abar, unet)


def _diffusers(config: ScoreConfig, device: torch.device, init: torch.Generator) -> Prior:
    from raydream.diffusion.denoiser import DiffusersDenoiser  # importing diffusers takes seconds: only where needed
    from raydream.diffusion.lora import LoraDenoiser

    folder, dtype = resolve_prior(config.prior.source), unet_dtype(config.prior, device)
    files = file_stamps(folder)
    kept = _DENOISERS.get((folder, files, dtype, device), lambda: DiffusersDenoiser.load(folder, dtype, device))
    # The same weights in layers of the run's own: a LoRA changes the layers around it and leaves the weights alone.
    weights = [*kept.unet.parameters(), *kept.unet.buffers()]
    frozen = copy.deepcopy(kept, {id(weight): weight for weight in weights})
    lora_seed = int(torch.randint(2**31, (), generator=init))
    lora = LoraDenoiser(frozen, config.learner.rank, lora_seed) if config.method == "vsd" else None
    return Prior(frozen, _text_bank(config, folder, files, device), frozen.alphas_cumprod, lora)


def load_agp(config: ScoreConfig, device: torch.device) -> tuple[Denoiser, Texts, Float[Tensor, " t"]]:
    """The frozen AGP that a run names, its texts without negative words, its alphas; ``ValueError`` about ``agp`` or
    ``prior`` where it cannot be had.
    """
    from raydream.priors.agp import AgpDenoiser  # importing diffusers takes seconds: only where needed

    agp, prior = resolve_agp(config.geometry.agp), resolve_agp_prior(config.geometry.prior, config.prior.source)
    dtype, files = unet_dtype(config.prior, device), file_stamps(prior)
    denoiser = _AGPS.get(
        (agp, file_stamps(agp), prior, files, dtype, device), lambda: AgpDenoiser.load(agp, prior, device, dtype)
    )
    texts = _text_bank(dataclasses.replace(config, negative_prompt=""), prior, files, device)
    return denoiser, texts, denoiser.alphas_cumprod


def _text_bank(config: ScoreConfig, folder: Path, files: Hashable, device: torch.device) -> TextBank:
    prompts = tuple(bank_prompts(config.prompt, config.negative_prompt))
    embeddings = _TEXTS.get((folder, files, prompts, device), lambda: encode_prompts(folder, prompts, device))
    return TextBank(embeddings, config.prompt, config.negative_prompt, config.guidance)


def load_codec(config: ParticleConfig, device: torch.device) -> LatentCodec:
    """How a particle's renders become latents: an exhibit's are colour and opacity, any other prior has its VAE."""
    prior = config.prior
    if prior.kind == "exhibit":
        return make_codec("rgba", prior.exhibit_px, None, False, torch.float32, device)
    folder = resolve_prior(prior.source)
    dtype = torch.float32 if prior.dtype == "auto" else _DTYPES[prior.dtype]
    return _CODECS.get(
        (folder, file_stamps(folder), prior.image_px, prior.sample_posterior, dtype, device),
        lambda: make_codec("vae", prior.image_px, folder, prior.sample_posterior, dtype, device),
    )


def unet_dtype(prior: PriorConfig, device: torch.device) -> torch.dtype:
    """The torch dtype of a frozen UNet on a device."""
    if prior.dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return _DTYPES[prior.dtype]
