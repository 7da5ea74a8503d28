"""Every setting of a run as frozen dataclasses. Importable without torch: a web server validates a run with it.

Each class checks its own fields and raises ``ValueError`` that starts with the field's name. Lengths are in scene units
(an object lies in [-1, 1]^3), angles in degrees, ``t`` is a diffusion timestep in 0..999.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from raydream.config.checks import require, require_range
from raydream.config.guidance import GeometryConfig, GuidanceConfig, LearnerConfig
from raydream.schedule import Constant, Schedule, highest, lowest

Method = Literal["vsd", "sds", "sjc"]
MAX_PROMPT_CHARACTERS = 1000
EXHIBIT_IMAGE_PX = 64
SMALL_UNET_PATCH_PX = 4  # of an exhibit's learned reference, where the picture's size is a multiple of 16


@dataclass(frozen=True)
class HashGridConfig:
    """Multiresolution hash grid (Instant-NGP). Adam walks the whole table: on a CPU keep it at 2^17 entries or less."""

    num_levels: int = 8
    features_per_level: int = 2
    log2_table_size: int = 15
    base_resolution: int = 16
    max_resolution: int = 160

    def __post_init__(self) -> None:
        require(1 <= self.num_levels <= 32, "num_levels", f"must be 1..32, got {self.num_levels}")
        require(1 <= self.features_per_level <= 8, "features_per_level", f"must be 1..8, got {self.features_per_level}")
        require(4 <= self.log2_table_size <= 24, "log2_table_size", f"must be 4..24, got {self.log2_table_size}")
        require(self.base_resolution >= 2, "base_resolution", f"must be at least 2, got {self.base_resolution}")
        ok = self.max_resolution >= self.base_resolution
        require(ok, "max_resolution", f"must not be smaller than base_resolution={self.base_resolution}")
        ok = self.num_levels > 1 or self.max_resolution == self.base_resolution
        require(ok, "max_resolution", f"must be base_resolution={self.base_resolution} where num_levels is 1")


@dataclass(frozen=True)
class NerfConfig:
    """The scene of the first stage: field, initial density, occupancy grid, sampling, background.

    ``initial_density``: ``lambda * (1 - |x| / r)`` is added before the activation. An object starts as a ball with
    (10, 0.5) (Magic3D); (-10, 2.5) leaves the middle empty for a scene seen from inside (ProlificDreamer).
    With ``random_background_probability`` a view has a drawn colour, or grey, within ``random_background`` behind it.
    """

    radius: float = 1.0
    grid: HashGridConfig = field(default_factory=HashGridConfig)
    hidden_width: int = 64
    initial_density_lambda: float = 10.0
    initial_density_radius: float = 0.5
    density_noise: float = 0.0
    occupancy_resolution: int = 32
    occupancy_threshold: float = 0.01
    occupancy_decay: float = 0.95
    occupancy_every: int = 16
    samples_per_diagonal: int = 96
    background: Literal["network", "constant"] = "network"
    background_color: tuple[float, float, float] = (0.5, 0.5, 0.5)
    random_background_probability: float = 0.5
    random_background: tuple[float, float] = (0.0, 1.0)
    random_background_grey: bool = False
    bfloat16: Literal["auto", "on", "off"] = "auto"
    lr_grid: float = 1e-2
    lr_network: float = 1e-3
    lr_background: float = 1e-3

    def __post_init__(self) -> None:
        require(self.radius > 0, "radius", f"must be positive, got {self.radius}")
        least = {"hidden_width": 1, "occupancy_resolution": 4, "occupancy_every": 1, "samples_per_diagonal": 4}
        for name, low in least.items():
            require(getattr(self, name) >= low, name, f"must be at least {low}, got {getattr(self, name)}")
        for name in ("random_background_probability", "occupancy_decay"):
            require(0 <= getattr(self, name) <= 1, name, f"must lie in [0, 1], got {getattr(self, name)}")
        require(self.initial_density_radius > 0, "initial_density_radius", "must be positive")
        for name in ("lr_grid", "lr_network", "lr_background"):
            require(getattr(self, name) >= 0, name, f"must not be negative, got {getattr(self, name)}")
        require_range(self.random_background, "random_background", 0.0, 1.0)


@dataclass(frozen=True)
class CameraConfig:
    """Where the cameras of a step stand. ``image_px`` is a schedule: resolution milestones."""

    views_per_particle: int = 1
    distance: tuple[float, float] = (2.6, 3.2)
    fov_y_deg: tuple[float, float] = (40.0, 50.0)
    elevation_deg: tuple[float, float] = (-10.0, 45.0)
    uniform_sphere_probability: float = 0.5
    image_px: Schedule = Constant(64.0)

    def __post_init__(self) -> None:
        require(self.views_per_particle >= 1, "views_per_particle", f"must be positive, got {self.views_per_particle}")
        require_range(self.distance, "distance", 1e-3, 1e3)
        require_range(self.fov_y_deg, "fov_y_deg", 1.0, 170.0)
        require_range(self.elevation_deg, "elevation_deg", -90.0, 90.0)
        probability = self.uniform_sphere_probability
        require(0 <= probability <= 1, "uniform_sphere_probability", f"must lie in [0, 1], got {probability}")
        require(lowest(self.image_px) >= 4, "image_px", f"must be at least 4 everywhere, got {lowest(self.image_px):g}")


@dataclass(frozen=True)
class ShadingConfig:
    """DreamFusion's shading: albedo alone for ``albedo_steps``, then a random mode for each view.

    With probability ``shaded_probability`` a view is lit by a point light; ``textureless_probability`` of those lose
    their albedo. The light stands near the camera at ``light_distance``.
    """

    albedo_steps: int = 2000
    shaded_probability: float = 0.75
    textureless_probability: float = 0.5
    ambient: float = 0.1
    diffuse: float = 0.9
    light_distance: tuple[float, float] = (1.6, 3.0)

    def __post_init__(self) -> None:
        for name in ("shaded_probability", "textureless_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, f"must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the regularisers; 0 switches one off. Orientation needs normals, which cost about a plain render.

    ``round_trip`` holds a view to what the prior's VAE makes of it. An encoder takes colours that it never saw for
    colours that it knows, so that its gradient drives pixels to where no sample of the prior lies.
    """

    sparsity: Schedule = Constant(0.0)
    opaqueness: Schedule = Constant(0.0)
    orientation: Schedule = Constant(0.0)
    z_variance: Schedule = Constant(0.0)
    round_trip: Schedule = Constant(0.0)

    def __post_init__(self) -> None:
        for name in ("sparsity", "opaqueness", "orientation", "z_variance", "round_trip"):
            least = lowest(getattr(self, name))
            require(least >= 0, name, f"must not be negative anywhere, got {least:g}")


