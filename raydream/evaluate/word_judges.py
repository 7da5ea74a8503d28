"""Who knows words: a diffusion prior as a classifier, or a CLIP. Both say how well a caption fits a picture. A right
caption must win against wrong ones: the prompt with its object or its colour exchanged.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from raydream import seeds
from raydream.assets.recolour import COLOURS
from raydream.config.evaluate import EvaluateConfig
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.guidance import add_noise
from raydream.diffusion.latent import LatentCodec
from raydream.diffusion.prompts import VIEW_WORDS
from raydream.diffusion.text import encode_prompts
from raydream.diffusion.vae import VaeCodec
from raydream.priors.find import resolve_prior
from raydream.train.captions import words_of
from raydream.types import Render

_CHUNK = 64
Images = Float[Tensor, "view h w 3"]


@runtime_checkable
class WordJudge(Protocol):
    """Scores pictures (in [0, 1]) against captions; larger fits better, comparable between captions of one picture."""

    name: str

    def scores(self, images: Images, captions: Sequence[str]) -> Float[Tensor, "view caption"]: ...

    def features(self, images: Images) -> Float[Tensor, "view feature"]: ...


def word_frontness(judge: WordJudge, images: Images, prompt: str) -> Float[Tensor, " view"]:
    """How much better "..., front view" fits each picture than "..., back view"."""
    scores = judge.scores(images, [prompt + VIEW_WORDS["front"], prompt + VIEW_WORDS["back"]])
    return scores[:, 0] - scores[:, 1]


class PriorJudge:
    """A prior in the diffusers layout as a classifier (arXiv 2303.16203): the score of a caption is minus the mean
    denoising error, measured on v, with it, over the same noises and timesteps for all captions and all pictures.
    """

    name = "prior"

    def __init__(
        self,
        denoiser: DiffusersDenoiser,
        codec: LatentCodec,
        texts: dict[str, Float[Tensor, "token width"]],
        settings: EvaluateConfig,
    ) -> None:
        self._denoiser, self._codec, self._texts, self._settings = denoiser, codec, texts, settings

    @classmethod
    def load(cls, captions: Sequence[str], settings: EvaluateConfig, device: torch.device) -> "PriorJudge":
        """The prior of the settings, ready to be asked about these captions and no others."""
        folder = resolve_prior(settings.prior)
        denoiser = DiffusersDenoiser.load(folder, torch.float32, device)
        codec = VaeCodec.load(folder, 0, False, torch.float32, device)
        return cls(denoiser, codec, encode_prompts(folder, captions, device), settings)

    @torch.no_grad()
    def scores(self, images: Images, captions: Sequence[str]) -> Float[Tensor, "view caption"]:
        latents = self._latents(images)
        view, caption = (
            index.flatten() for index in torch.meshgrid(*map(torch.arange, (len(images), len(captions))), indexing="ij")
        )
        texts = torch.stack([self._texts[text] for text in captions])
        total = torch.zeros(len(view))
        for timestep in self._settings.timesteps:
            abar = self._denoiser.alphas_cumprod[timestep].clamp_min(1e-6)  # 0 in zero-SNR schedules at t = 999
            for index in range(self._settings.num_noises):
                draws = seeds.generator(1, "classifier", index, timestep)
                noise = torch.randn(latents.shape[1:], generator=draws).to(latents)
                for part in torch.arange(len(view)).split(_CHUNK):
                    z_0 = latents[view[part]]
                    drawn, t = noise.expand_as(z_0), torch.full((len(part),), timestep, device=latents.device)
                    z_t = add_noise(z_0, drawn, abar.expand(len(part)))
                    answer = self._denoiser.run(z_t, t, texts[caption[part]])
                    error = (self._denoiser.to_eps(answer, z_t, t) - drawn).square().mean(dim=(1, 2, 3)) / abar
                    total[part] -= error.cpu()
        rounds = len(self._settings.timesteps) * self._settings.num_noises
        return total.view(len(images), len(captions)) / rounds

    @torch.no_grad()
    def features(self, images: Images) -> Float[Tensor, "view feature"]:
        """The VAE's latents."""
        return self._latents(images).flatten(1).cpu()

    def _latents(self, images: Images) -> Float[Tensor, "view 4 lh lw"]:
        device = self._denoiser.alphas_cumprod.device
        pixels = images.to(device)
        solid = torch.ones_like(pixels[..., :1])
        return self._codec.encode(Render(pixels, pixels, solid, solid), torch.Generator())


