"""The grid that says where a field may have density, so that rays skip empty space."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from raydream.seeds import generator_on

# Instant-NGP, appendix C
THRESHOLD = 0.01
DECAY = 0.95

DensityFunction = Callable[[Float[Tensor, "sample 3"]], Float[Tensor, " sample"]]


class OccupancyGrid:
    """A decaying maximum of the optical depth of one step in each cell (Instant-NGP, appendix C).

    ``values`` is the state to save; ``mask`` follows from it.
    """

    def __init__(self, resolution: int, radius: float, device: torch.device) -> None:
        self._radius = radius
        self.values: Float[Tensor, "rx ry rz"] = torch.zeros((resolution,) * 3, device=device)

    @property
    def mask(self) -> Bool[Tensor, "rx ry rz"]:
        """Cells above the threshold, or above the mean where that is lower: a thin fog does not vanish at once."""
        return self.values > torch.clamp(self.values.mean(), max=THRESHOLD)

    @torch.no_grad()
    def update(self, density: DensityFunction, step_size: float, generator: torch.Generator) -> None:
        """Evaluates the field at one random point of every cell; ``step_size`` is the length of a ray step."""
        resolution, device = self.values.shape[0], self.values.device
        axis = torch.arange(resolution, dtype=torch.float32, device=device)
        corners = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
        drawn = torch.rand(corners.shape, generator=generator_on(device, generator), device=device)
        points = ((corners + drawn) / resolution * 2 - 1) * self._radius
        optical_depth = (density(points) * step_size).reshape(self.values.shape)
        self.values = torch.maximum(self.values * DECAY, optical_depth)
