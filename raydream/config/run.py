"""A whole run as frozen dataclasses. Importable without torch: a web server validates a run with it.

Each class checks its own fields and raises ``ValueError`` that starts with the field's name. Lengths are in scene units
(an object lies in [-1, 1]^3), angles in degrees, ``t`` is a diffusion timestep in 0..999.
"""

from dataclasses import dataclass, field, replace

from raydream.config.branches import BranchConfig, LearnerConfig, geometric_branch
from raydream.config.checks import require, require_positive
from raydream.config.cluster import ClusterConfig, OutputConfig
from raydream.config.kernels import TINYCUDANN_WIDTHS, kernel_packages, need_cuda
from raydream.config.names import MethodName
from raydream.config.prior import PriorConfig
from raydream.config.scene import CameraConfig, LossConfig, NerfConfig, SceneConfig, ShadingConfig
from raydream.schedule import Constant, Schedule, lowest

MAX_PROMPT_CHARACTERS = 1000
PREVIOUS = "previous"


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: a scene, how it is seen, what pulls on it, for how many steps.

    ``start`` says where its scenes come from: empty for new ones, "previous" for those that the stage before it has
    made (of the same particle), else the folder or URI of another run, whose last checkpoint is taken. ``lr_scale``
    multiplies the scene's learning rates. All schedules count the stage's own steps.
    """

    name: str = "nerf"
    num_steps: int = 1000
    start: str = ""
    lr_scale: Schedule = Constant(1.0)
    scene: SceneConfig = field(default_factory=NerfConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    shading: ShadingConfig = field(default_factory=ShadingConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    branches: tuple[BranchConfig, ...] = (BranchConfig(),)
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        require_positive(self, "num_steps")
        renders = [branch.render for branch in self.branches]
        require(bool(renders), "branches", "must have one or more: without any nothing pulls on the particles")
        require(
            len(set(renders)) == len(renders), "branches", f"must be of different renders, got {', '.join(renders)}"
        )
        self.losses.check_kind(self.scene.kind)
        for index, branch in enumerate(self.branches):
            remedy = f"must not be normal where the scene is a {self.scene.kind}; a mesh has normals"
            require(branch.render != "normal" or self.scene.kind == "mesh", f"branches.{index}.render", remedy)
            require(lowest(branch.weight) >= 0, f"branches.{index}.weight", "must not be negative anywhere")

    @property
    def learns(self) -> bool:
        """Whether a reference learns from the renders."""
        return any(branch.learns for branch in self.branches)

    def branch(self, render: str) -> BranchConfig | None:
        """The branch on a kind of render, if there is one."""
        return next((branch for branch in self.branches if branch.render == render), None)

    @property
    def geometric_prior(self) -> str:
        """The aligned geometric prior that pulls on this stage's geometry, empty without one."""
        branch = self.branch("ccm")
        return branch.geometric_prior.source if branch else ""

    def with_method(self, method: MethodName) -> "StageConfig":
        """The stage with another method on its pictures."""
        return replace(
            self, branches=tuple(replace(b, method=method) if b.render == "rgb" else b for b in self.branches)
        )

    def with_geometric_prior(self, source: str) -> "StageConfig":
        """The stage under another aligned geometric prior, or with "off" under none: then the weight that pictures had
        beside it means nothing any more and is 1.
        """
        if source == "off":
            alone = (replace(b, weight=Constant(1.0)) for b in self.branches if b.render != "ccm")
            return replace(self, branches=tuple(alone)) if self.branch("ccm") else self
        if self.branch("ccm") is None:
            return replace(self, branches=(*self.branches, geometric_branch(source)))
        return replace(
            self,
            branches=tuple(
                replace(b, geometric_prior=replace(b.geometric_prior, source=source)) if b.render == "ccm" else b
                for b in self.branches
            ),
        )


@dataclass(frozen=True)
class RunConfig:
    """A whole run: its stages follow one another, and steps are counted through all of them."""

    prompt: str
    preset: str
    n: int = 8
    negative_prompt: str = ""
    seed: int = 0
    prior: PriorConfig = field(default_factory=PriorConfig)
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        require(bool(self.prompt.strip()), "prompt", "must not be empty; say what to make, for example 'a red chair'")
        for name in ("prompt", "negative_prompt"):
            length = len(getattr(self, name))
            remedy = f"must be at most {MAX_PROMPT_CHARACTERS} characters, got {length}; shorten it"
            require(length <= MAX_PROMPT_CHARACTERS, name, remedy)
        require(self.n >= 1, "n", f"must be at least 1 particle, got {self.n}")
        require(0 <= self.seed < 2**63, "seed", f"must be a non-negative 63-bit integer, got {self.seed}")
        require(bool(self.stages), "stages", "must be one or more")
        first = self.stages[0].start
        require(first != PREVIOUS, "stages.0.start", "must not be previous: nothing comes before the first stage")
        replicas = self.cluster.score_replicas
        require(replicas <= self.n, "score_replicas", f"must not exceed n={self.n}, got {replicas}")
        if "tinycudann" in kernel_packages(self.cluster.kernels):
            for index, stage in enumerate(self.stages):
                width, name = stage.scene.hidden_width, f"stages.{index}.scene.hidden_width"
                remedy = f"must be one of {', '.join(map(str, TINYCUDANN_WIDTHS))} with tinycudann, got {width}"
                require(width in TINYCUDANN_WIDTHS, name, f"{remedy}; or take kernels=ours")

    @property
    def num_steps(self) -> int:
        """Of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def method(self) -> str:
        """The methods of its stages, for people: "vsd", or "vsd, sds"."""
        return ", ".join(dict.fromkeys(branch.method for stage in self.stages for branch in stage.branches[:1]))

    def with_method(self, method: MethodName) -> "RunConfig":
        """The run with another method on the pictures of all its stages."""
        return replace(self, stages=tuple(stage.with_method(method) for stage in self.stages))

    def with_geometric_prior(self, source: str) -> "RunConfig":
        """The run with another aligned geometric prior in all its stages; "off" is none."""
        return replace(self, stages=tuple(stage.with_geometric_prior(source) for stage in self.stages))

    def stage_at(self, step: int) -> int:
        """The index of the stage that takes a step; the last one's where the run is over."""
        return next((i for i in range(len(self.stages)) if step < self.first_step(i + 1)), len(self.stages) - 1)

    def first_step(self, stage: int) -> int:
        """The first step of a stage."""
        return sum(before.num_steps for before in self.stages[:stage])


def cluster_config(run: RunConfig) -> ClusterConfig:
    """The part of a run that says where it runs, without GPUs for models that are quick on cores: the exhibit's and
    those that ship, unless the settings ask for GPUs or for their kernels.
    """
    models = [run.prior.source, *(stage.geometric_prior for stage in run.stages)]
    asks = need_cuda(run.cluster.kernels) or max(run.cluster.gpus_per_particle, run.cluster.gpus_per_score) > 0
    if asks or not {"", "embedded"}.issuperset(models):
        return run.cluster
    return replace(run.cluster, gpus_per_particle=0.0, gpus_per_score=0.0)
