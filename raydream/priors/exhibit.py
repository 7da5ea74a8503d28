"""The prior whose score is exact: a mixture of assets, seen from whatever camera it is asked about; no weights."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.assets.exhibit import asset_folder, available_nouns, match_prompt
from raydream.assets.libraries import MANIFEST
from raydream.assets.procedural import PROCEDURAL
from raydream.backend import load_backend
from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.checks import require
from raydream.config.prior import SMALL_UNET_PATCH_PX, PriorConfig
from raydream.config.run import RunConfig, StageConfig
from raydream.diffusion.analytic import MixtureDenoiser
from raydream.diffusion.guidance import alphas_cumprod
from raydream.diffusion.latent import LatentCodec, RgbaCodec
from raydream.diffusion.text import PerpNegTexts
from raydream.diffusion.weight_files import file_stamps
from raydream.priors.cache import MODES
from raydream.priors.exhibit_modes import ExhibitModes
from raydream.priors.protocol import LearnedReference, Texts
from raydream.schedule import highest
from raydream.types import Denoiser, PerView

# Stable Diffusion's noise schedule, taken on to zero signal: only there do the modes of an exhibit, 70 apart in a
# space of 16,384 dimensions, melt into one another, so that particles can still choose among them.
EXHIBIT_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
}
MODE_STD = 0.05  # of each mode around its asset, in latent units


class MixtureTexts:
    """The words of an exhibit: every prompt means "one of the modes", all equally likely."""

    def __init__(self, num_modes: int, device: torch.device) -> None:
        self._embedding = torch.full((1, num_modes), 1.0 / num_modes, device=device)

    def prompt_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        return self._embedding.expand(num_views, -1, -1)

    def negative_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        return self.prompt_embeddings(num_views)

    def view_embeddings(self, azimuth_deg: PerView, elevation_deg: PerView) -> Float[Tensor, "view token width"]:
        return self.prompt_embeddings(len(azimuth_deg))

    def perp_neg_texts(self, azimuth_deg: PerView, elevation_deg: PerView) -> PerpNegTexts:
        raise ValueError("perp_neg: an exhibit has no view words; switch it off or choose another prior")


@dataclass(frozen=True)
class ExhibitPrior:
    """A ``PriorKind``."""

    config: PriorConfig

    def check(self, run: RunConfig) -> RunConfig:
        """The run with its assets named, once its settings fit an exact score and its prompt means some of them."""
        remedy = "an exhibit knows the names of its objects only; leave it empty"
        require(not run.negative_prompt, "negative_prompt", remedy)
        for index, stage in enumerate(run.stages):
            self._check_stage(stage, f"stages.{index}.")
        source, _ = match_prompt(run.prompt, self.config.exhibit.assets or None)
        exhibit = dataclasses.replace(self.config.exhibit, assets=str(source))
        return dataclasses.replace(run, prior=dataclasses.replace(run.prior, exhibit=exhibit))

    def nouns(self) -> list[str]:
        return [noun for noun, _ in available_nouns(self.config.exhibit.assets or None).most_common()]

    def codec(self, device: torch.device) -> LatentCodec:
        return RgbaCodec(self.config.exhibit_px)

    def denoiser(self, prompt: str, backend: str, device: torch.device) -> tuple[Denoiser, Float[Tensor, " t"]]:
        abar = alphas_cumprod(EXHIBIT_SCHEDULE).float().to(device)
        return MixtureDenoiser(self._modes(prompt, backend, device), abar, MODE_STD), abar

    def texts(
        self, prompt: str, negative_prompt: str, branch: BranchConfig, backend: str, device: torch.device
    ) -> Texts:
        return MixtureTexts(self._modes(prompt, backend, device).num_modes, device)

    def learner(self, denoiser: Denoiser, config: LearnerConfig, init: torch.Generator) -> LearnedReference:
        from raydream.diffusion.small_unet import SmallUnetLearner

        assert isinstance(denoiser, MixtureDenoiser)
        abar, size_px = denoiser.alphas_cumprod, self.config.exhibit_px
        return SmallUnetLearner(config.unet_channels, size_px, abar, config.bfloat16, init).to(abar.device)

    def _check_stage(self, stage: StageConfig, where: str) -> None:
        remedy = "needs a prior with a VAE; leave it at 0 for an exhibit"
        require(highest(stage.losses.round_trip) == 0, f"{where}losses.round_trip", remedy)
        for index, branch in enumerate(stage.branches):
            if branch.render == "ccm":
                continue
            field = f"{where}branches.{index}."
            remedy = "must not be normal for an exhibit, which knows colours only; use rgb, or another prior"
            require(branch.render != "normal", f"{field}render", remedy)
            require(branch.scale == 1, f"{field}scale", "an exhibit's score is exact; guidance scale must be 1")
            require(not branch.perp_neg, f"{field}perp_neg", "an exhibit has no view words; switch it off")
            remedy = "must not be csd for an exhibit, which has no negative text to move away from; use vsd, sds or sjc"
            require(branch.method != "csd", f"{field}method", remedy)
        remedy = "must be empty: beside an exact score a small UNet learns"
        require(not stage.learner.prior, f"{where}learner.prior", remedy)
        if stage.learns:
            self._check_unet(stage.learner)

    def _check_unet(self, learner: LearnerConfig) -> None:
        """The learned reference halves its picture at each level, down to two patches or more."""
        image_px, num_levels = self.config.exhibit_px, len(learner.unet_channels)
        patch_px = SMALL_UNET_PATCH_PX if image_px % 16 == 0 else 1
        coarsest = patch_px * 2 ** (num_levels - 1)
        ok = image_px % coarsest == 0 and image_px >= 2 * coarsest
        remedy = f"must be a multiple of {coarsest}, and not itself, for {num_levels} unet_channels"
        require(ok, "prior.image_px", remedy)

    def _modes(self, prompt: str, backend: str, device: torch.device) -> ExhibitModes:
        source = str(asset_folder(self.config.exhibit.assets) or PROCEDURAL)
        exhibit = dataclasses.replace(self.config.exhibit, assets=source)
        files = () if source == PROCEDURAL else file_stamps(Path(source), MANIFEST)  # which lists all others
        return MODES.get(
            (prompt, exhibit, backend, device, files),
            lambda: ExhibitModes.load(prompt, exhibit, load_backend(backend, device.type), device),
        )
