"""Training images and their captions, made anew at every step from a view set: other colours, light, grey, side."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raydream import seeds
from raydream.assets.recolour import COLOURS, Palette, draw_targets, recolour
from raydream.config.train import LookConfig, WordsConfig
from raydream.train.captions import CaptionedObject, Draw, Lexicon, compose, side_of
from raydream.views.view_set import ViewSet


@dataclass(frozen=True)
class Shot:
    """One training image before it is finished: which view of which subject, and the colour it is given, if any."""

    subject: int
    view: int
    colour: str | None
    recoloured: bool


@dataclass(frozen=True)
class Batch:
    """Images in [-1, 1], their captions, and what they were made of."""

    images: Float[Tensor, "view 3 h w"]
    captions: tuple[str, ...]
    shots: tuple[Shot, ...]


class BatchMaker:
    """Draws batches of some subjects of a view set from some of their ``angles``, numbers of views; each noun in
    proportion to the root of its number of assets. The same (role, index, step) is always the same batch.
    """

    def __init__(
        self,
        views: ViewSet,
        subjects: Sequence[CaptionedObject],
        angles: Sequence[int],
        palette: Palette,
        lexicon: Lexicon,
        look: LookConfig,
        words: WordsConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.subjects, self.lexicon, self.look, self.words, self.seed = tuple(subjects), lexicon, look, words, seed
        index, angle = torch.tensor([subject.index for subject in subjects]), torch.tensor(list(angles))
        counts = Counter(subject.noun for subject in subjects)
        self.weights = torch.tensor([counts[subject.noun] ** -0.5 for subject in subjects])
        pixels = torch.empty(len(index), len(angle), *views.rgb.shape[2:4], 5, dtype=torch.uint8)
        for place, number in enumerate(index.tolist()):  # a whole library's views are not copied twice
            for channels, part in ((slice(3), views.rgb), (slice(3, 4), views.alpha), (slice(4, 5), views.shade)):
                pixels[place, ..., channels] = part[number, angle]
        self.pixels = pixels.to(device)  # albedo 3, alpha 1 and shade 1 as bytes
        self.azimuth_deg, self.elevation_deg = (
            part[index][:, angle] for part in (views.azimuth_deg, views.elevation_deg)
        )
        self.palette = Palette(palette.lab[index], palette.share[index], palette.colour[index])

    def batch(self, size: int, role: str, index: int, step: int) -> Batch:
        """A training batch: any view of any subject, recoloured or not."""
        generator = seeds.generator(self.seed, role, index, step)
        subject = torch.multinomial(self.weights, size, replacement=True, generator=generator).tolist()
        view = torch.randint(self.pixels.shape[1], (size,), generator=generator).tolist()
        chance = torch.rand(size, 8, generator=generator).tolist()
        shots = [self._shot(s, v, row[6], row[7]) for s, v, row in zip(subject, view, chance)]
        captions = tuple(self._caption(shot, Draw(*row[:6])) for shot, row in zip(shots, chance))
        return Batch(self.render(shots, generator), captions, tuple(shots))

    def render(self, shots: Sequence[Shot], generator: torch.Generator) -> Float[Tensor, "view 3 h w"]:
        """The images of given shots; colours' shades, light, background and mirroring are drawn."""
        subject = torch.tensor([shot.subject for shot in shots])
        view = torch.tensor([shot.view for shot in shots])
        colour = torch.tensor([COLOURS.index(shot.colour) if shot.colour else 0 for shot in shots])
        changed = torch.tensor([shot.recoloured for shot in shots])
        # what has no main colour, or little of it, takes the new colour as a whole
        whole = (torch.rand(len(shots), generator=generator) < 0.5) | (self.palette.share[subject] < 0.55)
        target = draw_targets(colour, generator)
        chance = torch.rand(len(shots), 3, generator=generator)
        device = self.pixels.device
        pixels = self.pixels[subject.to(device), view.to(device)].float() / 255
        premultiplied, alpha, shade = pixels.split([3, 1, 1], dim=-1)
        rgb = (premultiplied / alpha.clamp_min(1 / 255)).clamp(0, 1)
        place = (changed.to(device)[:, None, None] & (alpha[..., 0] > 0)).nonzero(as_tuple=True)
        main, target, whole = (each.to(device)[place[0]] for each in (self.palette.lab[subject], target, whole))
        rgb[place] = recolour(rgb[place], main, target, whole)
        ambient, grey = (
            (low + (high - low) * chance[:, i]).to(device)[:, None, None, None]
            for i, (low, high) in enumerate((self.look.ambient, self.look.background))
        )
        images = rgb * (ambient + (1 - ambient) * shade) * alpha + grey * (1 - alpha)
        if self.look.flip:
            mirrored = (chance[:, 2] < 0.5).to(device)[:, None, None, None]
            images = torch.where(mirrored, images.flip(2), images)
        return images.permute(0, 3, 1, 2).contiguous() * 2 - 1

    def _shot(self, index: int, view: int, change: float, which: float) -> Shot:
        subject = self.subjects[index]
        natural = subject.colour
        is_allowed = natural is None or self.lexicon.allows(subject.noun, natural)
        if is_allowed and change >= self.look.recolour_probability:
            return Shot(index, view, natural, recoloured=False)
        colours = [colour for colour in self.lexicon.colours if self.lexicon.allows(subject.noun, colour)]
        return Shot(index, view, colours[int(which * len(colours))], recoloured=True)

    def _caption(self, shot: Shot, draw: Draw) -> str:
        subject = self.subjects[shot.subject]
        angles = float(self.azimuth_deg[shot.subject, shot.view]), float(self.elevation_deg[shot.subject, shot.view])
        side = side_of(subject, *angles, self.words.side_margin_deg)
        return compose(subject, shot.colour, shot.recoloured, side, draw, self.words)
