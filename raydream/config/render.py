"""Settings of a rendering job, importable without torch or Ray. Lengths are in units of the normalised object."""

from dataclasses import dataclass, field
from typing import Literal

from raydream.config.checks import require, require_not_negative, require_positive, require_range, require_share

ImageKind = Literal["rgb", "lit", "shade", "alpha", "depth", "normal", "ccm"]
# How far a normalised object's farthest point can lie from its middle: half a unit cube's diagonal, or a unit sphere.
OBJECT_RADIUS = {"longest_side": 0.75**0.5, "sphere": 1.0}


@dataclass(frozen=True)
class ViewConfig:
    """The cameras of each object and what is stored of what they see.

    ``normalise`` "longest_side" makes the longest side of an object's box 1, "sphere" puts its farthest vertex at 1
    from the box's centre. With ``stratified_azimuth`` each view has its own sector of the circle. ``ambient`` is
    the least part of the albedo that is seen in ``lit``.
    """

    num_views: int = 8
    image_px: int = 256
    supersample: int = 2
    normalise: Literal["longest_side", "sphere"] = "longest_side"
    distance: tuple[float, float] = (0.9, 1.1)
    fov_y_deg: tuple[float, float] = (45.0, 45.0)
    elevation_deg: tuple[float, float] = (-10.0, 45.0)
    azimuth_deg: tuple[float, float] = (-180.0, 180.0)
    stratified_azimuth: bool = True
    ambient: float = 0.5
    images: tuple[ImageKind, ...] = ("rgb", "lit", "alpha", "depth", "normal", "ccm")
    seed: int = 0

    def __post_init__(self) -> None:
        require(1 <= self.num_views <= 10_000, "num_views", f"must be 1..10000, got {self.num_views}")
        require(1 <= self.image_px <= 8192, "image_px", f"must be 1..8192, got {self.image_px}")
        require(1 <= self.supersample <= 8, "supersample", f"must be 1..8, got {self.supersample}")
        nearest = OBJECT_RADIUS[self.normalise]
        # a camera inside an object sees nothing of use
        require_range(self.distance, "distance", nearest + 0.02, 1000.0)
        require_range(self.fov_y_deg, "fov_y_deg", 1.0, 170.0)
        require_range(self.elevation_deg, "elevation_deg", -90.0, 90.0)
        require_range(self.azimuth_deg, "azimuth_deg", -360.0, 360.0)
        require_share(self, "ambient")
        require(bool(self.images), "images", "must name at least one kind of image")
        require(len(set(self.images)) == len(self.images), "images", "must not name a kind twice")
        require(0 <= self.seed < 2**63, "seed", f"must be 0..2^63-1, got {self.seed}")


@dataclass(frozen=True)
class LibraryConfig:
    """Which assets: those of a folder or URI with ``manifest.jsonl``, in the Objaverse layout (or the folder above it),
    or of asset files that are named by their own names; or "procedural".

    An empty ``source`` means the folder in ``$RAYDREAM_ASSETS``, or "procedural" where that is not set. ``subsets`` are
    names in the folder's ``subsets.json``, of which an asset must be in each. ``captions`` is a CSV of uid and caption
    (Cap3D), a file or URI. ``licences`` are SPDX identifiers. For faces and bytes 0 means no bound. ``max_objects``
    keeps the first by uid, 0 all. ``colour_warnings`` keeps assets of whose colours some could not be read; their rows
    tell.
    """

    source: str = ""
    subsets: tuple[str, ...] = ()
    captions: str = ""
    any_tags: tuple[str, ...] = ()
    no_tags: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    point_clouds: bool = False
    objects_only: bool = True
    known_front_only: bool = False
    min_faces: int = 0
    max_faces: int = 0
    max_bytes: int = 0
    max_objects: int = 0
    colour_warnings: bool = True

    def __post_init__(self) -> None:
        require_not_negative(self, "min_faces", "max_faces", "max_bytes", "max_objects")


@dataclass(frozen=True)
class PoolConfig:
    """How the work is done; none of it changes a row, but for what one asset may cost.

    ``workers`` 0 means one for each core of the cluster. A worker holds one shard in memory: about 10 KB a view at 64
    px and 300 KB at 512. An asset that takes longer than ``asset_limit_s`` or more memory than ``asset_memory_gb`` is
    given up.
    """

    workers: int = 0
    objects_per_shard: int = 32
    asset_limit_s: int = 120
    asset_memory_gb: float = 8.0

    def __post_init__(self) -> None:
        require_not_negative(self, "workers")
        require_positive(self, "objects_per_shard")
        require(self.asset_limit_s >= 1, "asset_limit_s", f"must be at least 1, got {self.asset_limit_s}")
        require(self.asset_memory_gb >= 0.5, "asset_memory_gb", f"must be at least 0.5, got {self.asset_memory_gb}")


@dataclass(frozen=True)
class RenderJobConfig:
    """A whole rendering job."""

    views: ViewConfig = field(default_factory=ViewConfig)
    library: LibraryConfig = field(default_factory=LibraryConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)


def ccm_recipe() -> RenderJobConfig:
    """SweetDreamer's views: longest side 1, distance 0.9 to 1.1, FoV 45. So near, most objects reach over the edge."""
    return RenderJobConfig()


def prior_recipe() -> RenderJobConfig:
    """Views to train the embedded prior on: whole objects, albedo and light apart so that they can be recoloured."""
    views = ViewConfig(
        num_views=14, image_px=64, normalise="sphere", distance=(2.7, 2.9), images=("rgb", "alpha", "shade")
    )
    return RenderJobConfig(views)


def make_recipe(name: str) -> RenderJobConfig:
    """The settings that a name stands for; ``ValueError`` naming ``recipe`` otherwise."""
    match name:
        case "ccm":
            return ccm_recipe()
        case "prior":
            return prior_recipe()
        case _:
            raise ValueError(f"recipe: must be 'ccm' or 'prior', got {name!r}")