@dataclass(frozen=True)
class ExhibitConfig:
    """The mixture behind an exact score: which assets are its modes and how wide each of them is.

    ``assets`` is a folder with a manifest; empty means ``$RAYDREAM_ASSETS`` or, where that is not set, assets that the
    project makes itself. ``mode_std`` is the standard deviation of each mode in latent units. The assets are lit from
    above and in front, softly: at least ``ambient`` of their albedo is seen (1: albedo alone).
    """

    assets: str = ""
    num_modes: int = 12
    mode_std: float = 0.05
    object_radius: float = 0.9
    ambient: float = 0.6
    supersample: int = 2

    def __post_init__(self) -> None:
        require(self.num_modes >= 1, "num_modes", f"must be positive, got {self.num_modes}")
        for name in ("mode_std", "object_radius"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        require(1 <= self.supersample <= 16, "supersample", f"must be 1..16, got {self.supersample}")


@dataclass(frozen=True)
class PriorConfig:
    """The frozen text-to-image model: ``kind`` "diffusers" (``source`` is an alias or a folder) or "exhibit".

    ``image_px`` is the size of a render when it becomes a latent, 0 for the prior's own. ``sample_posterior`` draws the
    latent from the VAE's posterior, not its mean. ``dtype`` "auto": UNets in bfloat16 where that is fast, else float32.
    """

    kind: Literal["diffusers", "exhibit"] = "exhibit"
    source: str = ""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    image_px: int = 0
    sample_posterior: bool = False
    allow_download: bool = False
    exhibit: ExhibitConfig = field(default_factory=ExhibitConfig)

    def __post_init__(self) -> None:
        require(self.image_px >= 0, "image_px", f"must be 0 (the prior's own) or a size, got {self.image_px}")

    @property
    def exhibit_px(self) -> int:
        """The size of an exhibit's pictures."""
        return self.image_px or EXHIBIT_IMAGE_PX


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: a scene, how it is seen, what it is pulled by, for how many steps.

    ``lr_scale`` multiplies the scene's learning rates.
    """

    name: str = "nerf"
    num_steps: int = 1000
    lr_scale: Schedule = Constant(1.0)
    scene: NerfConfig = field(default_factory=NerfConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    shading: ShadingConfig = field(default_factory=ShadingConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", f"must be positive, got {self.num_steps}")


@dataclass(frozen=True)
class ClusterConfig:
    """Where things run. Scheduling asks for GPUs; the device is whatever torch then sees.

    -1 GPUs are one where there are enough, else such a fraction that all actors fit; none in a run that is quick on
    cores (``cluster_config``). Fractions share one. Places are waited for ``nodes_timeout_s`` where an
    autoscaler starts nodes, else ``placement_timeout_s``. ``max_restarts``: of all actors.
    """

    runtime: Literal["ray", "local"] = "ray"
    backend: Literal["auto", "reference", "numba", "cuda"] = "auto"
    gpus_per_particle: float = -1.0
    gpus_per_score: float = -1.0
    cpus_per_particle: float = -1.0
    cpus_per_score: float = -1.0
    score_replicas: int = 1
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    placement_timeout_s: float = 300.0
    nodes_timeout_s: float = 1800.0
    wire_dtype: Literal["float32", "float16"] = "float32"
    max_restarts: int = 8
    restart_backoff_s: float = 1.0
    step_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        require(self.max_restarts >= 0, "max_restarts", f"must not be negative, got {self.max_restarts}")
        require(self.restart_backoff_s >= 0, "restart_backoff_s", f"must not be negative, got {self.restart_backoff_s}")
        for name in ("score_replicas", "placement_timeout_s", "nodes_timeout_s", "step_timeout_s"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind. ``out`` is a folder or a pyarrow.fs URI; empty means ``runs/<time>-<preset>``.

    A mesh of ``material`` "lit" is shown under lamps, in its film too, "unlit" as its texture is: right where light is
    in the albedo, which is what "auto" takes a run for that was never shaded.
    """

    out: str = ""
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    preview_every: int = 100
    preview_px: int = 128
    mesh_resolution: int = 128
    mesh_max_faces: int = 8000
    mesh_threshold: float = 0.0
    texture_px: int = 512
    material: Literal["auto", "lit", "unlit"] = "auto"
    turntable_frames: int = 48
    turntable_px: int = 192

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints", "preview_every"):
            require(getattr(self, name) >= 1, name, f"must be positive, got {getattr(self, name)}")
        ranges = {
            "preview_px": (16, 2048),
            "mesh_resolution": (16, 1024),
            "mesh_max_faces": (16, 10_000_000),
            "texture_px": (16, 8192),
            "turntable_frames": (1, 3600),
            "turntable_px": (16, 4096),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            require(low <= value <= high, name, f"must be {low}..{high}, got {value}")
        require(self.mesh_threshold >= 0, "mesh_threshold", f"must not be negative, got {self.mesh_threshold}")


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    prompt: str
    preset: str
    n: int = 8
    negative_prompt: str = ""
    method: Method = "vsd"
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
        require(len(self.stages) == 1, "stages", f"exactly one NeRF stage can be run, got {len(self.stages)}")
        needs_vae = any(highest(stage.losses.round_trip) > 0 for stage in self.stages)
        remedy = "needs a prior with a VAE; leave it at 0 for an exhibit"
        require(self.prior.kind == "diffusers" or not needs_vae, "round_trip", remedy)
        if self.prior.kind == "exhibit" and self.method == "vsd":
            for stage in self.stages:
                _check_small_unet(self.prior.exhibit_px, len(stage.learner.unet_channels))
        replicas = self.cluster.score_replicas
        require(replicas <= self.n, "score_replicas", f"must not exceed n={self.n}, got {replicas}")


def _check_small_unet(image_px: int, num_levels: int) -> None:
    """The learned reference of an exhibit halves its picture at each level, down to two patches or more."""
    patch_px = SMALL_UNET_PATCH_PX if image_px % 16 == 0 else 1
    coarsest = patch_px * 2 ** (num_levels - 1)
    ok = image_px % coarsest == 0 and image_px >= 2 * coarsest
    require(ok, "prior.image_px", f"must be a multiple of {coarsest}, and not itself, for {num_levels} unet_channels")


@dataclass(frozen=True)
class ParticleConfig:
    """All that one particle needs to know; built by ``particle_config``."""

    index: int
    num_particles: int
    seed: int
    stage: StageConfig
    prior: PriorConfig
    backend: str
    wire_dtype: str
    output: OutputConfig


@dataclass(frozen=True)
class ScoreConfig:
    """All that one replica of the score model needs to know; built by ``score_config``."""

    replica: int
    num_particles: int
    seed: int
    prompt: str
    negative_prompt: str
    method: Method
    guidance: GuidanceConfig
    geometry: GeometryConfig
    learner: LearnerConfig
    prior: PriorConfig
    backend: str
    wire_dtype: str


def particle_config(run: RunConfig, stage: StageConfig, index: int) -> ParticleConfig:
    """The part of a run that concerns one particle."""
    cluster = run.cluster
    return ParticleConfig(index, run.n, run.seed, stage, run.prior, cluster.backend, cluster.wire_dtype, run.output)


def score_config(run: RunConfig, stage: StageConfig, replica: int) -> ScoreConfig:
    """The part of a run that concerns one replica of the score model."""
    cluster = run.cluster
    return ScoreConfig(
        replica, run.n, run.seed, run.prompt, run.negative_prompt, run.method, stage.guidance, stage.geometry,
        stage.learner, run.prior, cluster.backend, cluster.wire_dtype,
    )  # fmt: skip


def cluster_config(run: RunConfig) -> ClusterConfig:
    """The part of a run that says where it runs, without GPUs for models that are quick on cores: the exhibit's and
    those that ship, unless the settings ask for GPUs or for their kernels.
    """
    models = [run.prior.source] if run.prior.kind == "diffusers" else []
    models += [stage.geometry.agp for stage in run.stages]
    asks = run.cluster.backend == "cuda" or max(run.cluster.gpus_per_particle, run.cluster.gpus_per_score) > 0
    if asks or not {"off", "embedded"}.issuperset(models):
        return run.cluster
    return replace(run.cluster, gpus_per_particle=0.0, gpus_per_score=0.0)
