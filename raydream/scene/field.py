"""The radiance field of a particle: hash grid, one hidden layer, density and albedo, and analytic normals."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raydream.backend.layout import make_hash_grid_layout
from raydream.config.scene import NerfConfig
from raydream.precision import arithmetic
from raydream.scene.background import uniform_weight
from raydream.types import Backend

FEATURES_PER_LEVEL = 2  # of the hash grid, as in Instant-NGP
CHUNK_SIZE = 65_536  # points at once where no graph is kept: a film's frame then needs no more memory than a step
CHUNK_SIZE_GPU = 1 << 20  # fewer launches; half a gigabyte


class RadianceField(nn.Module):
    """Density and albedo at world points in [-radius, radius]^3 (Instant-NGP's encoding, threestudio's head sizes).

    The density is ``softplus(network(x) + lambda * (1 - |x| / r))``: an untrained field is a soft ball.
    """

    def __init__(self, config: NerfConfig, backend: Backend, generator: torch.Generator) -> None:
        super().__init__()
        grid = config.grid
        self._config, self._backend = config, backend
        self.layout = make_hash_grid_layout(
            grid.num_levels,
            FEATURES_PER_LEVEL,
            grid.log2_table_size,
            grid.base_resolution,
            grid.max_resolution,
            grid.interpolation,
        )
        shape = (self.layout.num_entries, FEATURES_PER_LEVEL)
        self.table = nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * 1e-4)
        self.hidden = nn.Parameter(uniform_weight(config.hidden_width, self.layout.num_features, generator))
        self.head = nn.Parameter(uniform_weight(4, config.hidden_width, generator))

    def initial_density(self, points: Float[Tensor, "sample 3"]) -> Float[Tensor, " sample"]:
        """What is added before the activation: ``lambda`` at the origin, 0 at distance ``r`` (Magic3D)."""
        return self._config.initial_density_lambda * (1 - points.norm(dim=-1) / self._config.initial_density_radius)

    def forward(
        self, points: Float[Tensor, "sample 3"], noise: Float[Tensor, " sample"] | None = None
    ) -> tuple[Float[Tensor, " sample"], Float[Tensor, "sample 3"]]:
        """Density (per scene unit) and albedo in [0, 1]; ``noise`` is added to the density before its activation."""
        most = CHUNK_SIZE if points.device.type == "cpu" else CHUNK_SIZE_GPU
        if not torch.is_grad_enabled() and len(points) > most:
            density, albedo = zip(*(self(chunk) for chunk in points.split(most)))
            return torch.cat(density), torch.cat(albedo)
        with arithmetic(self._config.bfloat16, points.device):
            output = self._backend.field(self._unit(points), self.table, self.layout, self.hidden, self.head)
        return self._activate(output.to(points.dtype), points, noise)

    def density(self, points: Float[Tensor, "sample 3"]) -> Float[Tensor, " sample"]:
        """Density alone."""
        return self(points)[0]

    def albedo(self, points: Float[Tensor, "sample 3"]) -> Float[Tensor, "sample 3"]:
        """Albedo alone."""
        return self(points)[1]

    def with_normals(
        self, points: Float[Tensor, "sample 3"], noise: Float[Tensor, " sample"] | None = None
    ) -> tuple[Float[Tensor, " sample"], Float[Tensor, "sample 3"], Float[Tensor, "sample 3"]]:
        """Density, albedo and the unit normal ``-grad density / |grad density|``, differentiable to first order.

        The grid's derivative is linear in its table, so one pass forward replaces a second one backward.
        """
        output, gradient = self._backend.field_gradient(
            self._unit(points), self.table, self.layout, self.hidden, self.head
        )
        density, albedo = self._activate(output, points, noise)
        gradient = gradient / (2 * self._config.radius)
        radial = F.normalize(points, dim=-1, eps=1e-6)
        gradient = gradient - radial * (self._config.initial_density_lambda / self._config.initial_density_radius)
        return density, albedo, -F.normalize(gradient, dim=-1, eps=1e-6)

    def _activate(
        self,
        output: Float[Tensor, "sample 4"],
        points: Float[Tensor, "sample 3"],
        noise: Float[Tensor, " sample"] | None,
    ) -> tuple[Float[Tensor, " sample"], Float[Tensor, "sample 3"]]:
        raw = output[:, 0] + self.initial_density(points)
        # the sigmoid of all four columns is several times cheaper than that of three out of four
        return F.softplus(raw if noise is None else raw + noise), torch.sigmoid(output)[:, 1:]

    def _unit(self, points: Float[Tensor, "sample 3"]) -> Float[Tensor, "sample 3"]:
        return points / (2 * self._config.radius) + 0.5
