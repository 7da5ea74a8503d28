"""Whether a run's actors fit into the memory of the GPUs that they are to share, and what the plan is, in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raydream.cluster.placement import Cluster, Key, Resources

_TYPE = "accelerator_type:"  # how Ray's resource for a kind of GPU begins
# GiB of the smallest card that goes by each of Ray's names, as its maker says
_MEMORY_GIB = {
    "K80": 12, "P4": 8, "P100": 12, "T4": 15, "V100": 16, "L4": 22, "A10G": 22, "L40S": 44,
    "A100": 39, "A100-40G": 39, "A100-80G": 79, "H100": 79, "H20": 95, "H200": 140, "B200": 178,
}  # fmt: skip
_PROCESS_GIB = 0.8  # CUDA's context and kernels, for each process
_SLACK = 1.15  # what an allocator in pieces holds beside what is asked of it


@dataclass(frozen=True)
class Need:
    """GiB of a particle and of a replica of the score model, each in a process of its own."""

    particle: float
    score: float

    @classmethod
    def of(cls, particle_bytes: int, score_bytes: int) -> "Need":
        """With what every process on a GPU takes beside its tensors."""
        return cls(*(_SLACK * size / 2**30 + _PROCESS_GIB for size in (particle_bytes, score_bytes)))


def plan_in_words(bundles: Mapping[Key, Resources], cluster: Cluster, need: Need | None = None) -> str:
    """For the person who starts a run: where its actors go, and how full the fullest GPU will be.

    ``ValueError`` naming ``n``, with what would fit, where they need more memory than a GPU has.
    """
    counts = [sum(role == of for of, _ in bundles) for role in ("particle", "score")]
    who = f"{_many(counts[0], 'particle')} and {_many(counts[1], 'score model')}"
    shares = [bundles[role, 0].get("GPU", 0.0) for role in ("particle", "score")]
    if not any(shares):
        return f"{who} on CPU cores, {bundles['particle', 0].get('CPU', 0):g} for a particle"
    gpus = sum(int(node["GPU"]) for node in cluster.each("GPU"))
    kinds = {name.removeprefix(_TYPE) for node in cluster.each("GPU") for name in node if name.startswith(_TYPE)}
    have = min((_MEMORY_GIB.get(kind, 0) for kind in kinds), default=0)  # 0: not known
    together = [_on_one(count, share, gpus) for count, share in zip(counts, shares)]
    particles, scores = _many(together[0], "particle"), _many(together[1], "score model")
    if max(shares) < 1:
        each = f"{particles} and {scores} on the fullest GPU"
        fullest = _gib(together, need) if need else 0.0
    else:  # who has a whole GPU has it alone
        each = "one GPU each" if together == [1, 1] else f"{particles} or {scores} on a GPU"
        fullest = max(_gib([together[0], 0], need), _gib([0, together[1]], need)) if need else 0.0
    if need and have and fullest > have:
        raise ValueError(_too_much(counts, gpus, need, have, fullest))
    memory = f", {fullest:.0f} of {have} GiB" if need and have else ""
    return f"{who} on {gpus} x {'/'.join(sorted(kinds)) or 'GPU'}: {each}{memory}"


def _on_one(count: int, share: float, gpus: int) -> int:
    """The most of so many actors that one GPU may get."""
    return min(math.ceil(count / gpus), int(1 / share + 1e-6)) if share else 0


def _gib(together: Sequence[int], need: Need) -> float:
    return together[0] * need.particle + together[1] * need.score


def _too_much(counts: Sequence[int], gpus: int, need: Need, have: int, fullest: float) -> str:
    fitting = [
        n for n in range(1, counts[0]) if _gib([math.ceil(n / gpus), math.ceil(min(counts[1], n) / gpus)], need) <= have
    ]
    instead = f"--n {fitting[-1]} would fit; or " if fitting else ""
    return (
        f"n: {_many(counts[0], 'particle')} of {need.particle:.1f} GiB and {_many(counts[1], 'score model')} of "
        f"{need.score:.1f} GiB need {fullest:.0f} GiB on one of {_many(gpus, 'GPU')} of {have} GiB; {instead}"
        "lower stages.0.camera.image_px, or add GPUs"
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
