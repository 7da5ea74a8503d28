"""What each actor of a run needs to know of its settings."""

from dataclasses import dataclass

from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.cluster import OutputConfig
from raydream.config.prior import PriorConfig
from raydream.config.run import RunConfig, StageConfig


@dataclass(frozen=True)
class ParticleConfig:
    """All that one particle needs to know in a stage, whose schedules begin at ``first_step``."""

    index: int
    num_particles: int
    seed: int
    stage: StageConfig
    first_step: int
    prior: PriorConfig
    backend: str
    deterministic: bool
    wire_dtype: str
    output: OutputConfig
    renders_again: bool = False


@dataclass(frozen=True)
class ScoreConfig:
    """All that one replica of the score model needs to know in a stage, whose schedules begin at ``first_step``."""

    replica: int
    num_particles: int
    seed: int
    prompt: str
    negative_prompt: str
    branches: tuple[BranchConfig, ...]
    learner: LearnerConfig
    first_step: int
    prior: PriorConfig
    backend: str
    wire_dtype: str
    views_at_once: int = 0
    graphs: bool = True


def particle_config(run: RunConfig, stage: int, index: int) -> ParticleConfig:
    """The part of a run that concerns one particle in a stage."""
    settings, first, cluster = run.stages[stage], run.first_step(stage), run.cluster
    return ParticleConfig(
        index, run.n, run.seed, settings, first, run.prior, cluster.kernels, cluster.deterministic, cluster.wire_dtype,
        run.output, cluster.renders == "again",
    )  # fmt: skip


def score_config(run: RunConfig, stage: int, replica: int) -> ScoreConfig:
    """The part of a run that concerns one replica of the score model in a stage."""
    settings, first, cluster = run.stages[stage], run.first_step(stage), run.cluster
    graphs = cluster.graphs and cluster.renders != "again"  # a graph keeps its memory, which others wait for then
    return ScoreConfig(
        replica, run.n, run.seed, run.prompt, run.negative_prompt, settings.branches, settings.learner, first,
        run.prior, cluster.kernels, cluster.wire_dtype, cluster.views_at_once, graphs,
    )  # fmt: skip
