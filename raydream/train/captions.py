"""Captions composed of words that are true of a render: its noun, the colour it was given, the side it is seen from.

Every noun and colour is also chosen, counted and held out here, so that training and its gate speak of the same words.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import adaptive_avg_pool2d

from raydream.assets.nouns import COLOUR_WORDS, words_of
from raydream.assets.recolour import COLOURS, Palette, measure_palette
from raydream.camera import ViewBin, view_bins
from raydream.config.train import WordsConfig
from raydream.diffusion.prompts import VIEW_WORDS
from raydream.train.prior.word_choice import assign_nouns, choose_nouns, is_trainable, object_nouns
from raydream.views.view_set import ViewSet

TEMPLATES = ("a photo of {}", "a DSLR photo of {}", "a 3D model of {}", "a render of {}", "an image of {}")
_SIDES: tuple[ViewBin, ...] = ("front", "side", "back")
_PALETTE_PIXELS = 4096
_SIDE_CONTRAST = 1.5
_SHAPE_PX, _COPY_DISTANCE = 16, 0.1


@dataclass(frozen=True)
class Lexicon:
    """The words of a prior. ``held_out`` are (noun, colour) pairs that no training image may show; ``words`` are all
    that its tokenizer holds as one token.
    """

    nouns: tuple[str, ...]
    colours: tuple[str, ...]
    held_out: tuple[tuple[str, str], ...]
    aliases: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    def dumps(self) -> str:
        """The lexicon as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def loads(text: str) -> "Lexicon":
        """Reads what ``dumps`` wrote."""
        fields = json.loads(text)
        nouns, colours, words = (tuple(fields[name]) for name in ("nouns", "colours", "words"))
        held_out, aliases = (tuple((a, b) for a, b in fields[name]) for name in ("held_out", "aliases"))
        return Lexicon(nouns, colours, held_out, aliases, words)

    def allows(self, noun: str, colour: str) -> bool:
        """Whether this pair may be trained."""
        return (noun, colour) not in self.held_out


@dataclass(frozen=True)
class CaptionedObject:
    """What captions may say of one object of a view set: its noun, its natural colour word, texts of its own.

    ``has_sides`` means that front, side and back are known and look different.
    """

    index: int
    noun: str
    colour: str | None
    texts: tuple[str, ...]
    has_sides: bool


@dataclass(frozen=True)
class Draw:
    """Random numbers in [0, 1) that decide one caption, so that captions follow from a generator's state."""

    dropped: float
    template: float
    own: float
    alias: float
    colour: float
    view: float


def make_lexicon(views: ViewSet, palette: Palette, config: WordsConfig) -> Lexicon:
    """Chooses nouns, held-out pairs and vocabulary from the objects that the settings let be trained.

    Raises ValueError as ``choose_nouns`` does where there is nothing to choose from.
    """
    nouns = choose_nouns(views.objects, config)
    accepted = [index for index, card in enumerate(views.objects) if is_trainable(card, config)]
    cards = [views.objects[index] for index in accepted]
    natural: Counter[tuple[str, str]] = Counter()
    for index in accepted:
        for noun in object_nouns(views.objects[index], config.aliases):
            natural[noun, palette.word(index, 0.3) or ""] += 1
    held_out = tuple(
        (noun, colour)
        for noun in nouns
        for colour in sorted(COLOURS, key=lambda colour: (natural[noun, colour], _hash(noun, colour)))[
            : config.held_out_per_noun
        ]
    )
    aliases = tuple(pair for pair in config.aliases if pair[1] in nouns)
    texts = [text for card in cards if object_nouns(card, config.aliases) & set(nouns) for text in card.captions[:2]]
    return Lexicon(nouns, COLOURS, held_out, aliases, _vocabulary(nouns, aliases, texts))


def _vocabulary(nouns: Sequence[str], aliases: Sequence[tuple[str, str]], texts: Iterable[str]) -> tuple[str, ...]:
    """Words that captions use: nouns, colours, views and templates always, an asset's own words from 3 uses up."""
    spoken = " ".join([*TEMPLATES, *VIEW_WORDS.values(), "a an the with on in"])
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    own = {word for word, count in counts.items() if count >= 3 and len(word) > 1}
    needed = {*nouns, *(alias for alias, _ in aliases), *COLOURS, *re.findall(r"[a-z]+", spoken.lower())}
    return tuple(sorted(needed | own))


