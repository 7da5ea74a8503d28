"""Which objects can be trained under which noun: told by their cards alone, before any image is read.

Where nothing is left, the error counts what each condition left, and names the setting that would change it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from raydream.assets.error import loses_colours
from raydream.assets.licences import count_licences, is_accepted, why_no_licence
from raydream.assets.nouns import COLOUR_WORDS, head_noun
from raydream.config.train import WordsConfig
from raydream.views.view_set import ObjectCard


def object_nouns(card: ObjectCard, aliases: Iterable[tuple[str, str]]) -> set[str]:
    """The nouns of an object by its first caption and its categories, each alias as the word it stands for."""
    heads = {head_noun(text) for text in (*card.captions[:1], *card.nouns)}
    canonical = dict(aliases)
    return {canonical.get(noun, noun) for noun in heads if noun}


def is_trainable(card: ObjectCard, words: WordsConfig) -> bool:
    """Whether the settings let an object be trained, whatever it is called."""
    return is_accepted(card.licence, words.licences) and (words.colour_warnings or not loses_colours(card.warnings))


def choose_nouns(cards: Sequence[ObjectCard], words: WordsConfig) -> tuple[str, ...]:
    """The nouns to train: those that are asked for, or the frequent ones of the objects that may be trained.

    Raises ValueError naming the field of ``words`` that leaves none, or ``views``.
    """
    _check_usable(cards, words)
    counts = count_nouns([card for card in cards if is_trainable(card, words)], words)
    if words.nouns:
        _check_asked(cards, counts, words)
        return words.nouns
    left_out = {*words.left_out, *COLOUR_WORDS}
    eligible = Counter({noun: count for noun, count in counts.items() if noun not in left_out})
    nouns = [noun for noun, count in eligible.most_common() if count >= words.min_assets]
    if not nouns:
        raise ValueError(_why_no_noun(cards, counts, eligible, words))
    return tuple(nouns[: words.max_nouns or None])


def count_nouns(cards: Iterable[ObjectCard], words: WordsConfig) -> Counter[str]:
    """How many objects are called by each noun; one may count for several."""
    return Counter(noun for card in cards for noun in sorted(object_nouns(card, words.aliases)))


def assign_nouns(cards: Sequence[ObjectCard], nouns: Collection[str], words: WordsConfig) -> dict[int, str]:
    """The place of each object that can be trained, with the rarest of its nouns (an armchair is no mere chair).

    ValueError as of ``choose_nouns``, or about ``views`` where a noun has no object, or nothing can be held out.
    """
    _check_usable(cards, words)
    counts = count_nouns(cards, words)
    chosen: dict[int, str] = {}
    for place, card in enumerate(cards):
        fitting = sorted(object_nouns(card, words.aliases) & set(nouns), key=lambda noun: (counts[noun], noun))
        if fitting and is_trainable(card, words):
            chosen[place] = fitting[0]
    _check_assigned(cards, nouns, Counter(chosen.values()), words)
    return chosen


def _check_usable(cards: Sequence[ObjectCard], words: WordsConfig) -> None:
    if not any(is_accepted(card.licence, words.licences) for card in cards):
        counts = count_licences([card.licence for card in cards])
        raise ValueError(why_no_licence(counts, words.licences, "words.licences"))
    usable = [card for card in cards if is_trainable(card, words)]
    if not usable:
        raise ValueError(
            f"words.colour_warnings: {_funnel(cards, words)}; render again what lost its colours, or take it as it is "
            "by --set words.colour_warnings=true"
        )
    if not any(object_nouns(card, words.aliases) for card in usable):
        raise ValueError(
            f"views: {_funnel(cards, words)}; give the assets names, captions or categories and render them again"
        )


def _check_assigned(
    cards: Sequence[ObjectCard], nouns: Collection[str], counts: Counter[str], words: WordsConfig
) -> None:
    missing = sorted(set(nouns) - set(counts))
    if missing:
        told = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more nouns" if len(missing) > 20 else "")
        raise ValueError(
            f"views: no object that may be trained is called {told} and by no rarer noun: {_funnel(cards, words)}; "
            "render some, or leave these nouns out (words.left_out; with start all its nouns are needed)"
        )
    if max(counts.values()) < 2:
        raise ValueError(
            f"views: each of {len(counts)} nouns has one object; two of a noun are needed, of which one is held out"
        )


def _check_asked(cards: Sequence[ObjectCard], counts: Counter[str], words: WordsConfig) -> None:
    rare = [noun for noun in words.nouns if counts[noun] < 2]
    if rare:
        told = ", ".join(f"{noun} ({counts[noun]})" for noun in rare)
        raise ValueError(
            f"words.nouns: fewer than 2 objects that may be trained are called {told}: {_funnel(cards, words)}; the "
            f"most frequent nouns are {_most(counts)}"
        )


def _why_no_noun(cards: Sequence[ObjectCard], counts: Counter[str], eligible: Counter[str], words: WordsConfig) -> str:
    funnel = _funnel(cards, words)
    if not eligible:
        return f"words.left_out: it leaves no noun: {funnel}; those are {_most(counts)}"
    most = eligible.most_common(1)[0][1]
    remedy = f"ask for fewer by --set words.min_assets={most}" if most > 1 else "at least 2 are needed: render more"
    return (
        f"words.min_assets: no noun has {words.min_assets} objects: {funnel}; the most frequent are {_most(eligible)}; "
        f"{remedy}"
    )


def _most(counts: Counter[str]) -> str:
    return ", ".join(f"{noun} ({count})" for noun, count in counts.most_common(5))


def _funnel(cards: Sequence[ObjectCard], words: WordsConfig) -> str:
    """How many objects each condition leaves."""
    licensed = [card for card in cards if is_accepted(card.licence, words.licences)]
    usable = [card for card in cards if is_trainable(card, words)]
    named = sum(1 for card in usable if object_nouns(card, words.aliases))
    accepted = " or ".join(words.licences)
    return (
        f"of {len(cards)} objects {len(licensed)} are {accepted}, {len(usable)} of them kept their colours, {named} of "
        "those have a noun"
    )
