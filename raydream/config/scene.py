"""Settings of a scene: what a particle optimises, how it is lit and seen, what its regularisers weigh."""

from dataclasses import dataclass, field, fields
from typing import Literal

from raydream.config.checks import require, require_not_negative, require_positive, require_range, require_share
from raydream.schedule import Constant, Schedule, highest, lowest


@dataclass(frozen=True)
class HashGridConfig:
    """Multiresolution hash grid (Instant-NGP). Adam walks the whole table: on a CPU keep it at 2^17 entries or less.

    ``smoothstep`` has no creases between cells, so that normals are continuous; ``linear`` costs a little less.
    """

    num_levels: int = 8
    log2_table_size: int = 15
    base_resolution: int = 16
    max_resolution: int = 160
    interpolation: Literal["linear", "smoothstep"] = "linear"

    def __post_init__(self) -> None:
        require(1 <= self.num_levels <= 32, "num_levels", f"must be 1..32, got {self.num_levels}")
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
    ``min_alpha`` leaves out samples that absorb less of the light, ``min_transmittance`` those that less of it reaches
    (threestudio: 0.01, 1e-4); 0 leaves out none. With ``tile_samples`` the field is asked for so many samples at a time
    and again on the way back, so that its hidden layers are held for one tile; 0 asks once for all. With
    ``random_background_probability`` a view has a drawn colour, or grey, within ``random_background`` behind it.
    """

    kind: Literal["nerf"] = "nerf"
    radius: float = 1.0
    grid: HashGridConfig = field(default_factory=HashGridConfig)
    hidden_width: int = 64
    initial_density_lambda: float = 10.0
    initial_density_radius: float = 0.5
    density_noise: float = 0.0
    occupancy_resolution: int = 32
    occupancy_every: int = 16
    samples_per_diagonal: int = 96
    min_alpha: float = 0.0
    min_transmittance: float = 0.0
    tile_samples: int = 0
    background: Literal["network", "constant"] = "network"
    random_background_probability: float = 0.5
    random_background: tuple[float, float] = (0.0, 1.0)
    random_background_grey: bool = False
    bfloat16: Literal["auto", "on", "off"] = "auto"
    lr_grid: float = 1e-2
    lr_network: float = 1e-3
    lr_background: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(self, "radius", "initial_density_radius")
        require_not_negative(self, "lr_grid", "lr_network", "lr_background", "tile_samples")
        require_share(self, "random_background_probability")
        least = {"hidden_width": 1, "occupancy_resolution": 4, "occupancy_every": 1, "samples_per_diagonal": 4}
        for name, low in least.items():
            require(getattr(self, name) >= low, name, f"must be at least {low}, got {getattr(self, name)}")
        for name in ("min_alpha", "min_transmittance"):
            require(0 <= getattr(self, name) < 1, name, f"must lie in [0, 1), got {getattr(self, name)}")
        require_range(self.random_background, "random_background", 0.0, 1.0)


@dataclass(frozen=True)
class MeshConfig:
    """The scene of a later stage: a surface by marching tetrahedra (DMTet) and a field of colours over space.

    ``resolution`` counts the cells of the grid along each side of the object's box; published grids of N points in its
    sense (128, 256) are about as fine as N / 2 here. Where the stage starts from nothing the surface is an ellipsoid of
    ``radii``. With both ``lr_values`` and ``lr_deformation`` at
    0 the surface stays as it is and only colours learn. ``grid`` and ``hidden_width`` are those of the stage before,
    whose colours are taken over; backgrounds are ``NerfConfig``'s.
    """

    kind: Literal["mesh"] = "mesh"
    radius: float = 1.0
    resolution: int = 64
    radii: tuple[float, float, float] = (0.5, 0.5, 0.5)
    grid: HashGridConfig = field(default_factory=HashGridConfig)
    hidden_width: int = 64
    random_background_probability: float = 0.5
    random_background: tuple[float, float] = (0.0, 1.0)
    random_background_grey: bool = False
    bfloat16: Literal["auto", "on", "off"] = "auto"
    lr_values: float = 5e-3
    lr_deformation: float = 5e-3
    lr_grid: float = 1e-2
    lr_network: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(self, "radius", "hidden_width")
        require_not_negative(self, "lr_values", "lr_deformation", "lr_grid", "lr_network")
        require_share(self, "random_background_probability")
        require_range(self.random_background, "random_background", 0.0, 1.0)
        require(4 <= self.resolution <= 512, "resolution", f"must be 4..512, got {self.resolution}")
        ok = all(0 < radius < self.radius for radius in self.radii)
        require(ok, "radii", f"must be positive and below radius={self.radius:g}, got {list(self.radii)}")

    @property
    def frozen(self) -> bool:
        """Whether the surface stays as it is."""
        return self.lr_values == self.lr_deformation == 0


SceneConfig = NerfConfig | MeshConfig


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
        require_positive(self, "views_per_particle")
        require_share(self, "uniform_sphere_probability")
        require_range(self.distance, "distance", 1e-3, 1e3)
        require_range(self.fov_y_deg, "fov_y_deg", 1.0, 170.0)
        require_range(self.elevation_deg, "elevation_deg", -90.0, 90.0)
        require(lowest(self.image_px) >= 4, "image_px", f"must be at least 4 everywhere, got {lowest(self.image_px):g}")


@dataclass(frozen=True)
class ShadingConfig:
    """DreamFusion's shading: albedo alone for ``albedo_steps``, then a random mode for each view.

    With probability ``shaded_probability`` a view is lit by a point light; ``textureless_probability`` of those lose
    their albedo.
    """

    albedo_steps: int = 2000
    shaded_probability: float = 0.75
    textureless_probability: float = 0.5

    def __post_init__(self) -> None:
        require_share(self, "shaded_probability", "textureless_probability")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the regularisers; 0 switches one off. Orientation needs normals, which cost about a plain render; it
    and ``z_variance`` are of volumes, ``normal_consistency`` and ``laplacian`` of meshes.

    ``round_trip`` holds a view to what the prior's VAE makes of it. An encoder takes colours that it never saw for
    colours that it knows, so that its gradient drives pixels to where no sample of the prior lies.
    """

    sparsity: Schedule = Constant(0.0)
    opaqueness: Schedule = Constant(0.0)
    orientation: Schedule = Constant(0.0)
    z_variance: Schedule = Constant(0.0)
    round_trip: Schedule = Constant(0.0)
    normal_consistency: Schedule = Constant(0.0)
    laplacian: Schedule = Constant(0.0)

    def __post_init__(self) -> None:
        for weight in fields(self):
            least = lowest(getattr(self, weight.name))
            require(least >= 0, weight.name, f"must not be negative anywhere, got {least:g}")

    def check_kind(self, kind: Literal["nerf", "mesh"]) -> None:
        """``ValueError`` naming the first one that such a scene has nothing for."""
        strange = ("normal_consistency", "laplacian") if kind == "nerf" else ("orientation", "z_variance")
        for name in strange:
            ok = highest(getattr(self, name)) == 0
            require(
                ok, f"losses.{name}", f"must be 0 in a stage whose scene is a {kind}, which has no such regulariser"
            )
