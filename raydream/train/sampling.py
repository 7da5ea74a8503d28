"""What a training draws: the timesteps that it learns at, and samples of what it has learned."""

import torch
from jaxtyping import Int
from torch import Tensor


def stratified_timesteps(
    size: int, generator: torch.Generator, logit_mean: float = 0.0, logit_std: float = 0.0
) -> Int[Tensor, " view"]:
    """Timesteps in 0..999, one from each equal part of their distribution: that takes most scatter out of a loss. It is
    uniform or, with ``logit_std`` above 0, such that the logit of t / 1000 is normal.
    """
    quantile = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    if logit_std:
        quantile = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(quantile))
    return (1000 * quantile).long().clamp_max(999)
