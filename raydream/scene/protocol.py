"""What a particle and its export ask of whatever is optimised."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.config.cluster import OutputConfig
from raydream.coordinates import Box
from raydream.types import Cameras, Mesh, Render

Draws = Callable[[str, int], torch.Generator]  # by what is drawn and the stage's step: always the same numbers


class EmptyMeshError(RuntimeError):
    """There is no surface; the message says why, and what to change."""


@runtime_checkable
class Scene(Protocol):
    """What a particle optimises. ``step`` counts the steps of the stage; draws depend on it alone."""

    def render(self, cameras: Cameras, step: int, ccm_box: Box | None = None) -> Render:
        """The views of a training step, differentiable by every parameter; coordinate maps where a box is given."""
        ...

    def preview(self, cameras: Cameras) -> Render:
        """Views for people: the object's own colours on black, nothing drawn at random."""
        ...

    def regularizers(self, render: Render, step: int) -> dict[str, Float[Tensor, ""]]:
        """The weighted regularisers of a step's render, by name."""
        ...

    def param_groups(self) -> list[dict[str, object]]:
        """Groups for Adam, with their learning rates."""
        ...

    def after_step(self, step: int) -> None:
        """Whatever follows ``step`` steps of the optimiser; 0 is the beginning."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``state`` gave; ``ValueError`` where that is of another kind of scene."""
        ...

    def surface(self, output: OutputConfig) -> Mesh:
        """The finished, textured mesh; ``EmptyMeshError`` where there is none."""
        ...

    def box(self) -> Box | None:
        """What is solid lies in it; None where nothing is."""
        ...
