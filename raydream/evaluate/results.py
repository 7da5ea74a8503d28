"""What an evaluation says, as plain values that become JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from raydream.evaluate.diversity import Diversity
from raydream.evaluate.facing import Facing, JudgeCheck
from raydream.scene.mesh_checks import MeshChecks

TRUSTED = 0.85
_VERDICTS = {"consistent": "consistency", "janus": "janus", "round": "round"}


@dataclass(frozen=True)
class Recognition:
    """Whether a judge finds the prompt in a particle: ``rank`` 1 is best among ``num_candidates``.

    ``right_views`` is the share of single views in which the prompt wins; the particle's own verdict is by their mean.
    """

    judge: str
    right: bool
    rank: int
    best: str
    right_views: float
    num_candidates: int


@dataclass(frozen=True)
class ParticleEvaluation:
    """One particle; without a mesh (``note`` says why) it has neither recognitions nor facings, and counts as wrong."""

    name: str
    note: str
    recognitions: tuple[Recognition, ...] = ()
    facings: tuple[Facing, ...] = ()
    twin_ratio: float | None = None
    ccm_agreement: float | None = None
    mesh: MeshChecks | None = None


@dataclass(frozen=True)
class Evaluation:
    """One run. ``checks`` say what each judge of fronts is worth for this prompt's object, on real and glued assets."""

    uri: str
    label: str
    prompt: str
    method: str
    seed: int
    candidates: tuple[str, ...]
    particles: tuple[ParticleEvaluation, ...]
    diversity: tuple[Diversity, ...]
    checks: tuple[JudgeCheck, ...]

    def summary(self) -> dict[str, float]:
        """The figures of a run by name, shares over all its particles; what was not measured is left out.

        ``consistency``, ``janus`` and ``round`` stand for the first judge that ``is_trusted`` on the ground truth.
        """
        figures: dict[str, float] = {"particles": float(len(self.particles))}
        for judge in _judges([p.recognitions for p in self.particles]):
            right = [any(r.right for r in p.recognitions if r.judge == judge) for p in self.particles]
            figures[f"r_precision/{judge}"] = fmean(right)
        for judge in _judges([p.facings for p in self.particles]):
            for verdict, name in _VERDICTS.items():
                said = [any(f.verdict == verdict for f in p.facings if f.judge == judge) for p in self.particles]
                figures[f"{name}/{judge}"] = fmean(said)
        trusted = next((c.judge for c in self.checks if is_trusted(c) and f"janus/{c.judge}" in figures), None)
        if trusted:
            figures |= {name: figures[f"{name}/{trusted}"] for name in _VERDICTS.values()}
        figures |= {f"diversity/{part.kind}": part.mean for part in self.diversity}
        twins = [p.twin_ratio for p in self.particles if p.twin_ratio is not None]
        agreements = [p.ccm_agreement for p in self.particles if p.ccm_agreement is not None]
        figures |= {"twin_ratio": fmean(twins)} if twins else {}
        figures |= {"ccm_agreement": fmean(agreements)} if agreements else {}
        figures["closed"] = fmean([p.mesh is not None and p.mesh.boundary_edges == 0 for p in self.particles])
        figures["watertight"] = fmean([p.mesh is not None and p.mesh.watertight for p in self.particles])
        meshes = [p.mesh for p in self.particles if p.mesh is not None]
        if meshes:
            figures["non_manifold_edges"] = fmean([mesh.non_manifold_edges for mesh in meshes])
            figures["crossing_faces"] = fmean([mesh.crossing_faces / mesh.faces for mesh in meshes])
            figures["inner_share"] = fmean([mesh.inner_share for mesh in meshes])
        return figures


def is_trusted(check: JudgeCheck) -> bool:
    """Whether a judge tells real assets from glued ones well enough to stand for a run's consistency."""
    return min(check.consistent_on_real, check.janus_on_glued) >= TRUSTED


def comparison_table(evaluations: Sequence[Evaluation]) -> str:
    """A Markdown table of all labels (rows) and figures (columns): the mean over runs, and the standard deviation
    between runs (of a sample, so from two runs up).
    """
    summaries = [(evaluation.label, evaluation.summary()) for evaluation in evaluations]
    names = list(dict.fromkeys(name for _, figures in summaries for name in figures if name != "particles"))
    lines = [f"| | runs | particles | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for label in dict.fromkeys(label for label, _ in summaries):
        runs = [figures for own, figures in summaries if own == label]
        cells = [_cell([figures[name] for figures in runs if name in figures]) for name in names]
        particles = int(sum(figures["particles"] for figures in runs))
        lines.append(f"| {label} | {len(runs)} | {particles} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _judges(found: Sequence[Sequence[Recognition | Facing]]) -> list[str]:
    return list(dict.fromkeys(item.judge for items in found for item in items))


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{deviation}"
