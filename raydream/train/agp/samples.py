"""What the aligned geometric prior is trained on: rendered canonical coordinate maps as latents, cameras, captions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from raydream.assets.nouns import head_noun
from raydream.assets.recolour import COLOURS
from raydream.camera import view_bins
from raydream.config.agp import AgpDataConfig
from raydream.config.render import ViewConfig
from raydream.config.train import ALIASES
from raydream.coordinates import encode_ccm
from raydream.diffusion.prompts import VIEW_WORDS
from raydream.train.captions import phrase
from raydream.train.prior.word_choice import object_nouns
from raydream.views.dataset import Column, check_shards, iterate_cards, iterate_views, open_job
from raydream.views.schema import decode_image
from raydream.views.view_set import ObjectCard

_TOLD = ("uid", "captions", "nouns", "licence", "front_axis")  # of its colours it needs to know nothing
_CAMERA = ("c2w", "fov_y_deg", "azimuth_deg", "elevation_deg")
COLUMNS = (*_TOLD, *_CAMERA, "ccm", "alpha")
_TENSORS = ("latents", *_CAMERA)
# Scene units for one unit of the rendered object: a particle's object lies in [-1, 1]^3.
SCENE_UNITS = {"longest_side": 2.0, "sphere": 1.0}


@dataclass(frozen=True)
class Samples:
    """Some views: maps coded by ``encode_ccm``, cameras in scene units, and what is known of each one's object."""

    cards: tuple[ObjectCard, ...]
    latents: Float[Tensor, "view 4 h w"]
    c2w: Float[Tensor, "view 4 4"]
    fov_y_deg: Float[Tensor, " view"]
    azimuth_deg: Float[Tensor, " view"]
    elevation_deg: Float[Tensor, " view"]

    @classmethod
    def concatenate(cls, parts: Sequence["Samples"]) -> "Samples":
        """All views of all parts, in order."""
        tensors = (torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS)
        return cls(tuple(card for part in parts for card in part.cards), *tensors)

    def select(self, index: Sequence[int]) -> "Samples":
        """Some of the views, in the given order; latents in float32."""
        rows = torch.tensor(list(index), dtype=torch.long)
        others = (getattr(self, name)[rows] for name in _TENSORS[1:])
        return Samples(tuple(self.cards[i] for i in index), self.latents[rows].float(), *others)


@runtime_checkable
class SampleSource(Protocol):
    """Where batches come from: memory, or a stream."""

    def samples(self, size: int, generator: torch.Generator) -> Samples:
        """The next ``size`` views for a worker; from memory they follow from the generator alone."""
        ...

    def nouns(self) -> tuple[str, ...]:
        """Nouns of the objects, the most frequent first."""
        ...


def check_views(uri: str, latent_px: int) -> ViewConfig:
    """The settings of a rendering job whose views can be trained on; ValueError naming ``views`` and the remedy."""
    if PurePath(uri).suffix == ".zip":
        raise ValueError(f"views: {uri} is a packed set of colours; give the folder of jobs/render_ccm.py")
    _, plan, config = open_job(uri)
    views = config.views
    if not plan.num_shards:
        raise ValueError(f"views: the rendering job in {uri} has no objects")
    missing = {"ccm", "alpha"} - set(views.images)
    if missing:
        raise ValueError(
            f"views: {uri} was rendered without {' and '.join(sorted(missing))}; render it again with "
            """jobs/render_ccm.py --set 'views.images=["alpha","ccm"]'"""
        )
    if views.image_px % latent_px:
        raise ValueError(
            f"views: {uri} has images of {views.image_px} px, no multiple of this prior's latent ({latent_px}); "
            f"render with --set views.image_px={latent_px * 2}"
        )
    check_shards(uri, COLUMNS)
    return views


def check_kept(uri: str, config: AgpDataConfig) -> None:
    """ValueError about ``data`` where the settings leave no object of a rendering job; no image is read."""
    if not config.nouns and not config.known_fronts_only:
        return
    num_objects, counts = 0, Counter[str]()
    for rows in iterate_cards(uri, _TOLD):
        cards = [ObjectCard.of_row(row) for row in rows]
        if any(kept(card, config) for card in cards):
            return
        num_objects += len(cards)
        counts.update(noun for card in cards for noun in sorted(object_nouns(card, ALIASES)))
    most = ", ".join(f"{noun} ({count})" for noun, count in counts.most_common(5)) or "none: they have no captions"
    fronts = " with a known front" if config.known_fronts_only else ""
    named = f" called {', '.join(config.nouns)}" if config.nouns else ""
    raise ValueError(
        f"data.nouns, data.known_fronts_only: none of the {num_objects} objects in {uri} is one{named}{fronts}; the "
        f"most frequent nouns are {most}"
    )


def latents_of(
    ccm: Float[Tensor, "view h w 3"], alpha: Float[Tensor, "view h w 1"], latent_px: int
) -> Float[Tensor, "view 4 lh lw"]:
    """Latents of maps as the renderer stores them (means over the object alone, with its coverage), made smaller.

    Coordinates are averaged by coverage, so that a silhouette's pixels keep the object's coordinates.
    """
    factor = ccm.shape[1] // latent_px
    weighted = torch.cat([ccm * alpha, alpha], dim=-1).permute(0, 3, 1, 2)
    small = F.avg_pool2d(weighted, factor).permute(0, 2, 3, 1)
    return encode_ccm(small[..., :3], small[..., 3:])


