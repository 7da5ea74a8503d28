"""Colour words of renders, and renders in other colours: both in Oklab (Ottosson 2020), whose hues are what we see.

Colours are display (sRGB) albedo in [0, 1], not premultiplied. Oklab's lightness lies in [0, 1], its chroma below 0.33.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Lightness, chroma and hue in degrees of each word's best example. There is no "orange" (also a fruit) and no word
# between green and blue or for light browns: renders of those colours are captioned without one.
PROTOTYPES: dict[str, tuple[float, float, float]] = {
    "red": (0.55, 0.19, 27.0),
    "yellow": (0.86, 0.16, 100.0),
    "green": (0.62, 0.16, 143.0),
    "blue": (0.52, 0.17, 258.0),
    "purple": (0.47, 0.17, 308.0),
    "pink": (0.77, 0.13, 355.0),
    "brown": (0.42, 0.08, 55.0),
    "white": (0.94, 0.0, 0.0),
    "grey": (0.60, 0.0, 0.0),
    "black": (0.20, 0.0, 0.0),
}
COLOURS = tuple(PROTOTYPES)
_UNNAMED = ("tan", "orange", "teal", "olive")
CLASSES = (*COLOURS, *_UNNAMED)
_ACHROMATIC = 0.04
_JITTER = (0.03, 0.12, 5.0)  # lightness, share of chroma, degrees of hue
_CLUSTER_RADIUS = 0.12

_LMS = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=torch.float64,
)
_LAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=torch.float64,
)
_FROM_LAB, _FROM_LMS = torch.linalg.inv(_LAB), torch.linalg.inv(_LMS)


@dataclass(frozen=True)
class Palette:
    """The main colour of each object: its Oklab value, its share of the surface seen, and its class (an index)."""

    lab: Float[Tensor, "object 3"]
    share: Float[Tensor, " object"]
    colour: Int[Tensor, " object"]

    def word(self, index: int, min_share: float = 0.5) -> str | None:
        """The colour word that a caption may use; None where the colour has none or covers too little."""
        colour = int(self.colour[index])
        return COLOURS[colour] if colour < len(COLOURS) and float(self.share[index]) >= min_share else None


def oklab_from_srgb(rgb: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
    """Display colours to Oklab."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    lms = (linear @ _LMS.T.to(rgb)).clamp_min(0) ** (1 / 3)
    return lms @ _LAB.T.to(rgb)


def srgb_from_oklab(lab: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
    """Oklab to display colours; what no display can show is clipped."""
    lms = lab @ _FROM_LAB.T.to(lab)
    linear = ((lms * lms * lms) @ _FROM_LMS.T.to(lab)).clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(1e-9) ** (1 / 2.4) - 0.055)


def colour_classes(lab: Float[Tensor, "*shape 3"]) -> Int[Tensor, "*shape"]:
    """The index in ``CLASSES`` of each colour: every colour has exactly one."""
    lightness, chroma = lab[..., 0], lab[..., 1:].norm(dim=-1)
    hue = torch.rad2deg(torch.atan2(lab[..., 2], lab[..., 1])) % 360
    classes = torch.full_like(lightness, CLASSES.index("purple"), dtype=torch.long)

    def name(where: Bool[Tensor, "..."], word: str) -> None:
        classes[where] = CLASSES.index(word)

    warm = (hue >= 40) & (hue < 97)
    name((hue >= 225) & (hue < 285), "blue")
    name((hue >= 172) & (hue < 225), "teal")
    name((hue >= 118) & (hue < 172), "green")
    name((hue >= 97) & (hue < 118) & (lightness < 0.7), "olive")
    name((hue >= 84) & (hue < 118) & (lightness >= 0.7), "yellow")
    name((hue >= 40) & (hue < 84) & (lightness >= 0.58), "orange")
    name(warm & (lightness >= 0.58) & (chroma < 0.1), "tan")
    name(warm & (lightness < 0.58), "brown")
    rosy = (hue < 40) | (hue >= 335)
    name(rosy, "red")
    name(rosy & (lightness < 0.5) & (chroma < 0.08) & (hue < 40), "brown")
    name(rosy & (lightness >= 0.68), "pink")
    name((hue >= 318) & (lightness >= 0.62), "pink")
    grey = (chroma < _ACHROMATIC) | (lightness < 0.15)
    name(grey, "grey")
    name(grey & (lightness >= 0.86), "white")
    name(grey & (lightness < 0.34), "black")
    return classes


def measure_palette(rgb: Float[Tensor, "object pixel 3"], weight: Float[Tensor, "object pixel"]) -> Palette:
    """The main colours of objects from their pixels' albedo, each with how much of it is the object."""
    lab = oklab_from_srgb(rgb)
    classes = colour_classes(lab)
    shares = torch.zeros(*weight.shape[:1], len(CLASSES)).scatter_add_(1, classes, weight)
    shares = shares / weight.sum(1, keepdim=True).clamp_min(1e-6)
    share, colour = shares.max(1)
    member = weight * (classes == colour[:, None])
    mean = (lab * member[..., None]).sum(1) / member.sum(1).clamp_min(1e-6)[:, None]
    return Palette(mean, share, colour)


def draw_targets(colour: Int[Tensor, " view"], generator: torch.Generator) -> Float[Tensor, "view 3"]:
    """An Oklab colour of each word (an index in ``COLOURS``), a little different every time."""
    prototypes = torch.tensor(list(PROTOTYPES.values()))[colour]
    offset = 2 * torch.rand(len(colour), 3, generator=generator) - 1
    lightness = prototypes[:, 0] + _JITTER[0] * offset[:, 0]
    chroma = prototypes[:, 1] * (1 + _JITTER[1] * offset[:, 1])
    hue = torch.deg2rad(prototypes[:, 2] + _JITTER[2] * offset[:, 2])
    return torch.stack([lightness, chroma * hue.cos(), chroma * hue.sin()], dim=-1)


def recolour(
    rgb: Float[Tensor, "pixel 3"],
    main: Float[Tensor, "pixel 3"],
    target: Float[Tensor, "pixel 3"],
    whole: Bool[Tensor, " pixel"],
) -> Float[Tensor, "pixel 3"]:
    """Pixels with their object's main Oklab colour turned into the target colour.

    Where ``whole`` everything takes the target's hue and keeps a part of its own contrast; elsewhere only what is near
    the main colour changes (a trunk stays brown under red leaves).
    """
    difference = oklab_from_srgb(rgb) - main
    distance = (difference * difference.new_tensor([0.35, 1.0, 1.0])).square().sum(-1, keepdim=True)
    near = torch.exp(-distance / (2 * _CLUSTER_RADIUS**2))
    part = main + difference + near * (target - main)
    tinted = target + difference * difference.new_tensor([0.6, 0.2, 0.2])
    return srgb_from_oklab(torch.where(whole[:, None], tinted, part))
