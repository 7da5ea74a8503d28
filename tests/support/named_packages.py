"""What tiny-cuda-nn, nerfacc and nvdiffrast publish of what raydream calls, and stand-ins that follow it on a CPU.

Facts of github.com/NVlabs/tiny-cuda-nn at 6ee3546 (bindings/torch/tinycudann/modules.py, grid.h, fully_fused_mlp.cu),
nerfacc 0.5.3 (grid.py, volrend.py, grid.cu) and nvdiffrast 0.4.0 (torch/ops.py, rasterize.cu). The stand-ins are slow,
written from those facts, and refuse what the packages would refuse or misread.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from raydream.backend import reference
from raydream.types import RaySamples

PUBLISHED = {  # parameters, with their defaults, by module and name
    ("tinycudann", "Encoding"): "n_input_dims, encoding_config, seed=1337, dtype=None",
    ("tinycudann", "Network"): "n_input_dims, n_output_dims, network_config, seed=1337",
    ("tinycudann", "Encoding.forward"): "self, x",
    ("tinycudann", "Network.forward"): "self, x",
    ("nerfacc", "traverse_grids"): (
        "rays_o, rays_d, binaries, aabbs, near_planes=None, far_planes=None, step_size=0.001, cone_angle=0.0, "
        "traverse_steps_limit=None, over_allocate=False, rays_mask=None, t_sorted=None, t_indices=None, hits=None"
    ),
    ("nerfacc", "render_weight_from_density"): (
        "t_starts, t_ends, sigmas, packed_info=None, ray_indices=None, n_rays=None, prefix_trans=None"
    ),
    ("nerfacc", "accumulate_along_rays"): "weights, values=None, ray_indices=None, n_rays=None",
    ("nvdiffrast.torch", "RasterizeCudaContext"): "device=None",
    ("nvdiffrast.torch", "rasterize"): "glctx, pos, tri, resolution, ranges=None, grad_db=True",
}
_GRID_KEYS = {  # of DOCUMENTATION.md and of Composite; others are passed over in silence
    *("otype", "type", "n_levels", "n_features_per_level", "log2_hashmap_size", "base_resolution", "per_level_scale"),
    *("interpolation", "n_dims_to_encode"),
}
_PRIMES = (1, 2_654_435_761, 805_459_861)


# --- tinycudann


class Module(nn.Module):
    """``params`` are a flat float32 parameter, read anew in each forward."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.num_params = num_params
        self.params = nn.Parameter(torch.zeros(num_params))

    def check(self, x: Tensor, width: int) -> None:
        assert x.dim() == 2
        assert x.shape[1] == width
        assert len(x) > 0, "no kernel is launched for nothing"
        assert self.params.shape == (self.num_params,)


class Encoding(Module):
    """A composite of one-level grids in float32, the only one that is asked for."""

    def __init__(self, n_input_dims: int, encoding_config: dict[str, Any], seed: int = 1337, dtype: Any = None) -> None:
        assert set(encoding_config) == {"otype", "nested"}
        assert encoding_config["otype"] == "Composite"
        assert dtype == torch.float32
        self.grids = encoding_config["nested"]
        for grid in self.grids:
            assert set(grid) <= _GRID_KEYS
            assert (grid["otype"], grid["type"], grid["n_levels"]) == ("Grid", "Hash", 1)
            assert grid["interpolation"] in ("Linear", "Smoothstep")
            assert grid["n_features_per_level"] in (1, 2, 4, 8)
        assert n_input_dims == sum(grid["n_dims_to_encode"] for grid in self.grids)
        super().__init__(sum(grid_length(grid) * grid["n_features_per_level"] for grid in self.grids))
        self.n_input_dims = n_input_dims

    def forward(self, x: Tensor) -> Tensor:
        self.check(x, self.n_input_dims)
        sizes = [grid_length(grid) * grid["n_features_per_level"] for grid in self.grids]
        levels = zip(self.grids, self.params.split(sizes), x.float().split(3, dim=1))
        return torch.cat([look_up(grid, params, points) for grid, params, points in levels], dim=1)


def grid_length(grid: dict[str, Any]) -> int:
    """Entries of a level: of all its vertices, rounded up to 8, or of its hash table where that is smaller."""
    return min(-(-(grid["base_resolution"] ** 3) // 8) * 8, 1 << grid["log2_hashmap_size"])


def look_up(grid: dict[str, Any], params: Tensor, points: Tensor) -> Tensor:
    resolution, length = grid["base_resolution"], grid_length(grid)
    entries = params.view(length, grid["n_features_per_level"])
    place = points * (resolution - 1) + 0.5
    lower = place.floor()
    fraction, total = place - lower, torch.zeros(len(points), entries.shape[1])
    if grid["interpolation"] == "Smoothstep":
        fraction = fraction * fraction * (3 - 2 * fraction)
    for corner in range(8):
        bits = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2])
        weight = torch.where(bits.bool(), fraction, 1 - fraction).prod(1)
        x, y, z = ((lower.long() + bits) & 0xFFFFFFFF).unbind(1)
        index = x + resolution * (y + resolution * z)
        if length < resolution**3:
            index = x * _PRIMES[0] ^ y * _PRIMES[1] ^ z * _PRIMES[2]
        total = total + weight[:, None] * entries[(index & 0xFFFFFFFF) % length]
    return total


