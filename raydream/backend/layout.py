"""Where the levels of a multiresolution hash grid live in its table (Instant-NGP, section 3)."""

from raydream.types import HashGridLayout, Interpolation

HASH_PRIMES = (1, 2_654_435_761, 805_459_861)
"""Instant-NGP eq. 4: a vertex (x, y, z) goes to entry ``(x * 1) ^ (y * p1) ^ (z * p2)`` modulo the table's size."""


def make_hash_grid_layout(
    num_levels: int,
    features_per_level: int,
    log2_table_size: int,
    base_resolution: int,
    max_resolution: int,
    interpolation: Interpolation = "linear",
) -> HashGridLayout:
    """The layout whose resolutions grow geometrically from ``base_resolution`` to ``max_resolution`` cells (eq. 2, 3).

    A level whose ``(resolution + 1)^3`` vertices fit into ``2^log2_table_size`` entries is stored densely.
    ``HashGridConfig`` has seen to it that the numbers make sense.
    """
    growth = (max_resolution / base_resolution) ** (1 / max(num_levels - 1, 1))
    resolutions = tuple(round(base_resolution * growth**level) for level in range(num_levels))
    offsets = [0]
    for resolution in resolutions:
        offsets.append(offsets[-1] + min((resolution + 1) ** 3, 1 << log2_table_size))
    return HashGridLayout(resolutions, tuple(offsets), features_per_level, interpolation)


def is_dense(layout: HashGridLayout, level: int) -> bool:
    """Whether each vertex of the level has its own entry; otherwise the level's size is a power of two."""
    return layout.offsets[level + 1] - layout.offsets[level] == (layout.resolutions[level] + 1) ** 3
