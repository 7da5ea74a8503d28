"""Wrong captions that a right one must win against: the prompt with its object or its colour exchanged."""

import re
from collections.abc import Sequence

import torch

from raydream.assets.recolour import COLOURS
from raydream.seeds import generator
from raydream.train.captions import words_of


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
    draws = generator(0, f"distractors/{prompt}", 0, 0)

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
