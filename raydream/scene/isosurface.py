"""From a density field to a closed triangle mesh: where to sample, and where the surface is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from raydream.scene.protocol import EmptyMeshError
from raydream.types import Mesh

CHUNK_SIZE = 65_536
COARSE_RESOLUTION = 64
BOX_PADDING = 0.1
DEBRIS_SHARE = 0.01
SOLID_DEPTH = math.log(2)
SILHOUETTE_TOLERANCE = 0.01
NUM_RUNGS = 256

DensityFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Grid:
    """Densities at the corners of cubic voxels: ``density[i, j, k]`` lies at ``lower + spacing * (i, j, k)``."""

    density: Float[np.ndarray, "x y z"]
    lower: Float[np.ndarray, "3"]
    spacing: float


def extract_mesh(
    density_fn: DensityFunction,
    resolution: int = 128,
    threshold: float | None = None,
    radius: float = 1.0,
    max_faces: int = 8_000,
    occupied: Bool[Tensor, "rx ry rz"] | None = None,
) -> Mesh:
    """The surface of ``extract_surface``, decimated to about ``max_faces`` and mended where that tore it."""
    from raydream.scene.cleaning import decimate_mesh  # packages that only an export needs

    return decimate_mesh(extract_surface(density_fn, resolution, threshold, radius, occupied), max_faces)


def extract_surface(
    density_fn: DensityFunction,
    resolution: int = 128,
    threshold: float | None = None,
    radius: float = 1.0,
    occupied: Bool[Tensor, "rx ry rz"] | None = None,
) -> Mesh:
    """The closed surface ``density = threshold`` in [-radius, radius]^3, its faces counter-clockwise from outside, in
    float64.

    ``density_fn`` maps world points ``[sample, 3]`` (on the CPU, at most 65,536 at once) to densities ``[sample]`` on
    any device. ``resolution`` counts grid points along the longest side of the object's own box, which a first coarse
    pass finds. ``threshold=None`` takes the ``silhouette_threshold``. ``occupied`` has cells over the same cube; the
    density is zero outside of them, as it is for the renderer. What lies inside another piece and pieces with less than
    1 % of the faces are dropped.

    Raises EmptyMeshError where there is no surface and FloatingPointError where the density is not finite.
    """
    corner = np.full(3, float(radius))
    coarse = _sample_grid(density_fn, -corner, corner, min(resolution, COARSE_RESOLUTION), radius, occupied)
    lower, upper = _tight_box(coarse, _level(coarse, threshold))
    grid = _sample_grid(density_fn, lower.clip(-radius), upper.clip(max=radius), resolution, radius, occupied)
    return kept_surface(*_march(grid, _level(grid, threshold)))


def kept_surface(vertices: Float[np.ndarray, "vertex 3"], faces: Int[np.ndarray, "face 3"]) -> Mesh:
    """A closed surface without what lies inside another piece and pieces with less than 1 % of the faces."""
    from raydream.scene.cleaning import compact, drop_unseen_pieces

    vertices, faces = compact(vertices, drop_unseen_pieces(vertices, faces, DEBRIS_SHARE))
    return Mesh(vertices=torch.from_numpy(vertices), faces=torch.from_numpy(faces))


def solid_values(
    density_fn: DensityFunction,
    resolution: int,
    radius: float = 1.0,
    occupied: Bool[Tensor, "rx ry rz"] | None = None,
) -> tuple[Float[Tensor, "x y z"], Float[Tensor, "2 3"]]:
    """What marching tetrahedra start from: ``1 - 2^(1 - density / level)``, in [-1, 1] and 0 on the surface that
    ``extract_mesh`` finds, at ``resolution`` points along each side of a cube around the object, and its two corners.

    ProlificDreamer and threestudio clamp ``density - level`` to [-1, 1] instead, which is a step where density jumps.
    """
    corner = np.full(3, float(radius))
    coarse = _sample_grid(density_fn, -corner, corner, COARSE_RESOLUTION, radius, occupied)
    lower, upper = _tight_box(coarse, _level(coarse, None))
    half = min(float((upper - lower).max()) / 2, radius)
    centre = ((lower + upper) / 2).clip(half - radius, radius - half)
    grid = _sample_grid(density_fn, centre - half, centre + half, resolution, radius, occupied)
    values = 1 - 2 * np.exp2(-grid.density / _level(grid, None))
    box = np.stack([centre - half, centre + half]).astype(np.float32)
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(box)


def solid_box(
    density_fn: DensityFunction,
    radius: float = 1.0,
    occupied: Bool[Tensor, "rx ry rz"] | None = None,
    resolution: int = COARSE_RESOLUTION,
) -> Float[Tensor, "2 3"] | None:
    """The lower and upper corner of what ``extract_mesh`` would take for the object, to half a voxel; None where
    no ray is solid. Arguments as there.
    """
    corner = np.full(3, float(radius))
    grid = _sample_grid(density_fn, -corner, corner, resolution, radius, occupied)
    level = silhouette_threshold(grid.density, grid.spacing)
    if level is None or not (grid.density > level).any():
        return None
    inside = np.argwhere(grid.density > level)
    box = np.stack([inside.min(0) - 0.5, inside.max(0) + 0.5]) * grid.spacing + grid.lower
    return torch.from_numpy(box.clip(-radius, radius).astype(np.float32))


def silhouette_threshold(density: Float[np.ndarray, "x y z"], spacing: float) -> float | None:
    """The density whose solid casts the silhouettes that volume rendering shows; None where no ray is solid.

    A grid column stands for a ray of an orthographic camera along its axis. The render shows it where its optical depth
    exceeds ln 2 (opacity 0.5), the solid where its peak exceeds the threshold. A sharp object allows many thresholds:
    this is the middle one of a geometric ladder among those that misjudge at most 1 % of the object's columns more than
    the best does. The mean of the positive densities (threestudio) instead moves with the size of the empty part and
    with the density deep inside, neither of which can be seen.
    """
    seen = np.concatenate([(density.sum(axis) * spacing > SOLID_DEPTH).ravel() for axis in range(3)])
    peak = np.concatenate([density.max(axis).ravel() for axis in range(3)])
    if not seen.any():
        return None
    # A column that is seen holds at least the mean density that hides what lies behind it.
    ladder = np.geomspace(SOLID_DEPTH / (spacing * max(density.shape)), peak.max(), NUM_RUNGS, endpoint=False)
    num_lost = np.searchsorted(np.sort(peak[seen]), ladder, side="right")
    num_added = (~seen).sum() - np.searchsorted(np.sort(peak[~seen]), ladder, side="right")
    num_wrong = num_lost + num_added
    good = ladder[num_wrong <= num_wrong.min() + SILHOUETTE_TOLERANCE * seen.sum()]
    return float(good[len(good) // 2])


def _level(grid: _Grid, threshold: float | None) -> float:
    level = silhouette_threshold(grid.density, grid.spacing) if threshold is None else threshold
    densest = float(grid.density.max())
    if level is None or densest <= level:
        reason = "no ray through it reaches opacity 0.5" if level is None else f"the threshold is {level:.4g}"
        what = f"no surface: the densest point of the field has density {densest:.4g}, {reason}"
        raise EmptyMeshError(f"{what}; output.mesh_threshold sets another")
    return level


def _sample_grid(
    density_fn: DensityFunction,
    lower: Float[np.ndarray, "3"],
    upper: Float[np.ndarray, "3"],
    resolution: int,
    radius: float,
    occupied: Bool[Tensor, "rx ry rz"] | None,
) -> _Grid:
    """Densities on a grid of cubic voxels, centred in the box; its longest side has ``resolution`` points."""
    spacing = float((upper - lower).max()) / (resolution - 1)
    num_points = np.floor((upper - lower) / spacing + 1e-6).astype(int) + 1
    lower = (lower + upper - spacing * (num_points - 1)) / 2
    axes = [lower[axis] + spacing * np.arange(num_points[axis]) for axis in range(3)]
    wanted = np.ones(num_points, dtype=bool)
    if occupied is not None:
        cells = occupied.cpu().numpy()
        cell_index = [
            np.floor((axes[axis] / radius + 1) / 2 * cells.shape[axis]).astype(int).clip(0, cells.shape[axis] - 1)
            for axis in range(3)
        ]
        wanted = cells[np.ix_(*cell_index)]
    wanted_index = np.flatnonzero(wanted)
    density = np.zeros(wanted.size, dtype=np.float32)
    for start in range(0, len(wanted_index), CHUNK_SIZE):
        chunk = wanted_index[start : start + CHUNK_SIZE]
        index = np.unravel_index(chunk, wanted.shape)
        points = np.stack([axes[axis][index[axis]] for axis in range(3)], axis=-1)
        points = points.clip(-radius, radius).astype(np.float32)
        with torch.no_grad():
            density[chunk] = density_fn(torch.from_numpy(points)).float().cpu().numpy()
    if not np.isfinite(density).all():
        raise FloatingPointError("the density field is not finite: the particle has diverged")
    return _Grid(density.reshape(wanted.shape), lower, spacing)


def _tight_box(grid: _Grid, level: float) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """The box of all that exceeds the level, one voxel wider (the surface lies in it) and then 10 % on either side."""
    inside = np.argwhere(grid.density > level)
    lower = grid.lower + grid.spacing * (inside.min(0) - 1)
    upper = grid.lower + grid.spacing * (inside.max(0) + 1)
    padding = BOX_PADDING * (upper - lower)
    return lower - padding, upper + padding


def _march(grid: _Grid, level: float) -> tuple[Float[np.ndarray, "vertex 3"], Int[np.ndarray, "face 3"]]:
    """Marching cubes on ``1 - 2^(-density / level)``, which is 0.5 on the surface.

    Density may jump from 0 to 1000 between neighbours; interpolated as it is, the surface would cling to the empty one
    and show the grid as stairs. The bounded field puts it in the middle. The empty rim closes what touches the box.
    """
    from skimage.measure import marching_cubes  # a step measures a box at most, and needs no package for it

    solid = np.pad(1 - np.exp2(-grid.density / level), 1)
    vertices, faces, _, _ = marching_cubes(solid, 0.5, gradient_direction="ascent", allow_degenerate=False)
    return grid.lower + grid.spacing * (vertices.astype(np.float64) - 1), faces.astype(np.int64)
