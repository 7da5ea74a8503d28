"""The branch of the aligned geometric prior: its gradient on canonical coordinate maps, with the noise as reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.config.guidance import GeometryConfig
from raydream.config.run import ScoreConfig
from raydream.diffusion import guidance
from raydream.priors.load import Texts, load_agp
from raydream.seeds import generator
from raydream.types import Condition, Denoiser, Views

MAP_BOUND = 1.0  # coordinates and opacity are coded within [-1, 1]


@dataclass(frozen=True)
class GeometryBranch:
    """A frozen denoiser of maps and its texts. The camera says where a view stands, so texts have no view words."""

    config: GeometryConfig
    denoiser: Denoiser
    texts: Texts
    alphas_cumprod: Float[Tensor, " t"]

    def heard(self, seed: int, particles: Sequence[int], num_views: int) -> Float[Tensor, "view token width"]:
        """The prompt as each particle hears it, the same in all of its steps, for ``num_views`` views of each."""
        plain = self.texts.prompt_embeddings(1)
        scale = self.config.text_noise * float(plain.std())

        def own(index: int) -> Float[Tensor, "1 token width"]:
            if not (index and scale):
                return plain
            noise = torch.randn(plain.shape, generator=generator(seed, "heard", index, 0)).to(plain)
            noise[:, 0] = 0  # the start token is the same in every prompt, and no other value of it was ever seen
            return plain + scale * noise

        return torch.cat([own(index) for index in particles]).repeat_interleave(num_views, 0)

    @torch.no_grad()
    def gradient(
        self,
        views: Views,
        text: Float[Tensor, "view token width"],
        t: Int[Tensor, " view"],
        noise: Float[Tensor, "view 4 h w"],
        weighting: guidance.Weighting,
        denoise_steps: int,
    ) -> Float[Tensor, "view 4 h w"]:
        """SweetDreamer's L_align by each map: ``w(t) (eps_guided - noise)``; ``views.latents`` are encoded maps.

        With several ``denoise_steps`` ``eps_guided`` is the noise that the map at their end implies.
        """
        alphas = self.alphas_cumprod
        if denoise_steps == 1:
            z_t = guidance.add_noise(views.latents, noise, alphas[t])
            guided = self._guided_eps(views, text, z_t, t)
        else:
            t = t.clamp(max=len(alphas) - 2)  # where a schedule ends without signal, noise tells nothing of a map
            z_t = guidance.add_noise(views.latents, noise, alphas[t])
            clean = guidance.denoised(partial(self._guided_eps, views, text), z_t, t, alphas, denoise_steps, MAP_BOUND)
            guided = guidance.implied_noise(z_t, clean, alphas[t])
        return guidance.distillation_gradient(guided, noise, guidance.weight(weighting, alphas[t]))

    def _guided_eps(
        self,
        views: Views,
        text: Float[Tensor, "view token width"],
        z_t: Float[Tensor, "view 4 h w"],
        t: Int[Tensor, " view"],
    ) -> Float[Tensor, "view 4 h w"]:
        negative = self.texts.negative_embeddings(views.num_views)
        cond = Condition(text, views.c2w, views.fov_y_deg, torch.ones(views.num_views, device=z_t.device))
        eps = guidance.eps_for_texts(self.denoiser.eps, z_t, t, cond, torch.stack([negative, text]))
        return guidance.classifier_free(eps[0], eps[1], self.config.scale)


def load_geometry(config: ScoreConfig, device: torch.device) -> GeometryBranch | None:
    """The branch that a run asks for; ``ValueError`` about ``agp`` or ``prior`` where it cannot be had."""
    if config.geometry.agp == "off":
        return None
    return GeometryBranch(config.geometry, *load_agp(config, device))
