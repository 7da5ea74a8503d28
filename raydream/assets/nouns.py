"""What a short English phrase is about: its words in the singular, its object, its colours."""

import re

COLOUR_WORDS = frozenset(
    "red blue yellow green purple white orange black pink teal brown grey gray tan golden silver violet".split()  # noqa: SIM905
)
# A phrase's object is the last word before the first of these.
_CLAUSE_WORDS = frozenset(
    "with of on in without and from for at by near over under wearing holding covered covering made shaped".split()  # noqa: SIM905
) | {"spilling", "like", "or", "that", "while"}
# "a snow covered tree" is about the tree, "a man covering the eyes" about the man.
_ADJECTIVES = frozenset({"covered", "made", "shaped"})
_COMPOUNDS = {("hot", "dog"): "hotdog", ("television", "set"): "television", ("fire", "place"): "fireplace"}


def words_of(text: str) -> list[str]:
    """Lower-case words, in the singular where a plain English plural is at hand."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    others = ("ss", "us", "is")
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(others) else word for word in words]


def head_noun(text: str) -> str | None:
    """The object that a phrase is about: the last word of its first clause, compounds as one word."""
    words = words_of(re.split(r"[,.;:(]", text)[0])
    clause: list[str] = []
    for word, following in zip(words, [*words[1:], "of"]):
        is_adjective = word in _ADJECTIVES and following not in _CLAUSE_WORDS
        if word in _CLAUSE_WORDS and clause and not is_adjective:
            break
        clause.append(word)
    if not clause:
        return None
    return _COMPOUNDS.get((clause[-2], clause[-1]), clause[-1]) if len(clause) > 1 else clause[-1]
