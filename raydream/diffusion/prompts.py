"""The texts that a prior is told in a run, and whether it can read them to their ends; no torch."""

import json
import threading
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raydream.diffusion.weight_files import file_stamps

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_LOCK = threading.Lock()
VIEW_WORDS: dict[Literal["front", "side", "back", "overhead"], str] = {
    "front": ", front view",
    "side": ", side view",
    "back": ", back view",
    "overhead": ", overhead view",
}


def bank_prompts(prompt: str, negative_prompt: str) -> list[str]:
    """Every text that a run's ``TextBank`` holds."""
    return [prompt, negative_prompt, *(prompt + words for words in VIEW_WORDS.values())]


def check_lengths(folder: Path, prompt: str, negative_prompt: str) -> None:
    """Raises ``ValueError`` about ``prompt`` or ``negative_prompt`` where it, or it with view words, is longer than the
    prior in this folder reads: its end, where the view words stand, would be lost in silence.
    """
    most = max_tokens(folder)
    for field, text, told in (
        ("prompt", prompt, bank_prompts(prompt, "")),
        ("negative_prompt", negative_prompt, [negative_prompt]),
    ):
        excess = max(count_tokens(folder, words) for words in told) - most
        if excess > 0:
            words = " with the view words that are added to it" if field == "prompt" else ""
            raise ValueError(
                f"{field}: {excess} tokens too long for this prior, which reads {most}{words}; shorten {text[:60]!r}"
            )


def count_tokens(folder: Path, text: str) -> int:
    """Of a text with its start and end, by the tokenizer of the prior in a folder."""
    tokenizer = _kept(folder, file_stamps(folder / "tokenizer"))
    with _LOCK:  # a tokenizer is for one thread at a time
        return len(tokenizer(text, verbose=False).input_ids)


def max_tokens(folder: Path) -> int:
    """How many tokens the prior in a folder reads."""
    return min(
        _kept(folder, file_stamps(folder / "tokenizer")).model_max_length,
        _text_number(folder, "max_position_embeddings"),
    )


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """A prior's tokenizer; ``ValueError`` about ``prior`` where its files cannot be read or are another encoder's."""
    from transformers import CLIPTokenizer  # takes seconds, and brings no torch

    path = folder / "tokenizer"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes of another library's parser
        raise ValueError(f"prior: {path} cannot be read ({type(error).__name__}: {error})") from error
    num_words, most = len(tokenizer), _text_number(folder, "vocab_size")
    if not 2 < num_words <= most:  # without its vocabulary there are only the marks of start and end
        raise ValueError(
            f"prior: {path} has {num_words} words, its text encoder {most}; the download may be incomplete"
        )
    return tokenizer


@lru_cache(maxsize=8)
def _kept(folder: Path, _stamps: tuple[tuple[str, int, int], ...]) -> "CLIPTokenizer":
    return load_tokenizer(folder)


def _text_number(folder: Path, name: str) -> int:
    """A number of the text encoder's settings, which ``priors.find.check_prior`` has found there."""
    return int(json.loads((folder / "text_encoder/config.json").read_text(encoding="utf-8"))[name])
