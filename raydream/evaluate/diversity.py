"""How different particles are from each other: distances between their turntables, each pair turned to fit best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Diversity:
    """Distances of all pairs of particles, and their mean: 0 where all are the same, whatever their order."""

    kind: str
    mean: float
    distances: tuple[tuple[float, ...], ...]


def measure_diversity(kind: str, distances: Float[Tensor, "particle particle"]) -> Diversity | None:
    """The mean over pairs; None where there are no two particles."""
    count = len(distances)
    if count < 2:
        return None
    pairs = distances[torch.triu_indices(count, count, 1).unbind()]
    rows = tuple(tuple(round(value, 5) for value in row) for row in distances.tolist())
    return Diversity(kind, float(pairs.double().sort().values.mean()), rows)


def picture_distances(tables: Sequence[Float[Tensor, "view h w 4"]]) -> Float[Tensor, "particle particle"]:
    """The picture distance of each pair in the relative turn that makes it smallest."""
    return _all_pairs(tables, lambda first, second: turned_distances(first, second).amin())


def turned_distances(first: Float[Tensor, "view h w 4"], second: Float[Tensor, "view h w 4"]) -> Float[Tensor, " turn"]:
    """The root mean square difference of premultiplied colour and coverage, in [0, 1], for each relative turn.

    The mean is over the four channels and the pixels that either object covers (empty background does not make
    things alike), over all views at once. Turn ``s`` puts the first's view ``i`` against the second's ``i + s``.
    """
    one, other = first.flatten(1, 2), second.flatten(1, 2)
    squared = torch.stack([(view - other).square().sum(dim=(1, 2)) for view in one])
    union = torch.stack([torch.maximum(view[:, 3], other[..., 3]).sum(-1) for view in one])
    return (turn_sums(squared) / (4 * turn_sums(union)).clamp_min(1e-9)).sqrt()


def feature_distances(tables: Sequence[Float[Tensor, "view feature"]]) -> Float[Tensor, "particle particle"]:
    """1 - cosine between the features of matching views, its mean over the views in the best relative turn."""
    unit = [F.normalize(table, dim=-1) for table in tables]
    return _all_pairs(unit, lambda first, second: (turn_sums(1 - first @ second.T) / len(first)).amin().clamp_min(0))


def turn_sums(pairs: Float[Tensor, "view other"]) -> Float[Tensor, " turn"]:
    """For each turn ``s`` the sum over views ``i`` of ``pairs[i, i + s]``."""
    count = len(pairs)
    index = torch.arange(count, device=pairs.device)
    return pairs[index, (index + index[:, None]) % count].sum(-1)


def _all_pairs(tables: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    result = torch.zeros(len(tables), len(tables))
    for i in range(len(tables)):
        for j in range(i):
            result[i, j] = result[j, i] = distance(tables[j], tables[i])
    return result
