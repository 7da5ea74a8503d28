"""nerfacc (0.5.3, MIT) behind the protocol: its traversal of an occupancy grid and its compositing.

The occupancy grid itself stays ours: its running maximum is part of every checkpoint, and any kernels may go on from
that. Imported where a run names the package; float32 on NVIDIA GPUs.
"""

import os

import nerfacc
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from raydream.backend.reference import box_span
from raydream.types import Backend, Rays, RaySamples


class WithNerfacc:
    """``inner``, with marching and compositing by nerfacc. Samples are the reference's but for those whose midpoint
    lies on a border to the last bits; sums over a ray are atomic additions, in any order.
    """

    def __init__(self, inner: Backend) -> None:
        # It is compiled at first use, by nvcc. Its sources are no C++20, which torch asks for since 2.12 (lerp is std's
        # there); of several -std nvcc takes the last one.
        os.environ.setdefault("NVCC_APPEND_FLAGS", "-std=c++17")
        self.name, self._inner = f"nerfacc+{inner.name}", inner
        self.field, self.field_gradient, self.rasterize = inner.field, inner.field_gradient, inner.rasterize
        self.prune, self.interpolate, self.antialias = inner.prune, inner.interpolate, inner.antialias

    def march(
        self,
        rays: Rays,
        occupancy: Bool[Tensor, "rx ry rz"],
        radius: float,
        step_size: float,
        jitter: Float[Tensor, " ray"],
    ) -> RaySamples:
        # It steps from the near plane, so a jittered entry into the box shifts all intervals of a ray. It is handed our
        # own entries and exits, which rays parallel to a face have too.
        near, far = box_span(rays, radius)
        box = near.new_full((1, 6), radius)
        box[:, :3] = -radius
        intervals, samples, _ = nerfacc.traverse_grids(
            rays.origins,
            rays.directions,
            occupancy[None],
            box,
            near_planes=near + jitter * step_size,
            far_planes=far,
            step_size=step_size,
            t_sorted=torch.stack((near, far), dim=-1),
            t_indices=torch.arange(2, device=near.device).expand(len(near), 2),
            hits=(near < far)[:, None],
        )
        starts, counts = samples.packed_info.unbind(-1)
        t_start, t_end = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
        return RaySamples(samples.ray_indices, t_start, t_end, starts, counts)

    def composite(
        self, density: Float[Tensor, " sample"], values: Float[Tensor, "sample channel"], samples: RaySamples
    ) -> tuple[Float[Tensor, "ray channel"], Float[Tensor, " ray"], Float[Tensor, " sample"]]:
        if not len(density):
            return self._inner.composite(density, values, samples)  # nerfacc's kernels want something to do
        rays = torch.stack((samples.starts, samples.counts), dim=-1)
        weights, _, _ = nerfacc.render_weight_from_density(samples.t_start, samples.t_end, density, packed_info=rays)
        per_ray = {"ray_indices": samples.ray_index, "n_rays": len(samples.counts)}
        opacity = nerfacc.accumulate_along_rays(weights, None, **per_ray)
        return nerfacc.accumulate_along_rays(weights, values, **per_ray), opacity.squeeze(-1), weights