def samples_of(rows: Mapping[str, Column], views: ViewConfig, latent_px: int) -> Samples:
    """Rows of the Parquet shards, columns ``COLUMNS``, as samples."""
    images = {kind: torch.from_numpy(decode_image(kind, np.asarray(rows[kind]))) for kind in ("ccm", "alpha")}
    c2w = torch.from_numpy(np.array(rows["c2w"], np.float32))
    c2w[:, :3, 3] *= SCENE_UNITS[views.normalise]
    fov, azimuth, elevation = (torch.from_numpy(np.array(rows[name], np.float32)) for name in _CAMERA[1:])
    cards = tuple(ObjectCard.of_row(dict(zip(_TOLD, row))) for row in zip(*(rows[name] for name in _TOLD)))
    return Samples(cards, latents_of(images["ccm"], images["alpha"], latent_px), c2w, fov, azimuth, elevation)


class MemorySamples:
    """All views in memory, as float16 latents: 2 KiB a view at 16 px, 32 KiB at 64. Every draw follows from its
    generator, so that a resumed training sees what an uninterrupted one sees.
    """

    def __init__(self, views: Samples, config: AgpDataConfig) -> None:
        wanted = set(config.nouns)
        groups: dict[str, list[int]] = {}
        for place, card in enumerate(views.cards):
            if kept(card, config):
                groups.setdefault(card.uid, []).append(place)
        if not groups:
            raise ValueError("data.nouns, data.known_fronts_only: no object in the views is left; ask for others")
        self._views, self._groups = views, list(groups.values())
        self._kinds = [noun_of(views.cards[group[0]], wanted) for group in self._groups]
        counts = Counter(self._kinds)
        # each noun in proportion to the root of its number of objects, as the prior itself was trained
        self._weights = torch.tensor([counts[kind] ** -0.5 for kind in self._kinds])

    @classmethod
    def read(cls, uri: str, latent_px: int, config: AgpDataConfig) -> "MemorySamples":
        """Reads all shards; ValueError naming ``views`` where they cannot be trained on."""
        views = check_views(uri, latent_px)
        parts = []
        for rows in iterate_views(uri, COLUMNS):
            part = samples_of(rows, views, latent_px)
            parts.append(replace(part, latents=part.latents.half()))
        if not parts:
            raise ValueError(f"views: no asset gave any in {uri}")
        return cls(Samples.concatenate(parts), config)

    def samples(self, size: int, generator: torch.Generator) -> Samples:
        """Any view of any object."""
        objects = torch.multinomial(self._weights, size, replacement=True, generator=generator).tolist()
        chance = torch.rand(size, generator=generator).tolist()
        groups = [self._groups[index] for index in objects]
        return self._views.select([group[int(share * len(group))] for group, share in zip(groups, chance)])

    def nouns(self) -> tuple[str, ...]:
        """Nouns of the objects, the most frequent first."""
        return tuple(noun for noun, _ in Counter(self._kinds).most_common() if noun)


def draw_captions(samples: Samples, config: AgpDataConfig, generator: torch.Generator) -> list[str]:
    """A caption for each view: original or augmented, with view words or not; empty where it is dropped."""
    chance = torch.rand(len(samples.cards), 6, generator=generator).tolist()
    sides = view_bins(samples.azimuth_deg, samples.elevation_deg)
    wanted = set(config.nouns)
    captions = []
    for card, side, (dropped, original, by_noun, which, colour, view) in zip(samples.cards, sides, chance):
        if dropped < config.text_dropout or not card.captions:
            captions.append("")
            continue
        noun, others = noun_of(card, wanted), card.captions[1:] or card.captions
        if original < config.original_probability:
            text = card.captions[0]
        elif noun and by_noun < config.noun_probability:
            text = phrase(noun, COLOURS[int(which * len(COLOURS))] if colour < 0.5 else None)
        else:
            text = others[int(which * len(others))]
        told = card.front_known and view < config.view_word_probability
        captions.append(text + VIEW_WORDS[side] if told else text)
    return captions


def camera_weights(size: int, config: AgpDataConfig, generator: torch.Generator) -> Float[Tensor, " view"]:
    """0 where the camera is dropped, else 1."""
    return (torch.rand(size, generator=generator) >= config.camera_dropout).float()


def kept(card: ObjectCard, config: AgpDataConfig) -> bool:
    """Whether an object is trained on."""
    return (card.front_known or not config.known_fronts_only) and (
        not config.nouns or not set(config.nouns).isdisjoint(object_nouns(card, ALIASES))
    )


def noun_of(card: ObjectCard, wanted: set[str]) -> str:
    """One word for an object: one that was asked for, else its caption's own; empty where there is none."""
    named = sorted(object_nouns(card, ALIASES) & wanted)
    return named[0] if named else (head_noun(card.captions[0]) or "" if card.captions else "")
