"""Does an object have one front, or is there another on its back (the Janus problem)?

Judges say for each view how much more it is like a front than like a back. What follows from twelve such numbers is
decided here, the same for each judge; what a judge is worth is measured with the same decision on real assets and on
assets glued from two fronts. But single views cannot tell all: a blurred ball is as much a front as a back from
everywhere. So ``judge_around`` compares all views at once, turned together about the vertical axis until they fit best.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from raydream.camera import view_bins
from raydream.config.evaluate import NUM_VIEWS
from raydream.evaluate.turntable import AZIMUTHS_DEG, Turntable

Verdict = Literal["consistent", "janus", "round"]
MIN_REFERENCES = 4
_POOLED_PX = 16
_TINY = 1e-9


@dataclass(frozen=True)
class Facing:
    """What a judge says of an object: its front stands at ``turn_deg``; ``front`` and ``back`` are how front-like it is
    there and opposite (above 0: more like a front than like a back). A back that is like a front is a Janus face.
    """

    judge: str
    verdict: Verdict
    turn_deg: float
    front: float
    back: float
    frontal_views: float


@dataclass(frozen=True)
class JudgeCheck:
    """What a judge said of the ground truth: the share of real assets called consistent, of glued ones called
    otherwise.

    ``janus_on_glued`` counts an asset that is found out in at least one of the two ways of glueing it (cut through its
    middle and cut far back; either way may lose what makes a front a front); ``janus_on_middle`` the first alone.
    """

    judge: str
    num_assets: int
    consistent_on_real: float
    janus_on_glued: float
    janus_on_middle: float


def judge_facing(judge: str, frontness: Float[Tensor, " view"]) -> Facing:
    """The verdict on twelve views: the three most front-like neighbours are the front, those opposite the back.

    ``frontal_views`` is the share of views beyond 60 degrees from the front that look like fronts.
    """
    smooth = (frontness.roll(1) + frontness + frontness.roll(-1)) / 3
    front = int(smooth.argmax())
    opposite = (front + NUM_VIEWS // 2) % NUM_VIEWS
    elsewhere = frontness.roll(-front)[3 : NUM_VIEWS - 2]
    return Facing(
        judge,
        "janus" if smooth[opposite] > 0 else "consistent",
        AZIMUTHS_DEG[front],
        float(smooth[front]),
        float(smooth[opposite]),
        float((elsewhere > 0).float().mean()),
    )


def frontness_by_references(table: Turntable, references: Sequence[Turntable]) -> Float[Tensor, " view"]:
    """How much nearer each view is to the nearest front view than to the nearest back view of other objects.

    In [-1, 1], by silhouette, normals and colours (relative to the object's mean: a green chair is no worse a chair),
    mirrored or not. The references must stand with their fronts at azimuth 0.
    """
    own = descriptors(table).flatten(1)
    nearest = {}
    for side in ("front", "back"):
        views = torch.tensor([index for index, name in enumerate(_bins()) if name == side])
        seen = torch.cat([descriptors(reference)[views] for reference in references])
        both = torch.cat([seen, mirrored(seen)]).flatten(1)
        nearest[side] = torch.cdist(own, both).amin(1)
    return (nearest["back"] - nearest["front"]) / (nearest["back"] + nearest["front"]).clamp_min(_TINY)


def twin_ratio(table: Turntable) -> float:
    """How far the view most like the front, among those at least 120 degrees away, is from it, over how far the front's
    own neighbours are: 0 for an exact second front, above 0.3 for real assets whose back looks different. Needs no
    references and no prior, takes azimuth 0 for the front, and cannot tell a Janus face from a symmetry that belongs
    to the object (a table's).
    """
    views = descriptors(table)
    both = torch.stack([views, mirrored(views)]).flatten(2)
    distance = (both - views[0].flatten()).norm(dim=-1).amin(0)
    near = torch.minimum(distance[1], distance[-1])
    return float(distance[4:9].amin() / near.clamp_min(_TINY)) if float(near) > _TINY else 1.0


def descriptors(table: Turntable) -> Float[Tensor, "view 7 row column"]:
    """Colour relative to the object's mean, coverage and normal in the camera's axes, at 16 px, each weighted by
    coverage.
    """
    views = table.views
    mean = views.rgb.sum((0, 1, 2)) / views.alpha.sum().clamp_min(_TINY)
    normal = torch.einsum("vji,vhwj->vhwi", table.cameras.c2w[:, :3, :3], views.normal)
    channels = torch.cat([views.rgb - mean * views.alpha, views.alpha, normal], dim=-1).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(channels, _POOLED_PX)


def mirrored(images: Float[Tensor, "view 7 row column"]) -> Float[Tensor, "view 7 row column"]:
    """The descriptors of the mirrored object: the image turned over, and the normals' x with it."""
    sign = images.new_ones(7)
    sign[4] = -1
    return images.flip(-1) * sign[:, None, None]


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


def _bins() -> list[str]:
    azimuth = torch.tensor(AZIMUTHS_DEG)
    return list(view_bins(azimuth, torch.zeros_like(azimuth)))