class Network(Module):
    """One hidden layer in float16, its weights and what it answers rounded to that."""

    def __init__(self, n_input_dims: int, n_output_dims: int, network_config: dict[str, Any], seed: int = 1337) -> None:
        known = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None", "n_hidden_layers": 1}
        self.n_neurons = network_config["n_neurons"]
        assert network_config == known | {"n_neurons": self.n_neurons}
        assert self.n_neurons in (16, 32, 64, 128)
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.width, self.out = -(-n_input_dims // 16) * 16, -(-n_output_dims // 16) * 16
        super().__init__(self.n_neurons * (self.width + self.out))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x, self.n_input_dims)
        params, split = self.params.half().float(), self.n_neurons * self.width
        hidden, head = params[:split].view(-1, self.width), params[split:].view(self.out, -1)
        padded = torch.cat([x.half().float(), torch.ones(len(x), self.width - self.n_input_dims)], dim=1)
        return reference.mlp(padded, hidden, head).half()[:, : self.n_output_dims]


# --- nerfacc


@dataclass
class RayIntervals:
    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_left: Tensor | None = None
    is_right: Tensor | None = None


@dataclass
class Samples:
    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_valid: Tensor | None = None


def traverse_grids(
    rays_o: Tensor,
    rays_d: Tensor,
    binaries: Tensor,
    aabbs: Tensor,
    near_planes: Any = None,
    far_planes: Any = None,
    step_size: float = 1e-3,
    cone_angle: float = 0.0,
    traverse_steps_limit: int | None = None,
    over_allocate: bool = False,
    rays_mask: Any = None,
    t_sorted: Any = None,
    t_indices: Any = None,
    hits: Any = None,
) -> tuple[RayIntervals, Samples, None]:
    """Of one grid, with its intersections given. An edge that ends one interval and begins the next is stored once."""
    floats = (rays_o, rays_d, aabbs, near_planes, far_planes, t_sorted)
    assert all(tensor.dtype == torch.float32 for tensor in floats)
    assert (binaries.dtype, hits.dtype, t_indices.dtype) == (torch.bool, torch.bool, torch.int64)
    assert (len(binaries), aabbs.shape) == (1, (1, 6))
    assert t_sorted.shape == t_indices.shape == (len(rays_o), 2)
    assert (t_indices == torch.tensor([0, 1])).all(), "the first grid is entered, then left"
    size, edges = torch.tensor(binaries.shape[1:]), list[tuple[float, int, bool, bool]]()
    middles: list[tuple[float, int]] = []
    for ray in range(len(rays_o)):
        enter, leave = max(t_sorted[ray, 0], near_planes[ray]), min(t_sorted[ray, 1], far_planes[ray])
        if not hits[ray, 0] or enter >= leave:
            continue
        t, continues = float(near_planes[ray]), False
        while t + step_size / 2 < leave:
            here = rays_o[ray] + (t + step_size / 2) * rays_d[ray]
            place = (here - aabbs[0, :3]) / (aabbs[0, 3:] - aabbs[0, :3])
            cell = torch.minimum((place * size).long().clamp(min=0), size - 1)
            inside = t + step_size / 2 >= enter and bool(binaries[0][tuple(cell)])
            if inside and continues:
                edges[-1] = (*edges[-1][:2], True, True)
            elif inside:
                edges.append((t, ray, True, False))
            if inside:
                edges.append((t + step_size, ray, False, True))
                middles.append((t + step_size / 2, ray))
            t, continues = t + step_size, inside
    vals, owner, is_left, is_right = (torch.tensor(part) for part in zip(*edges))
    where, ray_indices = (torch.tensor(part) for part in zip(*middles))
    counts = torch.bincount(ray_indices, minlength=len(rays_o))
    packed = torch.stack([counts.cumsum(0) - counts, counts], dim=1)
    return RayIntervals(vals, None, owner, is_left, is_right), Samples(where, packed, ray_indices), None


def render_weight_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Any = None,
    ray_indices: Any = None,
    n_rays: Any = None,
    prefix_trans: Any = None,
) -> tuple[Tensor, None, None]:
    """Of flat samples, by the packed layout: (first sample, number of samples) of each ray."""
    assert t_starts.shape == t_ends.shape == sigmas.shape
    assert packed_info.shape[1] == 2
    assert ray_indices is None, "one of the two layouts is given"
    starts, counts = packed_info.unbind(1)
    rays = torch.repeat_interleave(torch.arange(len(counts)), counts)
    _, _, weights = reference.composite(sigmas, sigmas[:, None], RaySamples(rays, t_starts, t_ends, starts, counts))
    return weights, None, None


