"""What an object is like all around: a real asset, one glued from two fronts, or one that looks the same from anywhere.

Single views cannot tell: a blurred ball is as much a front as a back from everywhere. So all views are compared at
once, turned together about the vertical axis until they fit best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.config.evaluate import NUM_VIEWS
from raydream.evaluate.facing import Verdict, descriptors, mirrored
from raydream.evaluate.turntable import AZIMUTHS_DEG, Turntable


@dataclass(frozen=True)
class Around:
    """The flat descriptors of an object's views in the order of their azimuths, as it is and as its mirror image."""

    views: Float[Tensor, "view feature"]
    mirrored: Float[Tensor, "view feature"]

    @classmethod
    def of(cls, table: Turntable) -> "Around":
        """That of a turntable."""
        views = descriptors(table)
        return cls(views.flatten(1), mirrored(views)[-torch.arange(NUM_VIEWS) % NUM_VIEWS].flatten(1))


def fit_turned(own: Around, other: Around) -> tuple[float, float]:
    """The mean distance between the views of two objects when one of them, or its mirror image, is turned to fit best;
    and the azimuth, in degrees, at which ``own`` then has what the other has at 0.
    """
    index = torch.arange(NUM_VIEWS)
    turned = (index + index[:, None]) % NUM_VIEWS
    means = [torch.cdist(own.views, views)[index, turned].mean(1) for views in (other.views, other.mirrored)]
    mean = torch.minimum(*means)
    best = int(mean.argmin())
    return float(mean[best]), AZIMUTHS_DEG[-best % NUM_VIEWS]


def fit_same(own: Around, other: Around) -> float:
    """The mean distance of an object's views to one and the same view of another, the one that fits best."""
    return float(torch.cdist(own.views, torch.cat([other.views, other.mirrored])).mean(0).min())


def judge_around(own: Around, real: Sequence[Around], glued: Sequence[Around]) -> tuple[Verdict, float]:
    """By what fits best: "consistent" for a real asset, "janus" for one glued from two fronts, "round" for a single
    view from everywhere; and the azimuth of the front, in degrees, by the real asset that fits best.
    """
    distance, turn_deg = min(fit_turned(own, other) for other in real)
    found: dict[Verdict, float] = {
        "consistent": distance,
        "janus": min(fit_turned(own, other)[0] for other in glued),
        "round": min(fit_same(own, other) for other in real),
    }
    return min(found, key=found.__getitem__), turn_deg