def describe(views: ViewSet, palette: Palette, lexicon: Lexicon, config: WordsConfig) -> list[CaptionedObject]:
    """The objects that can be trained, each with one noun."""
    subjects = []
    for index, noun in assign_nouns(views.objects, lexicon.nouns, config).items():
        card = views.objects[index]
        texts = tuple(text for text in card.captions[1:2] if not COLOUR_WORDS & set(words_of(text)))
        has_sides = card.front_known and looks_different_sideways(views, index)
        subjects.append(CaptionedObject(index, noun, palette.word(index), texts, has_sides))
    return subjects


def split_objects(
    subjects: Sequence[CaptionedObject], views: ViewSet, share: float
) -> tuple[list[CaptionedObject], list[CaptionedObject]]:
    """Training and held-out objects: of each noun a share, at least one, always the same ones."""
    by_noun: dict[str, list[CaptionedObject]] = {}
    for subject in subjects:
        by_noun.setdefault(subject.noun, []).append(subject)
    held_out: set[int] = set()
    for members in by_noun.values():
        ordered = sorted(members, key=lambda subject: _hash(views.objects[subject.index].uid))
        count = min(max(1, round(share * len(ordered))), len(ordered) - 1)
        held_out |= {subject.index for subject in ordered[:count]}
    return (
        [subject for subject in subjects if subject.index not in held_out],
        [subject for subject in subjects if subject.index in held_out],
    )