def accumulate_along_rays(weights: Tensor, values: Any = None, ray_indices: Any = None, n_rays: Any = None) -> Tensor:
    source = weights[:, None] if values is None else weights[:, None] * values
    return torch.zeros(n_rays, source.shape[1]).index_add(0, ray_indices, source)


def nerfacc_extension() -> dict[str, Any]:
    """The two kernels that nerfacc's own Python calls for what raydream calls of it, by name."""

    def walk(
        o: Tensor, d: Tensor, mask: Tensor, binaries: Tensor, aabbs: Tensor, t_sorted: Tensor, t_indices: Tensor,
        hits: Tensor, near: Tensor, far: Tensor, step: float, cone: float, *rest: Any,
    ) -> tuple[SimpleNamespace, SimpleNamespace, None]:  # fmt: skip
        assert mask.all()
        assert (cone, rest) == (0.0, (True, True, True, -1, False))
        planes, crossings = (near, far, step, 0.0, None, False, None), (t_sorted, t_indices, hits)
        edges, samples, _ = traverse_grids(o, d, binaries, aabbs, *planes, *crossings)
        assert samples.packed_info is not None
        starts, counts = samples.packed_info.unbind(1)
        spans = {"chunk_starts": starts, "chunk_cnts": counts, "is_valid": None}
        return SimpleNamespace(**vars(edges), **spans), SimpleNamespace(**vars(samples) | spans), None

    def exclusive_sum(starts: Tensor, counts: Tensor, inputs: Tensor, normalize: bool, backward: bool) -> Tensor:
        assert not normalize
        total = torch.zeros_like(inputs)
        for start, count in zip(starts.tolist(), counts.tolist()):
            part = inputs[start : start + count]
            sums = part.flip(0).cumsum(0).flip(0) if backward else part.cumsum(0)
            total[start : start + count] = sums - part
        return total

    return {"traverse_grids": walk, "exclusive_sum": exclusive_sum}


# --- nvdiffrast


class RasterizeCudaContext:
    def __init__(self, device: Any = None) -> None:
        self.device = torch.device(device)


def rasterize(
    glctx: RasterizeCudaContext, pos: Tensor, tri: Tensor, resolution: Any, ranges: Any = None, grad_db: bool = True
) -> tuple[Tensor, Tensor]:
    """(u, v, z/w, number of the face from 1), the lowest row first; nearest is the smallest z/w within [-1, 1]."""
    assert isinstance(glctx, RasterizeCudaContext)
    assert (glctx.device, pos.dtype, tri.dtype) == (pos.device, torch.float32, torch.int32)
    assert pos.dim() == 3
    assert len(tri) > 0
    used = pos[:, tri.long()]
    depth = used[..., 2] / used[..., 3]
    assert (used[..., 3] > 0).all(), "what crosses the eye would be cut"
    assert (depth.abs() < 1).all(), "what lies beyond the planes would be cut"
    by_w, by_depth = used[..., 3].flatten().sort(stable=True).values, depth.flatten().sort(stable=True).indices
    assert torch.equal(used[..., 3].flatten()[by_depth], by_w), "farther by w is farther by z"
    seen = reference.rasterize(pos, tri, *resolution)
    hit = seen.face >= 0
    parts = (*seen.barycentric[..., :2].unbind(-1), hit.float() * math.nan, (seen.face + 1).float())
    return torch.stack(parts, dim=-1).flip(1), torch.zeros(*seen.face.shape, 4)


# --- all of them


def stand_ins() -> dict[str, ModuleType]:
    """Modules by name, each with what it publishes."""
    parts: dict[str, list[Any]] = {
        "tinycudann": [Encoding, Network],
        "nerfacc": [traverse_grids, render_weight_from_density, accumulate_along_rays],
        "nvdiffrast": [],
        "nvdiffrast.torch": [RasterizeCudaContext, rasterize],
    }
    modules = {name: ModuleType(name) for name in parts}
    for name, published in parts.items():
        for part in published:
            setattr(modules[name], part.__name__, part)
    modules["nvdiffrast"].torch = modules["nvdiffrast.torch"]  # type: ignore[attr-defined]
    return modules


@contextmanager
def installed(modules: dict[str, ModuleType]) -> Iterator[SimpleNamespace]:
    """These modules in the place of packages that are or are not installed, for adapters that are imported within."""
    ours = [f"raydream.backend.with_{name}" for name in ("tinycudann", "nerfacc", "nvdiffrast")]
    before = {name: sys.modules.pop(name) for name in (*modules, *ours) if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()})
    finally:
        for name in (*modules, *ours):
            sys.modules.pop(name, None)
        sys.modules.update(before)
