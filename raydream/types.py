"""The types that cross module borders: cameras, rays, renders, views, meshes, and the Protocols behind them.

Conventions: renders are ``[view, h, w, channel]`` with colours in [0, 1]; latents are ``[view, latent, h, w]``. The
world is right-handed with +y up, a camera looks down its own -z (see ``camera.py``), and an object lies in [-1, 1]^3.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

Latents = Float[Tensor, "view latent h w"]
PerView = Float[Tensor, " view"]
Interpolation = Literal["linear", "smoothstep"]


@dataclass(frozen=True)
class Cameras:
    """Pinhole cameras of one image size, all looking at (about) the origin."""

    c2w: Float[Tensor, "view 4 4"]
    fov_y_deg: Float[Tensor, " view"]
    azimuth_deg: Float[Tensor, " view"]
    elevation_deg: Float[Tensor, " view"]
    height_px: int
    width_px: int

    @property
    def num_views(self) -> int:
        return self.c2w.shape[0]


@dataclass(frozen=True)
class Rays:
    """Half-lines in world space; directions are unit vectors, so distances along a ray are scene units."""

    origins: Float[Tensor, "ray 3"]
    directions: Float[Tensor, "ray 3"]


@dataclass(frozen=True)
class RaySamples:
    """Packed intervals along rays, sorted by ray and then by distance (nerfacc's packed layout).

    Ray ``r`` owns the samples ``starts[r] : starts[r] + counts[r]``.
    """

    ray_index: Int[Tensor, " sample"]
    t_start: Float[Tensor, " sample"]
    t_end: Float[Tensor, " sample"]
    starts: Int[Tensor, " ray"]
    counts: Int[Tensor, " ray"]


@dataclass(frozen=True)
class Fragments:
    """What a rasteriser found at each pixel; ``face`` is -1 where there is nothing."""

    face: Int[Tensor, "view h w"]
    barycentric: Float[Tensor, "view h w 3"]
    depth: Float[Tensor, "view h w"]


@dataclass(frozen=True)
class MeshEdges:
    """The edges of a mesh: two vertices each, the lower first; and the third corners of the faces that meet there.

    Edge ``e`` owns ``opposite[starts[e] : starts[e] + counts[e]]``: one where the mesh ends, two inside, and more where
    it is no manifold.
    """

    vertices: Int[Tensor, "edge 2"]
    opposite: Int[Tensor, " corner"]
    starts: Int[Tensor, " edge"]
    counts: Int[Tensor, " edge"]


@dataclass(frozen=True)
class HashGridLayout:
    """Resolution and place in the table of each level of a multiresolution hash grid (Instant-NGP, section 3).

    ``resolutions[l]`` is the number of cells along an axis; a level with ``(resolution + 1)^3 <= table_size``
    vertices is stored densely, a finer one is hashed into ``table_size`` entries. ``offsets`` has one more entry than
    there are levels. ``smoothstep`` blends by ``x^2 (3 - 2 x)`` of the place ``x`` in a cell in place of ``x``.
    """

    resolutions: tuple[int, ...]
    offsets: tuple[int, ...]
    features_per_level: int
    interpolation: Interpolation = "linear"

    @property
    def num_levels(self) -> int:
        return len(self.resolutions)

    @property
    def num_entries(self) -> int:
        return self.offsets[-1]

    @property
    def num_features(self) -> int:
        return self.num_levels * self.features_per_level


@dataclass(frozen=True)
class Render:
    """Differentiable images of a scene. ``rgb`` includes the background; ``foreground`` is premultiplied and has none.

    ``normal`` is a unit vector in world space weighted by opacity (zero where there is nothing); ``ccm`` the canonical
    coordinate in [0, 1]^3 weighted by opacity. Both are None where nobody asked for them, ``volume`` where no volume
    was rendered, ``mesh`` where no surface was.
    """

    rgb: Float[Tensor, "view h w 3"]
    foreground: Float[Tensor, "view h w 3"]
    opacity: Float[Tensor, "view h w 1"]
    depth: Float[Tensor, "view h w 1"]
    normal: Float[Tensor, "view h w 3"] | None = None
    ccm: Float[Tensor, "view h w 3"] | None = None
    volume: "VolumeSamples | None" = None
    mesh: "Mesh | None" = None


@dataclass(frozen=True)
class VolumeSamples:
    """The ray samples behind a volume render, for its regularisers; ``normals`` are None where nobody needs them."""

    rays: Rays
    samples: RaySamples
    weights: Float[Tensor, " sample"]
    normals: Float[Tensor, "sample 3"] | None


@dataclass(frozen=True)
class Views:
    """All that leaves a particle in a step, for one branch: latents and the cameras they were seen from."""

    latents: Latents
    c2w: Float[Tensor, "view 4 4"]
    fov_y_deg: Float[Tensor, " view"]
    azimuth_deg: Float[Tensor, " view"]
    elevation_deg: Float[Tensor, " view"]

    @property
    def num_views(self) -> int:
        return self.latents.shape[0]


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh in the world, bare or textured; ``uv`` is OpenGL's: v points up, a texture's row 0 is its top.

    ``normal_map`` holds unit vectors in the tangent space of ``scene.tangents``. ``note`` says what its maker did
    otherwise than asked, and why.
    """

    vertices: Float[Tensor, "vertex 3"]
    faces: Int[Tensor, "face 3"]
    uv: Float[Tensor, "vertex 2"] | None = None
    texture: Float[Tensor, "th tw 3"] | None = None
    normal_map: Float[Tensor, "nh nw 3"] | None = None
    roughness: float = 1.0
    metallic: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Condition:
    """What a denoiser may be told about each view: a text embedding and a camera.

    ``camera_weight`` is 0 where the camera is dropped (classifier-free training of the camera branch) and 1 elsewhere.
    """

    text: Float[Tensor, "view token width"]
    c2w: Float[Tensor, "view 4 4"]
    fov_y_deg: Float[Tensor, " view"]
    camera_weight: Float[Tensor, " view"]


@runtime_checkable
class Denoiser(Protocol):
    """A noise predictor for ``z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps``; eps-, v- and flow-models hide inside."""

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The predicted noise; ``t`` is a diffusion timestep in 0..999."""
        ...


@runtime_checkable
class Backend(Protocol):
    """The numerical kernels. Values and gradients of every implementation agree with ``backend/reference.py``."""

    name: str

    def field(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> Float[Tensor, "sample out"]:
        """``head @ relu(hidden @ features)`` at points in [0, 1]^3; differentiable by table, hidden and head."""
        ...

    def field_gradient(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample 3"]]:
        """The same, and the derivative of output 0 by the point; both differentiable by table, hidden and head."""
        ...

    def march(
        self,
        rays: Rays,
        occupancy: Bool[Tensor, "rx ry rz"],
        radius: float,
        step_size: float,
        jitter: Float[Tensor, " ray"],
    ) -> RaySamples:
        """Intervals of length ``step_size`` inside the box [-radius, radius]^3 whose midpoint lies in an occupied cell.

        The k-th interval of a ray starts at ``t_near + (k + jitter) * step_size``, jitter in [0, 1). Not
        differentiable.
        """
        ...

    def prune(
        self,
        density: Float[Tensor, " sample"],
        samples: RaySamples,
        min_alpha: Float[Tensor, ""],
        min_transmittance: float,
    ) -> RaySamples:
        """The samples that can be seen: those with ``1 - exp(-density_i delta_i) >= min_alpha`` for which
        ``T_i >= min_transmittance``, where ``T_i`` counts all samples before. Not differentiable.
        """
        ...

    def composite(
        self,
        density: Float[Tensor, " sample"],
        values: Float[Tensor, "sample channel"],
        samples: RaySamples,
    ) -> tuple[Float[Tensor, "ray channel"], Float[Tensor, " ray"], Float[Tensor, " sample"]]:
        """Volume rendering: accumulated values, opacity, and the weight of each sample.

        ``weight_i = T_i (1 - exp(-density_i delta_i))``; differentiable by density and values through all three
        results.
        """
        ...

    def rasterize(
        self, clip: Float[Tensor, "view vertex 4"], faces: Int[Tensor, "face 3"], height_px: int, width_px: int
    ) -> Fragments:
        """The nearest face at each pixel centre, with perspective-correct barycentrics and depth ``w``, both
        differentiable by ``clip``.

        Clip space is OpenGL's with row 0 at the top of the image; its z plays no part. Faces are seen from both sides;
        those with a corner at ``w <= 0``, or at a place that is not finite, are left out.
        """
        ...

    def interpolate(
        self, values: Float[Tensor, "vertex channel"], faces: Int[Tensor, "face 3"], fragments: Fragments
    ) -> Float[Tensor, "view h w channel"]:
        """Values of the corners of the face at each pixel, 0 where there is none; differentiable by values and
        barycentrics. ``faces`` may be others than those that were rasterised, of the same number: those of a texture.
        """
        ...

    def antialias(
        self,
        image: Float[Tensor, "view h w channel"],
        clip: Float[Tensor, "view vertex 4"],
        edges: MeshEdges,
        fragments: Fragments,
    ) -> Float[Tensor, "view h w channel"]:
        """The image, blended across the outlines of the mesh; differentiable by image and clip (Laine et al. 2020,
        section 3.3, but driven by the mesh's edges, so that it holds for faces smaller than pixels too).

        Where an edge with all its faces on one side passes between the centres of two neighbours, the nearer pixel
        gives or loses as much as the face covers beyond or short of the border between them. Of several edges the
        outermost counts. ``edges`` are those of the places: a seam of a texture must not cut them.
        """
        ...
