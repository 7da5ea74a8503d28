"""Embeddings of captions by a prior's own text encoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from raydream.diffusion.text import encode_texts, load_text_encoder

_MOST_CACHED_BYTES = 256 * 2**20


class CachedTexts:
    """Encodes captions as the prior was trained with them, by its frozen encoder. Repeated ones are remembered."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, num_tokens: int) -> None:
        self._tokenizer, self._encoder, self._num_tokens = tokenizer, encoder, num_tokens
        self.device = encoder.device
        self._known: dict[str, Tensor] = {}
        self._most = max(64, _MOST_CACHED_BYTES // (4 * self._num_tokens * encoder.config.hidden_size))

    @classmethod
    def load(cls, prior: Path, device: torch.device) -> "CachedTexts":
        """The encoder of a prior's folder, in float32."""
        return cls(*load_text_encoder(prior, device))

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Float[Tensor, "view token width"]:
        """The encoder's last hidden states, one for each caption; "" is the unconditional text."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if len(self._known) + len(new) > self._most:
            self._known.clear()
            new = list(dict.fromkeys(captions))
        if new:
            states = encode_texts(self._tokenizer, self._encoder, new, self._num_tokens)
            self._known |= dict(zip(new, states))
        return torch.stack([self._known[caption] for caption in captions])
