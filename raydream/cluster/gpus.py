"""Whether, and under which budget, a run's actors fit into the memory of the GPUs that they are to share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raydream.cluster.placement import Cluster, Key, Resources
from raydream.config.cluster import Budget

_TYPE = "accelerator_type:"  # how Ray's resource for a kind of GPU begins
# GiB of the smallest card that goes by each of Ray's names, as its maker says
_MEMORY_GIB = {
    "K80": 12, "P4": 8, "P100": 12, "T4": 15, "V100": 16, "L4": 22, "A10G": 22, "L40S": 44,
    "A100": 39, "A100-40G": 39, "A100-80G": 79, "H100": 79, "H20": 95, "H200": 140, "B200": 178,
}  # fmt: skip
_PROCESS_GIB = 0.8  # CUDA's context and kernels, for each process
_SLACK = 1.15  # what an allocator in pieces holds beside what is asked of it


@dataclass(frozen=True)
class Load:
    """GiB of an actor: what stays from call to call, and what a step takes beside it."""

    held: float
    peak: float

    @classmethod
    def of(cls, held_bytes: int, peak_bytes: int) -> "Load":
        return cls(_SLACK * held_bytes / 2**30, _SLACK * peak_bytes / 2**30)


@dataclass(frozen=True)
class Need:
    """What a particle and a replica of the score model take under a budget."""

    budget: Budget
    particle: Load
    score: Load

    def together(self, particles: int, scores: int, in_one_process: bool = False) -> float:
        """GiB of so many actors on one GPU. Graphs that are made again stand there one at a time."""
        loads = [self.particle] * particles + [self.score] * scores
        peaks = [load.peak for load in loads]
        at_once = max(peaks, default=0.0) if self.budget.renders_again else sum(peaks)
        return sum(load.held for load in loads) + at_once + _PROCESS_GIB * (1 if in_one_process else len(loads))


def plan_in_words(
    bundles: Mapping[Key, Resources], cluster: Cluster, needs: Sequence[Need] = ()
) -> tuple[str, Budget | None]:
    """For the person who starts a run: where its actors go, and how full the fullest GPU will be; and the first budget
    that the GPUs hold. ``needs`` are of several budgets; without any nothing is decided.

    ``ValueError`` naming ``n``, with what would fit, where under none of them a GPU has enough memory.
    """
    counts = [sum(role == of for of, _ in bundles) for role in ("particle", "score")]
    who = f"{_many(counts[0], 'particle')} and {_many(counts[1], 'score model')}"
    shares = [bundles[role, 0].get("GPU", 0.0) for role in ("particle", "score")]
    if not any(shares):
        return f"{who} on CPU cores, {bundles['particle', 0].get('CPU', 0):g} for a particle", None
    gpus = sum(int(node["GPU"]) for node in cluster.each("GPU"))
    kinds = {name.removeprefix(_TYPE) for node in cluster.each("GPU") for name in node if name.startswith(_TYPE)}
    have = float(min((_MEMORY_GIB.get(kind, 0) for kind in kinds), default=0))  # 0: not known
    together = [_on_one(count, share, gpus) for count, share in zip(counts, shares)]
    particles, scores = _many(together[0], "particle"), _many(together[1], "score model")
    if max(shares) < 1:
        each, groups = f"{particles} and {scores} on the fullest GPU", [(together[0], together[1])]
    else:  # who has a whole GPU has it alone
        each = "one GPU each" if together == [1, 1] else f"{particles} or {scores} on a GPU"
        groups = [(together[0], 0), (0, together[1])]

    def fullest(need: Need) -> float:
        return max(need.together(*group) for group in groups)

    plan = f"{who} on {gpus} x {'/'.join(sorted(kinds)) or 'GPU'}: {each}"
    if not needs or not have:
        return plan, needs[0].budget if needs else None
    need = _first_within(needs, fullest, have)
    if need is None:
        raise ValueError(_too_much(counts, gpus, needs[-1], have, fullest(needs[-1])))
    return plan + _filled(need, fullest(need), have), need.budget


def plan_on_own_gpu(num_particles: int, num_scores: int, needs: Sequence[Need], free_gib: float) -> tuple[str, Budget]:
    """The same for actors that are all in one process, on a GPU of which so much is free."""
    counts = (num_particles, num_scores)

    def full(need: Need) -> float:
        return need.together(*counts, in_one_process=True)

    need = _first_within(needs, full, free_gib)
    if need is None:
        raise ValueError(_too_much(counts, 1, needs[-1], free_gib, full(needs[-1]), in_one_process=True))
    who = f"{_many(num_particles, 'particle')} and {_many(num_scores, 'score model')}"
    return f"{who} in one process on its GPU{_filled(need, full(need), free_gib)}", need.budget


def _first_within(needs: Sequence[Need], fullest: Callable[[Need], float], have: float) -> Need | None:
    return next((need for need in needs if fullest(need) <= have), None)


def _filled(need: Need, full: float, have: float) -> str:
    budget = f", {need.budget}:" if str(need.budget) else ","
    return f"{budget} {full:.0f} of {have:.0f} GiB"


def _on_one(count: int, share: float, gpus: int) -> int:
    """The most of so many actors that one GPU may get."""
    return min(math.ceil(count / gpus), int(1 / share + 1e-6)) if share else 0


def _too_much(
    counts: Sequence[int], gpus: int, need: Need, have: float, fullest: float, in_one_process: bool = False
) -> str:
    fitting = [
        n
        for n in range(1, counts[0])
        if need.together(math.ceil(n / gpus), math.ceil(min(counts[1], n) / gpus), in_one_process) <= have
    ]
    instead = f"--n {fitting[-1]} would fit; or " if fitting else ""
    budget = f", {need.budget}," if str(need.budget) else ""
    return (
        f"n: {_many(counts[0], 'particle')} of {need.together(1, 0):.1f} GiB and {_many(counts[1], 'score model')} of "
        f"{need.together(0, 1):.1f} GiB{budget} need {fullest:.0f} GiB on one of {_many(gpus, 'GPU')} of {have:.0f} "
        f"GiB; {instead}lower stages.0.camera.image_px, or add GPUs"
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
