"""Regularisers of a volume-rendered scene, as pure functions of opacities and packed ray samples.

Sources: DreamFusion (orientation, sparsity, opaqueness; appendix A.2) and HiFA (z-variance, equation 9).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.types import RaySamples

OPAQUENESS_CLAMP = 1e-3
SOLID_OPACITY = 0.5


def sparsity(opacity: Float[Tensor, "*ray"]) -> Float[Tensor, ""]:
    """Pulls opacity to zero where nothing needs it: a smooth absolute value, so its gradient at zero is zero."""
    return (opacity.square() + 0.01).sqrt().mean()


def opaqueness(opacity: Float[Tensor, "*ray"]) -> Float[Tensor, ""]:
    """Pushes each ray to be either solid or empty: the binary entropy, in nats; flat within 0.001 of both ends."""
    solid = opacity.clamp(OPAQUENESS_CLAMP, 1 - OPAQUENESS_CLAMP)
    return -(solid * solid.log() + (1 - solid) * (1 - solid).log()).mean()


def orientation(
    weights: Float[Tensor, " sample"],
    normals: Float[Tensor, "sample 3"],
    directions: Float[Tensor, "ray 3"],
    samples: RaySamples,
) -> Float[Tensor, ""]:
    """Turns the normals of visible samples towards the camera; per ray that sees anything (Ref-NeRF, equation 11).

    Differentiable by the normals only: the weights are held, else the field would rather vanish than turn.
    """
    away = (normals * directions[samples.ray_index]).sum(-1).clamp(min=0)
    num_hits = (_sum_by_ray(weights.detach(), samples) > 0).sum().clamp(min=1)
    return (weights.detach() * away.square()).sum() / num_hits


def z_variance(weights: Float[Tensor, " sample"], samples: RaySamples) -> Float[Tensor, ""]:
    """Thins the surface: the variance of the distance at which a solid ray (opacity above 0.5) ends, in squared units.

    The weights are normalised on each ray. Left as they are, every ray could lower its loss by growing transparent, and
    the object would shrink. Zero where no ray is solid.
    """
    distance = (samples.t_start + samples.t_end) / 2
    opacity = _sum_by_ray(weights, samples)
    solid = opacity > SOLID_OPACITY
    share = weights / _of_ray(torch.where(solid, opacity, 1.0), samples)
    mean = _sum_by_ray(share * distance, samples)
    variance = _sum_by_ray(share * (distance - _of_ray(mean, samples)).square(), samples)
    return torch.where(solid, variance, 0.0).sum() / solid.sum().clamp(min=1)


def _of_ray(values: Float[Tensor, " ray"], samples: RaySamples) -> Float[Tensor, " sample"]:
    # The gradient of an index is sorted on a GPU, that of this is summed.
    return values.index_select(0, samples.ray_index)


def _sum_by_ray(values: Float[Tensor, " sample"], samples: RaySamples) -> Float[Tensor, " ray"]:
    return values.new_zeros(samples.counts.shape).index_add(0, samples.ray_index.long(), values)
