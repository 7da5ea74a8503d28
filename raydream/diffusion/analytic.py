"""A prior whose score is known exactly: a Gaussian mixture, one mode for each exhibit seen from the asked camera.

Legend: z_t = alpha z_0 + sigma eps, alpha^2 = abar_t, sigma^2 = 1 - abar_t, z_0 ~ sum_k pi_k N(mu_k(camera), s^2 I).
Then z_t ~ sum_k pi_k N(alpha mu_k, v I) with v = alpha^2 s^2 + sigma^2, and eps(z_t) = -sigma grad log p(z_t).
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.types import Condition, Latents, PerView


@runtime_checkable
class ModeSource(Protocol):
    """Where the means of the mixture come from."""

    def means(
        self,
        c2w: Float[Tensor, "view 4 4"],
        fov_y_deg: PerView,
        used: Int[Tensor, " used"],
        size_px: int,
    ) -> Float[Tensor, "view used latent h w"]:
        """The latents of the modes ``used`` seen from each camera."""
        ...


class MixtureDenoiser:
    """The exact noise predictor of a posed Gaussian mixture.

    A condition's ``text`` is ``[view, 1, mode]``: the probability of each mode under the prompt. Guidance, negative
    prompts and view-dependent prompts therefore work as with any other prior.
    """

    def __init__(self, modes: ModeSource, alphas_cumprod: Float[Tensor, " t"], mode_std: float) -> None:
        self._modes, self._variance = modes, mode_std**2
        self.alphas_cumprod = alphas_cumprod

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """-sigma times the gradient of the log-density at ``z_t``, in closed form."""
        abar = self.alphas_cumprod.to(z_t)[t][:, None, None, None]
        variance = abar * self._variance + (1 - abar)
        mean = self.posterior_mode_mean(z_t, t, cond)
        return (1 - abar).sqrt() * (z_t - abar.sqrt() * mean) / variance

    def posterior_mode_mean(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """``sum_k p(k | z_t) mu_k``: the mean of the modes weighted by how well each explains ``z_t``."""
        probability = cond.text[:, 0, :].to(z_t)
        used = probability.sum(0).nonzero()[:, 0]
        means = self._modes.means(cond.c2w, cond.fov_y_deg, used, z_t.shape[-1]).to(z_t)
        abar = self.alphas_cumprod[t].double()[:, None]
        variance = abar * self._variance + (1 - abar)
        flat = means.flatten(2)
        # |z - alpha mu|^2 without the k-independent |z|^2: two batched products, no [view, mode, pixel] difference. In
        # double: at small t the terms are a million variances, and what tells like modes apart must survive in them.
        exact = flat.double()
        cross = torch.einsum("vkd,vd->vk", exact, z_t.flatten(1).double())
        distance = abar * exact.square().sum(-1) - 2 * abar.sqrt() * cross
        responsibility = torch.softmax(probability[:, used].log() - distance / (2 * variance), dim=1).to(z_t)
        return torch.einsum("vk,vkd->vd", responsibility, flat).reshape(z_t.shape)