class ClipJudge:
    """A CLIP in transformers' layout: the cosine between picture and caption."""

    name = "clip"

    def __init__(self, model, processor, device: torch.device) -> None:  # type: ignore[no-untyped-def]
        self._model, self._processor, self._device = model.eval().to(device), processor, device

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "ClipJudge":
        """Raises ValueError naming ``clip`` where the folder holds no CLIP with safetensors weights."""
        from transformers import CLIPModel, CLIPProcessor

        if not (folder / "config.json").is_file():
            raise ValueError(f"clip: {folder} has no config.json; give a folder that CLIPModel.save_pretrained wrote")
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"clip: {folder} is not a CLIP in transformers' layout: {error}") from error
        return cls(model, processor, device)

    @torch.no_grad()
    def scores(self, images: Images, captions: Sequence[str]) -> Float[Tensor, "view caption"]:
        inputs = self._processor.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        texts = self._model.get_text_features(**inputs.to(self._device)).pooler_output
        return self.features(images) @ torch.nn.functional.normalize(texts.float(), dim=-1).cpu().T

    @torch.no_grad()
    def features(self, images: Images) -> Float[Tensor, "view feature"]:
        """CLIP's picture embeddings, of unit length."""
        pictures = [(picture * 255).round().byte().cpu().numpy() for picture in images]
        pixels = self._processor.image_processor(images=pictures, return_tensors="pt").pixel_values
        embedded = self._model.get_image_features(pixel_values=pixels.to(self._device)).pooler_output
        return torch.nn.functional.normalize(embedded.float(), dim=-1).cpu()


def distractors(prompt: str, nouns: Sequence[str], count: int, colours: Sequence[str] = COLOURS) -> tuple[str, ...]:
    """``count`` other captions, always the same for a prompt: of each three, one with another colour, one with another
    object, one with both; other objects alone where the prompt names no colour.

    Raises ValueError naming ``captions`` where the prompt names none of the objects or there are too few words.
    """
    said = words_of(prompt)
    noun = next((word for word in reversed(said) if word in nouns), None)
    if noun is None:
        raise ValueError(
            f"captions: {prompt[:100]!r} names none of {len(nouns)} known objects; give captions to compare"
        )
    colour = next((word for word in said if word in colours and word != noun), None)
    draws = seeds.generator(0, f"distractors/{prompt}", 0, 0)

    def shuffled(words: Sequence[str], avoid: str | None) -> list[str]:
        return [words[i] for i in torch.randperm(len(words), generator=draws).tolist() if words[i] != avoid]

    other_nouns, other_colours = shuffled(sorted(nouns), noun), shuffled(colours, colour) if colour else []
    kinds = [
        [_exchange(prompt, noun, colour, noun, other) for other in other_colours],
        [_exchange(prompt, noun, colour, other, colour) for other in other_nouns],
        [_exchange(prompt, noun, colour, a, b) for a, b in zip(reversed(other_nouns), other_colours)],
    ]
    mixed = [kind[place] for place in range(count) for kind in kinds if place < len(kind)]
    chosen = tuple(dict.fromkeys(mixed))[:count]
    if len(chosen) < count:
        raise ValueError(f"num_candidates: only {len(chosen)} wrong captions can be made of {len(nouns)} objects")
    return chosen


def _exchange(prompt: str, noun: str, colour: str | None, new_noun: str, new_colour: str | None) -> str:
    """The prompt with other words, and "a" or "an" as they need it."""
    text = _replace(prompt, noun, new_noun)
    if colour and new_colour:
        text = _replace(text, colour, new_colour)
    return re.sub(r"\b([Aa])n?(?= ([a-z]))", lambda m: m[1] + ("n" if m[2] in "aeiou" else ""), text)


def _replace(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{re.escape(old)}(s?)\b", lambda match: new + match[1], text, count=1, flags=re.IGNORECASE)
