"""Text embeddings of a run, computed once: prompt, negative prompt, the prompt from each side, perp-neg's pairs.

A prompt is data: it is tokenised and used as a dictionary key, never as a path or a format string.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.camera import ViewBin, view_bins, wrap_degrees
from raydream.config.branches import BranchConfig
from raydream.device import send
from raydream.diffusion import layout
from raydream.diffusion.prompts import VIEW_WORDS, bank_prompts, load_tokenizer, max_tokens
from raydream.types import PerView

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class PerpNegTexts:
    """What ``guidance.perp_neg`` needs for each view: a positive text between two sides, two texts to leave."""

    positive: Float[Tensor, "view token width"]
    negatives: Float[Tensor, "2 view token width"]
    weights: Float[Tensor, "2 view"]


def load_text_encoder(folder: Path, device: torch.device) -> "tuple[CLIPTokenizer, CLIPTextModel, int]":
    """A prior's tokenizer, its frozen text encoder in float32, and the number of tokens that this reads."""
    from transformers import CLIPTextModel
    from transformers.utils import logging

    variant = layout.weights_variant(folder, "text_encoder")
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # for so small a part it is but noise in a log
    try:
        encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", variant=variant, dtype=torch.float32, local_files_only=True
        )
    finally:
        if had_bar:
            logging.enable_progress_bar()
    encoder.eval().requires_grad_(False).to(device)  # type: ignore[arg-type]
    return load_tokenizer(folder), encoder, max_tokens(folder)


def encode_texts(
    tokenizer: "CLIPTokenizer", encoder: "CLIPTextModel", texts: Sequence[str], num_tokens: int
) -> Float[Tensor, "view token width"]:
    """The text encoder's last hidden states; what is too long is cut. Differentiable by the encoder."""
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
    ).input_ids
    return encoder(tokens.to(encoder.device)).last_hidden_state


@torch.no_grad()
def encode_prompts(
    folder: Path, prompts: Sequence[str], device: torch.device
) -> dict[str, Float[Tensor, "token width"]]:
    """The prior's own embedding of each prompt, float32 on ``device``; the text encoder is gone when this returns.

    Raises ``ValueError`` about ``prompt`` where one is longer than the encoder reads, instead of silently losing its
    end, which is where the view words stand.
    """
    tokenizer, encoder, num_tokens = load_text_encoder(folder, device)
    embeddings: dict[str, Tensor] = {}
    for prompt in dict.fromkeys(prompts):
        excess = len(tokenizer(prompt).input_ids) - num_tokens
        if excess > 0:
            raise ValueError(
                f"prompt: {excess} tokens too long for this prior ({num_tokens} at most): {prompt[:60]!r}..."
            )
        embeddings[prompt] = encode_texts(tokenizer, encoder, [prompt], num_tokens)[0]
    return embeddings


class TextBank:
    """Cached embeddings, looked up by prompt or by where a view stands."""

    def __init__(
        self,
        embeddings: Mapping[str, Float[Tensor, "token width"]],
        prompt: str,
        negative_prompt: str,
        branch: BranchConfig,
    ) -> None:
        self._embeddings = dict(embeddings)
        self._prompt, self._negative_prompt, self._branch = prompt, negative_prompt, branch
        missing = [text for text in bank_prompts(prompt, negative_prompt) if text not in self._embeddings]
        assert not missing, f"no embedding of {missing}"

    def embedding(self, prompt: str) -> Float[Tensor, "token width"]:
        """The embedding of a prompt that the bank was made with; ``KeyError`` for any other."""
        return self._embeddings[prompt]

    def prompt_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        """The prompt without view words, for each view: what the learned reference is told (ProlificDreamer)."""
        return self.embedding(self._prompt).expand(num_views, -1, -1)

    def negative_embeddings(self, num_views: int) -> Float[Tensor, "view token width"]:
        """The negative prompt, or the empty text that stands for "unconditional", for each view."""
        return self.embedding(self._negative_prompt).expand(num_views, -1, -1)

    def view_embeddings(self, azimuth_deg: PerView, elevation_deg: PerView) -> Float[Tensor, "view token width"]:
        """The prompt as seen from each view: with its view words, or without where the run does not want them."""
        branch = self._branch
        if not branch.view_dependent_prompts:
            return self.prompt_embeddings(len(azimuth_deg))
        bins = view_bins(azimuth_deg, elevation_deg, branch.front_deg, branch.back_deg, branch.overhead_deg)
        return torch.stack([self._side(side) for side in bins])

    def perp_neg_texts(self, azimuth_deg: PerView, elevation_deg: PerView) -> PerpNegTexts:
        """The three texts of Perp-Neg for each view, by ``perp_neg_pairs``; from overhead nothing is pushed away."""
        positives, negatives, weights = [], [], []
        for azimuth, elevation in zip(wrap_degrees(azimuth_deg).abs().tolist(), elevation_deg.tolist()):
            (nearer, farther, share), pushed = perp_neg_pairs(azimuth)
            if elevation > self._branch.overhead_deg:
                nearer = farther = "overhead"
                pushed = {side: 0.0 for side in pushed}
            positives.append(share * self._side(nearer) + (1 - share) * self._side(farther))
            negatives.append(torch.stack([self._side(side) for side in pushed]))
            weights.append(list(pushed.values()))
        positive = torch.stack(positives)
        pushes = send(torch.tensor(weights, dtype=positive.dtype).T.contiguous(), positive.device)
        return PerpNegTexts(positive, torch.stack(negatives, dim=1), pushes)

    def _side(self, side: ViewBin) -> Float[Tensor, "token width"]:
        return self.embedding(self._prompt + VIEW_WORDS[side])


def perp_neg_pairs(azimuth_deg: float) -> tuple[tuple[ViewBin, ViewBin, float], dict[ViewBin, float]]:
    """Between which sides a view at 0..180 degrees stands, and the (not positive) weights of the sides it is not.

    The first part is (nearer to the front, farther from it, share of the first). From 0 to 90 degrees both of these are
    negatives, each with a weight that vanishes on its own side; from 90 to 180 side and front are.
    (arXiv 2304.04968, section 4, in threestudio's numbers.)
    """
    if azimuth_deg < 90:
        share = 1 - azimuth_deg / 90
        return ("front", "side", share), {"front": -_decay(4.0, -2.426, share), "side": -_decay(4.0, -2.426, 1 - share)}
    share = 2 - azimuth_deg / 90
    return ("side", "back", share), {"side": -_decay(1.0, -0.606, share), "front": -_decay(1.0, 0.967, share)}


def _decay(height: float, offset: float, share: float) -> float:
    return height * math.exp(-0.5 * share) + offset
