"""A word-level vocabulary in CLIP's own format, so that transformers' ``CLIPTokenizer`` loads it unmodified.

CLIP's tokenizer joins characters by a ranked list of merges and marks the last of a word with ``</w>``. Here every
merge joins one character to an ending that is marked already, so at any time only a word's last two pieces can merge:
whatever the ranks, a known word becomes one token. An unknown word ends as its longest known ending after single
characters, which the text encoder learns to pass over from the rare words of captions.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_MARK = "</w>"


def vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id and the merges, shortest endings first. ValueError for a word that CLIP would cut in pieces."""
    characters = [chr(code) for code in range(33, 127)]
    endings: dict[str, tuple[str, str]] = {}
    for word in sorted(set(words)):
        # CLIP splits between letters and signs and takes digits one by one
        if not (word.isascii() and word.isalpha() and word.islower()) and not (len(word) == 1 and word.isdigit()):
            raise ValueError(f"words: {word!r} is not a word of lower-case letters")
        for start in range(len(word) - 2, -1, -1):
            endings[word[start:]] = (word[start], word[start + 1 :])
    ordered = sorted(endings, key=lambda ending: (len(ending), ending))
    merges = [(endings[ending][0], endings[ending][1] + _MARK) for ending in ordered]
    tokens = [*characters, *(character + _MARK for character in characters), *(e + _MARK for e in ordered), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def word_tokenizer(words: Iterable[str], num_tokens: int) -> CLIPTokenizer:
    """The tokenizer of a vocabulary; captions are padded to ``num_tokens`` at most."""
    tokens, merges = vocabulary(words)
    return CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=num_tokens)  # type: ignore[arg-type]


def save_tokenizer(tokenizer: CLIPTokenizer, words: Iterable[str], folder: Path) -> None:
    """Writes the tokenizer for transformers 5 (``tokenizer.json``) and older ones (``vocab.json``, ``merges.txt``)."""
    tokenizer.save_pretrained(folder)
    tokens, merges = vocabulary(words)
    (folder / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
