"""Settings of where a run's actors live, and of what it leaves behind."""

from dataclasses import dataclass, replace
from typing import Literal

from raydream.config.checks import require, require_not_negative, require_positive, require_share
from raydream.config.kernels import kernel_packages

# What torch (since 2.9 by this name) reads before it first takes a GPU's memory. Renders differ in size from step to
# step; segments that grow leave no gaps between them.
GPU_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
_FEWER_VIEWS = (8, 4, 2, 1)


@dataclass(frozen=True)
class Budget:
    """How a run stays within the memory of its GPUs: so many views at once in the score model, 0 for all, and renders
    that wait for their gradients without their graphs.
    """

    views_at_once: int = 0
    renders_again: bool = False

    def __str__(self) -> str:
        views = "1 view" if self.views_at_once == 1 else f"{self.views_at_once} views"
        parts = [f"{views} at a time"] if self.views_at_once else []
        return ", ".join([*parts, *["one particle's graph at a time"] * self.renders_again])


@dataclass(frozen=True)
class ClusterConfig:
    """Where things run. Scheduling asks for GPUs; the device is whatever torch then sees.

    -1 GPUs are one where there are enough, else such a fraction that all actors fit; none in a run that is quick on
    cores (``cluster_config``). Fractions share one. Places are waited for ``nodes_timeout_s`` where an
    autoscaler starts nodes, else ``placement_timeout_s``. ``max_restarts``: of all actors. ``deterministic``: on a GPU
    too our kernels sum in an order of their own, which costs time; else a resumed run differs there by rounding.

    ``kernels``: "auto" are "ours" for each actor's device, or plain torch ("reference") where they are not installed;
    "numba" and "cuda" are ours by name. "tinycudann", "nerfacc" and "nvdiffrast", several joined by "+", replace ours
    on an NVIDIA GPU as far as they go. All of them take up each other's checkpoints. ``graphs``: on a GPU the score
    model's passes are recorded as CUDA graphs, one for each shape.

    ``views_at_once``: the score model answers and learns from so many views at a time, which changes its results by
    rounding. ``renders`` are "kept" with their graphs until their gradients are there, or made "again" then, the same
    to the bit: so particles that share a GPU hold one graph at a time. 0 and "auto": everything at once, or on GPUs the
    first budget that their memory holds.
    """

    runtime: Literal["ray", "local"] = "ray"
    kernels: str = "auto"
    deterministic: bool = False
    graphs: bool = True
    gpus_per_particle: float = -1.0
    gpus_per_score: float = -1.0
    cpus_per_particle: float = -1.0
    cpus_per_score: float = -1.0
    score_replicas: int = 1
    views_at_once: int = 0
    renders: Literal["auto", "kept", "again"] = "auto"
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    placement_timeout_s: float = 300.0
    nodes_timeout_s: float = 1800.0
    wire_dtype: Literal["float32", "float16"] = "float32"
    max_restarts: int = 8
    restart_backoff_s: float = 1.0
    step_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        unordered = set(kernel_packages(self.kernels)) & {"tinycudann", "nerfacc"}
        remedy = f"must be false with kernels={self.kernels}, whose sums have no order; or take kernels=ours"
        require(not (self.deterministic and unordered), "deterministic", remedy)
        require_not_negative(self, "max_restarts", "restart_backoff_s", "views_at_once")
        for name in ("gpus_per_particle", "gpus_per_score", "cpus_per_particle", "cpus_per_score"):
            share = getattr(self, name)
            require(share >= 0 or share == -1, name, f"must be 0 or more, or -1 to be decided, got {share:g}")
        require_positive(self, "score_replicas", "placement_timeout_s", "nodes_timeout_s", "step_timeout_s")

    def budgets(self, num_views: int) -> list[Budget]:
        """Those that the settings leave open where a score model is asked for so many views at once, the fastest first:
        fewer views at a time cost a batch its breadth, a second render costs every particle a third of its step.
        """
        views = (self.views_at_once,) if self.views_at_once else (0, *(k for k in _FEWER_VIEWS if k < num_views))
        ways = {"auto": (False, True), "kept": (False,), "again": (True,)}[self.renders]
        return [Budget(at_once, again) for again in ways for at_once in views]

    def within(self, budget: Budget) -> "ClusterConfig":
        """The settings with nothing of the budget left open."""
        renders: Literal["kept", "again"] = "again" if budget.renders_again else "kept"
        return replace(self, views_at_once=budget.views_at_once, renders=renders)


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind. ``out`` is a folder or a pyarrow.fs URI; empty means ``runs/<time>-<preset>``.

    A mesh of ``material`` "lit" is shown under lamps, in its film too, "unlit" as its texture is: right where light is
    in the albedo, which is what "auto" takes a run for that was never shaded. ``roughness`` and ``metallic`` are the
    glTF material's factors, over the whole of it; ``normal_map`` keeps the form of the surface before decimation.

    ``mesh_pieces`` "largest" leaves one, ``mesh_watertight`` makes one solid of pieces that overlap. Beside the GLB
    there are a GLB of each of ``mesh_lods``, face counts, and a file of each of ``mesh_formats``.
    """

    out: str = ""
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    preview_every: int = 100
    preview_px: int = 128
    mesh_resolution: int = 128
    mesh_max_faces: int = 8000
    mesh_threshold: float = 0.0
    mesh_pieces: Literal["all", "largest"] = "all"
    mesh_watertight: bool = False
    mesh_lods: tuple[int, ...] = ()
    mesh_formats: tuple[Literal["obj", "stl", "ply", "usdz"], ...] = ()
    texture_px: int = 512
    normal_map: bool = False
    material: Literal["auto", "lit", "unlit"] = "auto"
    roughness: float = 1.0
    metallic: float = 0.0
    turntable_frames: int = 48
    turntable_px: int = 192

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint_every", "keep_checkpoints", "preview_every")
        require_not_negative(self, "mesh_threshold")
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
        require_share(self, "roughness", "metallic")
        for count in self.mesh_lods:
            require(16 <= count < self.mesh_max_faces, "mesh_lods", f"must be 16..mesh_max_faces - 1, got {count}")
        for name in ("mesh_lods", "mesh_formats"):
            require(len(set(getattr(self, name))) == len(getattr(self, name)), name, "must name each once")
