"""The mathematics of score distillation as pure functions: no model, no state, no device but that of the arguments.

Legend (ProlificDreamer, arXiv 2305.16213; t is a timestep 0..999, one for each view):
    z_0        clean latent of a render            noise      drawn N(0, 1) of the same shape
    abar_t     cumulative product of 1 - beta      z_t        sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise
    eps        a denoiser's estimate of noise      v          sqrt(abar_t) noise - sqrt(1 - abar_t) z_0
    w(t)       weight of a view's gradient         sigma      sqrt((1 - abar_t) / abar_t)
A gradient points where the latent must *not* go: an optimiser subtracts it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from raydream.diffusion.layout import PredictionType
from raydream.types import Condition, Latents, PerView

NUM_TIMESTEPS = 1000

Weighting = Literal["one_minus_abar", "uniform", "sqrt_abar_one_minus_abar", "fantasia3d"]


def _each(per_view: PerView) -> Float[Tensor, "view 1 1 1"]:
    return per_view[:, None, None, None]


def alphas_cumprod(scheduler: Mapping[str, Any]) -> Float64[Tensor, " timestep"]:
    """``abar`` for every timestep from a diffusers scheduler config (absent keys mean what they mean there).

    With ``rescale_betas_zero_snr`` the last entry is exactly 0 (arXiv 2305.08891, algorithm 1).
    """
    num_timesteps = int(scheduler.get("num_train_timesteps", NUM_TIMESTEPS))
    start, end = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 2e-2))
    kind = scheduler.get("beta_schedule", "linear")
    trained_betas = scheduler.get("trained_betas")
    if trained_betas is not None:
        kind = "trained"
    match kind:
        case "trained":
            betas = torch.tensor(trained_betas, dtype=torch.float64)
        case "linear":
            betas = torch.linspace(start, end, num_timesteps, dtype=torch.float64)
        case "scaled_linear":
            betas = torch.linspace(math.sqrt(start), math.sqrt(end), num_timesteps, dtype=torch.float64) ** 2
        case "squaredcos_cap_v2":
            time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
            abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        case _:
            raise ValueError(f"prior: its scheduler has beta_schedule {kind!r}, which raydream does not know")
    abar = torch.cumprod(1 - betas, dim=0)
    if scheduler.get("rescale_betas_zero_snr", False):
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


def draw_timesteps(num_views: int, t_min: int, t_max: int, generator: torch.Generator) -> Int[Tensor, " view"]:
    """One timestep for each view, uniform on ``t_min..t_max`` with both ends, on the generator's device."""
    if not 0 <= t_min <= t_max < NUM_TIMESTEPS:
        raise ValueError(f"t_min, t_max: must be 0 <= t_min <= t_max <= {NUM_TIMESTEPS - 1}, got {t_min} and {t_max}")
    return torch.randint(t_min, t_max + 1, (num_views,), generator=generator, device=generator.device)


def stratified_timesteps(
    size: int, generator: torch.Generator, logit_mean: float = 0.0, logit_std: float = 0.0
) -> Int[Tensor, " view"]:
    """Timesteps in 0..999, one from each equal part of their distribution: that takes most scatter out of a loss. It is
    uniform or, with ``logit_std`` above 0, such that the logit of t / 1000 is normal.
    """
    quantile = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    if logit_std:
        quantile = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(quantile))
    return (NUM_TIMESTEPS * quantile).long().clamp_max(NUM_TIMESTEPS - 1)


def add_noise(z_0: Latents, noise: Latents, abar_t: PerView) -> Latents:
    """``z_t``, the forward process at each view's timestep (DDPM eq. 4)."""
    return _each(abar_t).sqrt() * z_0 + _each(1 - abar_t).sqrt() * noise


def v_target(z_0: Latents, noise: Latents, abar_t: PerView) -> Latents:
    """What a v-model learns to answer (Progressive Distillation, arXiv 2202.00512, appendix D)."""
    return _each(abar_t).sqrt() * noise - _each(1 - abar_t).sqrt() * z_0


def eps_from_v(v: Latents, z_t: Latents, abar_t: PerView) -> Latents:
    """The noise that a v-model's answer implies; exact also where ``abar_t`` is 0."""
    return _each(abar_t).sqrt() * v + _each(1 - abar_t).sqrt() * z_t


def lora_target(prediction_type: PredictionType, z_0: Latents, noise: Latents, abar_t: PerView) -> Latents:
    """What the learned reference regresses to, in its model's own parametrisation (ProlificDreamer eq. 8)."""
    match prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return v_target(z_0, noise, abar_t)


def classifier_free(eps_negative: Latents, eps_positive: Latents, scale: float) -> Latents:
    """Guidance in diffusers' convention: ``scale`` 1 is the plain conditional model, 0 the unconditional one.

    The original paper's (and threestudio SDS's) ``s`` is ``scale - 1``: their 100 is 101 here.
    """
    return eps_negative + scale * (eps_positive - eps_negative)


