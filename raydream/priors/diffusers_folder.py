"""A Stable-Diffusion-class prior: a folder in the diffusers layout, the LoRA of it, and the words of its lexicon."""

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.prior import PriorConfig
from raydream.config.run import RunConfig
from raydream.device import own_device
from raydream.diffusion.latent import LatentCodec
from raydream.diffusion.prompts import bank_prompts, check_lengths
from raydream.diffusion.text import TextBank, encode_prompts
from raydream.diffusion.weight_files import file_stamps
from raydream.precision import fast_dtype
from raydream.priors.cache import CODECS, DENOISERS, LEARNERS, TEXTS, PartCache
from raydream.priors.find import check_image_px, check_learner_prior, check_prompt, known_nouns, resolve_prior
from raydream.priors.protocol import LearnedReference, Texts
from raydream.types import Denoiser

if TYPE_CHECKING:
    from raydream.diffusion.denoiser import DiffusersDenoiser

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DiffusersPrior:
    """A ``PriorKind``."""

    config: PriorConfig

    def check(self, run: RunConfig) -> RunConfig:
        folder = resolve_prior(self.config.source, self.config.allow_download)
        check_image_px(folder, self.config.image_px)
        check_lengths(folder, run.prompt, run.negative_prompt)
        check_prompt(folder, run.prompt)
        for index, stage in enumerate(run.stages):
            if stage.learns and stage.learner.prior:
                try:
                    check_learner_prior(folder, self._find(stage.learner.prior))
                except ValueError as error:
                    name = f"stages.{index}.learner.prior"
                    raise ValueError(f"{name}: {error}; or --set {name}= to learn on the prior that guides") from error
        return run

    def nouns(self) -> list[str] | None:
        return known_nouns(self._folder)

    def codec(self, device: torch.device) -> LatentCodec:
        from raydream.diffusion.vae import VaeCodec  # importing diffusers takes seconds

        prior, folder = self.config, self._folder
        dtype = vae_dtype(prior, device)
        return CODECS.get(
            (folder, file_stamps(folder), prior.image_px, prior.sample_posterior, dtype, device),
            lambda: VaeCodec.load(folder, prior.image_px, prior.sample_posterior, dtype, device),
        )

    def denoiser(self, prompt: str, backend: str, device: torch.device) -> tuple[Denoiser, Float[Tensor, " t"]]:
        frozen = self._unet(self._folder, device, DENOISERS)
        return frozen, frozen.alphas_cumprod

    def texts(
        self, prompt: str, negative_prompt: str, branch: BranchConfig, backend: str, device: torch.device
    ) -> Texts:
        return text_bank(self._folder, file_stamps(self._folder), prompt, negative_prompt, branch, device)

    def learner(self, denoiser: Denoiser, config: LearnerConfig, init: torch.Generator) -> LearnedReference:
        from raydream.diffusion.denoiser import DiffusersDenoiser
        from raydream.diffusion.lora import LoraDenoiser

        assert isinstance(denoiser, DiffusersDenoiser)
        if config.prior:
            denoiser = self._unet(self._find(config.prior), denoiser.unet.device, LEARNERS)
        return LoraDenoiser(denoiser, config.rank, int(torch.randint(2**31, (), generator=init)))

    @cached_property
    def _folder(self) -> Path:
        """Found, and its files looked at, once for all of its parts."""
        return self._find(self.config.source)

    def _find(self, source: str) -> Path:
        return resolve_prior(source, self.config.allow_download)  # on whatever node this is

    def _unet(self, folder: Path, device: torch.device, cache: PartCache) -> "DiffusersDenoiser":
        from raydream.diffusion.denoiser import DiffusersDenoiser

        dtype, files = unet_dtype(self.config, device), file_stamps(folder)
        kept = cache.get((folder, files, dtype, device), lambda: DiffusersDenoiser.load(folder, dtype, device))
        # The same weights in layers of the run's own: a LoRA changes the layers around it and leaves the weights alone.
        weights = [*kept.unet.parameters(), *kept.unet.buffers()]
        return copy.deepcopy(kept, {id(weight): weight for weight in weights})


def text_bank(
    folder: Path, files: Hashable, prompt: str, negative_prompt: str, branch: BranchConfig, device: torch.device
) -> TextBank:
    """The texts of a prompt by a folder's own encoder."""
    prompts = tuple(bank_prompts(prompt, negative_prompt))
    embeddings = TEXTS.get((folder, files, prompts, device), lambda: encode_prompts(folder, prompts, device))
    return TextBank(embeddings, prompt, negative_prompt, branch)


def unet_dtype(prior: PriorConfig, device: torch.device) -> torch.dtype:
    """The torch dtype of a frozen UNet on a device; on the meta device, as it would be here."""
    if prior.dtype == "auto":
        return fast_dtype(own_device() if device.type == "meta" else device)
    return _DTYPES[prior.dtype]


def vae_dtype(prior: PriorConfig, device: torch.device) -> torch.dtype:
    """The same of a VAE, which stays in float32 on a CPU: there it takes little of a step."""
    on_cpu = device.type == "cpu" or (device.type == "meta" and own_device().type == "cpu")
    return torch.float32 if prior.dtype == "auto" and on_cpu else unet_dtype(prior, device)
