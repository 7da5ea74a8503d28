"""From the settings of a branch on coordinate maps to the aligned geometric prior behind it."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.config.actors import ScoreConfig
from raydream.config.branches import BranchConfig
from raydream.config.run import RunConfig
from raydream.diffusion.prompts import check_lengths
from raydream.diffusion.weight_files import file_stamps
from raydream.priors.cache import AGPS
from raydream.priors.diffusers_folder import text_bank, unet_dtype
from raydream.priors.find import check_agp_cameras, resolve_agp, resolve_agp_prior
from raydream.priors.kinds import prior_kind
from raydream.priors.protocol import Texts
from raydream.types import Denoiser


def check_priors(run: RunConfig) -> RunConfig:
    """Makes sure that all of a run's priors can be found and used, before anything heavy loads; what they take from
    elsewhere is named in the result. ``ValueError`` naming the field for what cannot be.
    """
    for index, stage in enumerate(run.stages):
        branch = stage.branch("ccm")
        if branch is not None:
            folder = resolve_agp(branch.geometric_prior.source)
            check_lengths(resolve_agp_prior(branch.geometric_prior.prior, run.prior.source), run.prompt, "")
            check_agp_cameras(folder, stage.camera.distance, stage.camera.fov_y_deg, index)
    return prior_kind(run.prior).check(run)


def load_agp(
    branch: BranchConfig, config: ScoreConfig, device: torch.device
) -> tuple[Denoiser, Texts, Float[Tensor, " t"]]:
    """The frozen AGP that a branch names, its texts without negative and without view words (the camera says where a
    view stands), its alphas; ``ValueError`` about ``agp`` or ``prior`` where it cannot be had.
    """
    from raydream.priors.agp import AgpDenoiser  # importing diffusers takes seconds: only where needed

    settings = branch.geometric_prior
    agp, prior = resolve_agp(settings.source), resolve_agp_prior(settings.prior, config.prior.source)
    dtype, files = unet_dtype(config.prior, device), file_stamps(prior)
    denoiser = AGPS.get(
        (agp, file_stamps(agp), prior, files, dtype, device), lambda: AgpDenoiser.load(agp, prior, device, dtype)
    )
    plain = dataclasses.replace(branch, view_dependent_prompts=False)
    return denoiser, text_bank(prior, files, config.prompt, "", plain, device), denoiser.model.alphas_cumprod