def perp_neg(
    eps_uncond: Latents,
    eps_positive: Latents,
    eps_negatives: Float[Tensor, "negative view latent h w"],
    weights: Float[Tensor, "negative view"],
) -> Latents:
    """The positive prediction plus the weighted parts of the negatives that are perpendicular to it (Perp-Neg).

    Directions are taken from ``eps_uncond`` and projected within each view (arXiv 2304.04968, section 3). Weights are
    below 0 to push away. Put the result into ``classifier_free`` as ``eps_positive``. Where positive and unconditional
    agree there is nothing to project on, and the negatives count in full.
    """
    direction = eps_positive - eps_uncond
    negatives = eps_negatives - eps_uncond
    squared_norm = direction.square().sum(dim=(1, 2, 3)).clamp_min(torch.finfo(direction.dtype).tiny)
    along = (negatives * direction).sum(dim=(2, 3, 4)) / squared_norm
    perpendicular = negatives - along[:, :, None, None, None] * direction
    return eps_positive + (weights[:, :, None, None, None] * perpendicular).sum(dim=0)


def eps_for_texts(
    answer: Callable[[Tensor, Tensor, Condition], Tensor],
    z_t: Latents,
    t: Int[Tensor, " view"],
    cond: Condition,
    texts: Float[Tensor, "text view token width"],
) -> Float[Tensor, "text view latent h w"]:
    """What ``answer`` (a denoiser's ``eps``) says of the same noisy views under several texts, asked in one batch.

    The batch runs text by text (text 0 for all views, text 1 for all views, ...): latents, timesteps and cameras are
    repeated in that same order. Other systems mix the two orders and pair a view's negative with another view's latent.
    ``cond.text`` is not used.
    """
    num_texts, num_views = texts.shape[:2]
    batch = replace(
        cond,
        text=texts.flatten(0, 1),
        c2w=cond.c2w.repeat(num_texts, 1, 1),
        fov_y_deg=cond.fov_y_deg.repeat(num_texts),
        camera_weight=cond.camera_weight.repeat(num_texts),
    )
    eps = answer(z_t.repeat(num_texts, 1, 1, 1), t.repeat(num_texts), batch)
    return eps.unflatten(0, (num_texts, num_views))


def weight(kind: Weighting, abar_t: PerView) -> PerView:
    """``w(t)``: 1 - abar as in DreamFusion, 1, sqrt(abar (1 - abar)), or Fantasia3D's sqrt(abar) (1 - abar)."""
    match kind:
        case "one_minus_abar":
            return 1 - abar_t
        case "uniform":
            return torch.ones_like(abar_t)
        case "sqrt_abar_one_minus_abar":
            return (abar_t * (1 - abar_t)).sqrt()
        case "fantasia3d":
            return abar_t.sqrt() * (1 - abar_t)


def distillation_gradient(eps_prior: Latents, eps_reference: Latents, w_t: PerView) -> Latents:
    """``w(t) (eps_prior - eps_reference)`` by the latents (ProlificDreamer eq. 9).

    The reference is the drawn noise for SDS (DreamFusion eq. 3) and the learned model's answer for VSD.
    """
    return _each(w_t) * (eps_prior - eps_reference)


def denoised(
    eps: Callable[[Latents, Int[Tensor, " view"]], Latents],
    z_t: Latents,
    t: Int[Tensor, " view"],
    alphas: Float[Tensor, " timestep"],
    num_steps: int,
    bound: float,
) -> Latents:
    """The clean latent at the end of ``num_steps`` DDIM steps without noise (arXiv 2010.02502), evenly from each view's
    own ``t`` towards 0; every estimate on the way is kept within ``bound``. ``alphas`` is ``abar`` of all timesteps and
    must not be 0 at ``t``.
    """
    clean = z_t
    for left in range(num_steps, 0, -1):
        now = t * left // num_steps
        abar = alphas[now]
        estimate = (z_t - _each(1 - abar).sqrt() * eps(z_t, now)) / _each(abar).sqrt()
        clean = estimate.clamp(-bound, bound)
        z_t = add_noise(clean, implied_noise(z_t, clean, abar), alphas[t * (left - 1) // num_steps])
    return clean


def implied_noise(z_t: Latents, z_0: Latents, abar_t: PerView) -> Latents:
    """The noise that was added if ``z_0`` is what is clean: the inverse of ``add_noise``."""
    return (z_t - _each(abar_t).sqrt() * z_0) / _each(1 - abar_t).sqrt()


def sjc_gradient(eps_prior: Latents, z_0: Latents, noise: Latents, abar_t: PerView) -> Latents:
    """Score Jacobian Chaining: minus ``sigma`` times the score at the perturbed latent ``z_0 + sigma noise``.

    ``z_t`` is that perturbed latent over ``sqrt(1 + sigma^2)``, so ``eps_prior`` is the denoiser's answer to
    ``add_noise(...)``. With the paper's variance reduction the denoised latent is compared with ``z_0``, not with the
    perturbed one: the mean is the same, and it is SDS with uniform weight. Needs ``abar_t > 0``. (arXiv 2212.00774.)
    """
    sigma = _each((1 - abar_t) / abar_t).sqrt()
    denoised = z_0 + sigma * noise - sigma * eps_prior
    return (z_0 - denoised) / sigma


def clip_gradient(gradient: Latents, max_abs: float) -> Latents:
    """The gradient with each element within ``max_abs``; 0 means no bound.

    A view's that is not finite is all NaN: a broken step must not pass as a small one.
    """
    if max_abs == 0:
        return gradient
    finite = gradient.isfinite().flatten(1).all(dim=1)
    return torch.where(finite[:, None, None, None], gradient.clamp(-max_abs, max_abs), math.nan)
