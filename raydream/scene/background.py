"""What a ray sees behind the object: a small network of its direction, or one colour."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def spherical_harmonics(directions: Float[Tensor, "ray 3"]) -> Float[Tensor, "ray 9"]:
    """Real spherical harmonics of degrees 0, 1 and 2 of unit vectors (orthonormal on the sphere)."""
    x, y, z = directions.unbind(-1)
    return torch.stack(
        [
            torch.full_like(x, 0.28209479177387814),
            0.4886025119029199 * y,
            0.4886025119029199 * z,
            0.4886025119029199 * x,
            1.0925484305920792 * x * y,
            1.0925484305920792 * y * z,
            0.31539156525252005 * (3 * z * z - 1),
            1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ],
        dim=-1,
    )


class BackgroundNetwork(nn.Module):
    """Colour of a direction: spherical harmonics, two hidden layers of 16, sigmoid (threestudio's size)."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            [nn.Parameter(uniform_weight(rows, columns, generator)) for rows, columns in ((16, 9), (16, 16), (3, 16))]
        )

    def forward(self, directions: Float[Tensor, "ray 3"]) -> Float[Tensor, "ray 3"]:
        hidden = spherical_harmonics(directions)
        for weight in self.weights[:-1]:
            hidden = F.relu(F.linear(hidden, weight))
        return torch.sigmoid(F.linear(hidden, self.weights[-1]))


def uniform_weight(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "{rows} {columns}"]:
    """The initial weight of a layer without bias: uniform within ``sqrt(3 / columns)``, so that variance is kept."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * (3.0 / columns) ** 0.5