def split_views(num_views: int, share: float) -> tuple[list[int], list[int]]:
    """Numbers of the views to train and of those to hold out: every so many-th, so that stratified azimuths stay even.

    Raises ValueError naming ``held_out_views`` where an object has too few views for it.
    """
    if not share:
        return list(range(num_views)), []
    stride = max(2, round(1 / share))
    if num_views < stride:
        raise ValueError(
            f"held_out_views: a share of {share} needs {stride} views of each object, there are {num_views}"
        )
    held_out = list(range(stride // 2, num_views, stride))
    return [index for index in range(num_views) if index not in held_out], held_out


def most_typical(subjects: Sequence[CaptionedObject], views: ViewSet, count: int) -> list[CaptionedObject]:
    """Up to ``count`` objects of each noun: those whose silhouettes, as a mean over all views, are nearest to the
    noun's own mean. Of near copies one is taken.
    """
    index = [subject.index for subject in subjects]
    coverage = views.alpha[index].permute(0, 1, 4, 2, 3).flatten(1, 2).float().mean(1, keepdim=True) / 255
    shapes = dict(zip(index, adaptive_avg_pool2d(coverage, _SHAPE_PX).flatten(1)))
    by_noun: dict[str, list[CaptionedObject]] = {}
    for subject in subjects:
        by_noun.setdefault(subject.noun, []).append(subject)
    chosen: set[int] = set()
    for members in by_noun.values():
        mean = torch.stack([shapes[subject.index] for subject in members]).mean(0)
        ordered = sorted(members, key=lambda subject: (float((shapes[subject.index] - mean).norm()), subject.index))
        taken: list[int] = []
        for subject in ordered:
            shape = shapes[subject.index]
            if all(float((shape - shapes[other]).norm()) > _COPY_DISTANCE for other in taken):
                taken.append(subject.index)
        chosen |= set(taken[:count])
    return [subject for subject in subjects if subject.index in chosen]


def object_palette(views: ViewSet) -> Palette:
    """The main colours of all objects as they are rendered."""
    parts = [_pixels(views, index) for index in range(views.num_objects)]
    palettes = [measure_palette(rgb[None], weight[None]) for rgb, weight in parts]
    return Palette(*(torch.cat([getattr(p, name) for p in palettes]) for name in ("lab", "share", "colour")))


def _pixels(views: ViewSet, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An even choice of an object's covered pixels: albedo that is not premultiplied, and coverage."""
    rgb, alpha = views.rgb[index].reshape(-1, 3), views.alpha[index].reshape(-1)
    covered = torch.nonzero(alpha > 100)[:, 0]
    chosen = covered[torch.linspace(0, max(len(covered) - 1, 0), min(len(covered), _PALETTE_PIXELS)).long()]
    if not len(chosen):
        return torch.zeros(1, 3), torch.zeros(1)
    weight = alpha[chosen].float() / 255
    return (rgb[chosen].float() / 255 / weight[:, None]).clamp(0, 1), weight


def looks_different_sideways(views: ViewSet, index: int) -> bool:
    """Whether an object's sides differ from its front and back clearly more than each of these from its like.

    Compares how colours and coverage vary along the image's horizontal, mirrored or not: that hardly depends on the
    elevation, which the views do not share.
    """
    bins = view_bins(views.azimuth_deg[index], views.elevation_deg[index])
    image = torch.cat([views.rgb[index], views.alpha[index]], dim=-1).float()
    profile = image.sum(1) / image[..., 3].sum(dim=(1, 2))[:, None, None].clamp_min(1)
    mirrored = profile.flip(1)
    distance = torch.minimum(_spread(profile, profile), _spread(profile, mirrored))
    distance.fill_diagonal_(float("inf"))
    lengthwise = torch.tensor([side in ("front", "back") for side in bins])
    sideways = torch.tensor([side == "side" for side in bins])
    if lengthwise.sum() < 3 or sideways.sum() < 3:
        return False
    across = distance[sideways][:, lengthwise].amin(1).mean()
    along = (distance[sideways][:, sideways].amin(1).mean() + distance[lengthwise][:, lengthwise].amin(1).mean()) / 2
    return bool(across > _SIDE_CONTRAST * along)


def _spread(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cdist(first.flatten(1), second.flatten(1), p=1)


def side_of(
    subject: CaptionedObject, azimuth_deg: float, elevation_deg: float, margin_deg: float = 0.0
) -> ViewBin | None:
    """The view word that is true of a render: overhead for anything, the others where an object has sides.

    None nearer than ``margin_deg`` to an azimuth at which one side becomes the other, where neither word is true.
    """
    side = view_bins(torch.tensor([azimuth_deg]), torch.tensor([elevation_deg]))[0]
    if side == "overhead":
        return side
    is_corner = abs(abs(azimuth_deg) % 90 - 45) < margin_deg
    return side if subject.has_sides and not is_corner else None


def phrase(noun: str, colour: str | None = None, side: ViewBin | None = None) -> str:
    """ "a red chair, front view"."""
    words = f"{colour} {noun}" if colour else noun
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}{VIEW_WORDS[side] if side else ''}"


def with_other_word(caption: str, lexicon: Lexicon, which: float, other: float) -> str | None:
    """The caption with another side, colour or noun than it tells; None where it tells none.

    ``which`` of them, a side twice as often as the others, and which ``other`` word are decided by numbers in [0, 1).
    """
    sides = [VIEW_WORDS[side] for side in _SIDES]
    choices = [(word, sides) for word in sides if caption.endswith(word)] * 2
    for known in (lexicon.colours, lexicon.nouns):
        choices += [(word, list(known)) for word in re.findall(r"[a-z]+", caption) if word in known][:1]
    if not choices:
        return None
    word, alike = choices[int(which * len(choices))]
    others = [each for each in alike if each != word]
    return re.sub(rf"\b{word}\b", others[int(other * len(others))], caption, count=1) if others else None


def compose(
    subject: CaptionedObject, colour: str | None, recoloured: bool, side: ViewBin | None, draw: Draw, words: WordsConfig
) -> str:
    """The caption of one training render; empty where it is dropped for classifier-free guidance.

    A colour that was given is always told, a natural one sometimes; an asset's own text stands in where nothing was
    changed about it.
    """
    if draw.dropped < words.dropout:
        return ""
    told_side = side if draw.view < words.view_probability else None
    if draw.own < words.own_caption_probability and subject.texts and not recoloured:
        return subject.texts[0] + (VIEW_WORDS[told_side] if told_side else "")
    aliases = [alias for alias, noun in words.aliases if noun == subject.noun]
    told_noun = subject.noun
    if aliases and draw.alias < 0.25:
        told_noun = aliases[int(draw.alias / 0.25 * len(aliases))]
    told_colour = colour if recoloured or draw.colour < words.natural_colour_probability else None
    text = phrase(told_noun, told_colour)
    if draw.template < words.template_probability:
        text = TEMPLATES[int(draw.template / words.template_probability * len(TEMPLATES))].format(text)
    return text + (VIEW_WORDS[told_side] if told_side else "")


def _hash(*words: str) -> str:
    return hashlib.blake2b("/".join(words).encode(), digest_size=8).hexdigest()
