"""How the GPUs and cores of a cluster are shared out among a run's actors, so that all of them find a place.

When Ray chooses nodes it knows their GPUs by the sum, but a fraction lies on one GPU. So these fractions are such that
the sums say what the single GPUs say: a node that is full of particles has no room for one more by its sum either.
"""

import math
from collections.abc import Sequence

_GPU, _CPU = 10_000, 100  # parts: Ray's own unit for a GPU, a coarser one for a core


def gpu_shares(
    num_particles: int, num_scores: int, gpus: Sequence[int], particle: float | None = None, score: float | None = None
) -> tuple[float, float] | None:
    """What each particle and each replica of the score model takes of a GPU, where the nodes have ``gpus``; what is
    given stays. None where they cannot all be placed.

    One GPU each where there are enough. Else particles are spread evenly, and each GPU keeps a rest for score models.
    """
    choices: list[tuple[float, float] | None] = [(1.0, 1.0) if gpus else (0.0, 0.0)]
    choices += [_side_by_side(num_particles, num_scores, gpus, particle, score)] if gpus else []
    for choice in choices:
        if choice is not None:
            shares = (choice[0] if particle is None else particle, choice[1] if score is None else score)
            if _can_be_placed([shares[0]] * num_particles + [shares[1]] * num_scores, gpus):
                return shares
    return None


def cpu_share(
    num_particles: int, num_scores: int, nodes: Sequence[tuple[float, int]], shares: tuple[float, float]
) -> float:
    """What each actor takes of a core: a whole one where there are enough, 0 where there is less than 0.01 of one.

    ``nodes`` have so many cores and GPUs, of which a particle and a replica of the score model take ``shares``.
    """
    if any(shares):  # a node needs cores for all that its GPUs can hold
        held = [(cpus, _held(shares[0], num_particles, n) + _held(shares[1], num_scores, n)) for cpus, n in nodes if n]
        return min([_CPU, *(int(_CPU * cpus / count) for cpus, count in held if count)]) / _CPU
    num_actors, all_cpus = num_particles + num_scores, sum(cpus for cpus, _ in nodes)
    for parts in range(min(_CPU, int(_CPU * all_cpus / num_actors)), 0, -1):
        if sum(int(_CPU * cpus) // parts for cpus, _ in nodes) >= num_actors:
            return parts / _CPU
    return 0.0


def _side_by_side(
    num_particles: int, num_scores: int, gpus: Sequence[int], particle: float | None, score: float | None
) -> tuple[float, float] | None:
    """Shares of actors that stand together; None where one of them would be too small for Ray."""
    a, b = math.ceil(num_particles / sum(gpus)), math.ceil(num_scores / sum(gpus))  # so many of each on a GPU
    if particle is not None:
        part = round(_GPU * particle)
    elif score is not None:
        part = (_GPU - b * round(_GPU * score)) // a
    else:  # just so much that no node has room for one more than its GPUs have
        part = _GPU * max(gpus) // (a * max(gpus) + 1) + 1
        part += int(part / _GPU * _GPU) < part  # Ray cuts off: to it 0.3334 is 3,333 parts, of which three fit on a GPU
    rest = (_GPU - a * part) // b if score is None else round(_GPU * score)
    if particle is None and score is None and rest < 1:  # more on a GPU than Ray can tell apart so
        part = rest = _GPU // (a + b)
    is_possible = (part > 0 or particle is not None) and (rest > 0 or score is not None)
    return (part / _GPU, rest / _GPU) if is_possible else None


def _held(share: float, count: int, gpus: int) -> int:
    """How many of so many actors can stand on a node with so many GPUs."""
    if share <= 0:
        return count
    return min(count, gpus * (_GPU // round(_GPU * share)) if share <= 1 else gpus // math.ceil(share))


def _can_be_placed(shares: Sequence[float], gpus: Sequence[int]) -> bool:
    """Whether actors find places one after the other, each on the fullest GPU that has room for it."""
    free = [[_GPU] * count for count in gpus]
    for share in filter(None, shares):
        asked, num_gpus = (round(_GPU * share), 1) if share <= 1 else (_GPU, math.ceil(share))
        rooms = [sorted(left for left in node if left >= asked)[:num_gpus] for node in free]
        holding = [(room, node) for room, node in zip(rooms, free) if len(room) == num_gpus]
        if not holding:
            return False
        room, node = min(holding)
        for left in room:
            node[node.index(left)] -= asked
    return True
