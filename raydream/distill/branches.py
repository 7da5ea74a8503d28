"""``Branch``: one source of gradient on one kind of render, whatever it is asked of and by whatever method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.config.branches import BranchConfig
from raydream.diffusion import guidance
from raydream.diffusion.methods import METHODS, Eps
from raydream.priors.protocol import Texts
from raydream.seeds import generator
from raydream.types import Condition, Denoiser, Latents, Views

MAP_BOUND = 1.0  # coordinates and opacity are coded within [-1, 1]
_TEXT_NOISE = "heard"  # the name of a stream of random numbers is part of every seed

Ask = Callable[[Latents, Int[Tensor, " view"]], Latents]


@dataclass(frozen=True)
class Branch:
    """A frozen denoiser of one kind of render with its texts."""

    config: BranchConfig
    denoiser: Denoiser
    texts: Texts
    alphas_cumprod: Float[Tensor, " t"]
    # what a particle's text has beside the words, by seed and particle, as drawn
    _heard: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def text(
        self, views: Views, seed: int, particles: Sequence[int], sizes: Sequence[int]
    ) -> Float[Tensor, "view token width"]:
        """What the denoiser is told of each view, as its particle reads it: the same in all of its steps. ``sizes`` are
        the numbers of views of the particles.
        """
        text = self.texts.view_embeddings(views.azimuth_deg, views.elevation_deg)
        settings, plain = self.config.geometric_prior, self.texts.prompt_embeddings(1)
        if self.config.render != "ccm" or not settings.text_noise:
            return text

        def own(index: int) -> Float[Tensor, "1 token width"]:
            if (seed, index) not in self._heard:
                noise = torch.randn(plain.shape, generator=generator(seed, _TEXT_NOISE, index, 0))
                noise[:, 0] = 0  # the start token is the same in every prompt, and no other value of it was ever seen
                scale = settings.text_noise * float(plain.std()) if index else 0.0
                self._heard[seed, index] = scale * noise.to(plain)
            return self._heard[seed, index]

        return text + torch.cat([own(index).expand(size, -1, -1) for index, size in zip(particles, sizes)])

    @torch.no_grad()
    def gradient(
        self,
        step: int,
        views: Views,
        text: Float[Tensor, "view token width"],
        t: Int[Tensor, " view"],
        noise: Latents,
        reference: Ask | None = None,
    ) -> Latents:
        """By the latents, in the direction that an optimiser must *not* go; ``reference`` is the learned model's noise.
        ``step`` counts the stage's own steps.
        """
        config, alphas = self.config, self.alphas_cumprod
        method, num_denoise = METHODS[config.method], int(config.geometric_prior.denoise_steps.at(step))
        if num_denoise > 1:
            t = t.clamp(max=len(alphas) - 2)  # where a schedule ends without signal, noise tells nothing of a map
        abar = alphas[t]
        z_t = guidance.add_noise(views.latents, noise, abar)
        if num_denoise > 1:
            answer = partial(self._guided, views, text, False)
            clean = guidance.denoised(lambda z, at: answer(z, at)[0], z_t, t, alphas, num_denoise, MAP_BOUND)
            guided, negative = guidance.implied_noise(z_t, clean, abar), None
        else:
            guided, negative = self._guided(views, text, method.needs_negative, z_t, t)
        learned = reference(z_t, t) if config.learns and reference is not None else None
        eps = Eps(guided, negative, learned, noise, views.latents, abar)
        gradient = method.gradient(eps, guidance.weight(config.weighting, abar))
        return guidance.clip_gradient(gradient, config.gradient_clip.at(step))

    def _guided(
        self,
        views: Views,
        text: Float[Tensor, "view token width"],
        needs_negative: bool,
        z_t: Latents,
        t: Int[Tensor, " view"],
    ) -> tuple[Latents, Latents | None]:
        """The denoiser's answer under classifier-free guidance and to the negative text alone; all texts in one batch,
        none that is multiplied by 0 and not asked for.
        """
        config, eps_of = self.config, self.denoiser.eps
        negative = self.texts.negative_embeddings(views.num_views)
        if config.perp_neg:
            perp = self.texts.perp_neg_texts(views.azimuth_deg, views.elevation_deg)
            stacked = torch.stack([negative, perp.positive, *perp.negatives])
            eps = guidance.eps_for_texts(eps_of, z_t, t, condition(views, negative), stacked)
            positive = guidance.perp_neg(eps[0], eps[1], eps[2:], perp.weights.to(z_t))
            return guidance.classifier_free(eps[0], positive, config.scale), eps[0]
        if config.scale in (0, 1) and not needs_negative:
            return eps_of(z_t, t, condition(views, text if config.scale else negative)), None
        eps = guidance.eps_for_texts(eps_of, z_t, t, condition(views, text), torch.stack([negative, text]))
        return guidance.classifier_free(eps[0], eps[1], config.scale), eps[0]


def condition(
    views: Views, text: Float[Tensor, "view token width"], camera_weight: Float[Tensor, " view"] | None = None
) -> Condition:
    """What a denoiser is told of views; by default all cameras count."""
    weight = torch.ones(views.num_views, device=views.latents.device) if camera_weight is None else camera_weight
    return Condition(text, views.c2w, views.fov_y_deg, weight)
