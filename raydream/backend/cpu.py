"""The CPU kernels as a ``Backend``: numba loops (``cpu_*.py``) with hand-written backward passes.

One thread, no GIL, compiled once into numba's cache (``NUMBA_CACHE_DIR`` says where); every sum has one fixed order, so
equal inputs give equal bits.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from raydream.backend import cpu_field, cpu_mesh, cpu_raster, cpu_render, reference
from raydream.backend.exercise import exercise
from raydream.types import Fragments, HashGridLayout, MeshEdges, Rays, RaySamples


class NumbaBackend:
    """The numba kernels for float32 and float64 tensors on the CPU."""

    name = "numba"
    prune = staticmethod(reference.prune)

    def field(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> Float[Tensor, "sample out"]:
        """In its arguments' dtype, also under autocast: it never leaves the cache, and bfloat16 was not faster."""
        _check_table(table, layout)
        output, _ = _Field.apply(points.detach(), table, layout, _pad4(hidden), _pad4(head), False)
        return output[:, : len(head)]

    def field_gradient(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample 3"]]:
        """Never stores the encoding's Jacobian."""
        _check_table(table, layout)
        output, gradient = _Field.apply(points.detach(), table, layout, _pad4(hidden), _pad4(head), True)
        return output[:, : len(head)], gradient

    def march(
        self,
        rays: Rays,
        occupancy: Bool[Tensor, "rx ry rz"],
        radius: float,
        step_size: float,
        jitter: Float[Tensor, " ray"],
    ) -> RaySamples:
        """The reference's, bit by bit."""
        origins, directions = _array(rays.origins), _array(rays.directions)
        number = origins.dtype.type
        scalars = number(radius), number(step_size), number(0.5 / radius)
        packed = cpu_render.march(origins, directions, _array(occupancy), *scalars, _array(jitter))
        return RaySamples(*map(torch.from_numpy, packed))

    def composite(
        self, density: Float[Tensor, " sample"], values: Float[Tensor, "sample channel"], samples: RaySamples
    ) -> tuple[Float[Tensor, "ray channel"], Float[Tensor, " ray"], Float[Tensor, " sample"]]:
        assert len(density) == len(values) == len(samples.t_start) == int(samples.counts.sum()), "samples do not match"
        return _Composite.apply(density, values, samples)

    def rasterize(
        self, clip: Float[Tensor, "view vertex 4"], faces: Int[Tensor, "face 3"], height_px: int, width_px: int
    ) -> Fragments:
        """The nearest face at each pixel centre; of equally near ones that of the lowest index."""
        _check_faces(faces, clip.shape[1])
        return Fragments(*_Rasterize.apply(clip, faces.int(), height_px, width_px))

    def interpolate(
        self, values: Float[Tensor, "vertex channel"], faces: Int[Tensor, "face 3"], fragments: Fragments
    ) -> Float[Tensor, "view h w channel"]:
        _check_faces(faces, len(values))
        return _Interpolate.apply(values, fragments.barycentric, faces.int(), fragments.face)

    def antialias(
        self,
        image: Float[Tensor, "view h w channel"],
        clip: Float[Tensor, "view vertex 4"],
        edges: MeshEdges,
        fragments: Fragments,
    ) -> Float[Tensor, "view h w channel"]:
        assert image.shape[:3] == fragments.face.shape, "image and fragments do not match"
        return _Antialias.apply(image, clip, edges, fragments)


def warm_up() -> None:
    """Compiles every float32 kernel or loads it from the cache; to be called once on a node before its actors start."""
    exercise(NumbaBackend(), "cpu")


class _Field(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, layout, hidden, head, with_gradient):
        rows = (4 if with_gradient else 1) * hidden.shape[1] * cpu_field.BLOCK
        saved = table.new_empty(-(-len(points) // cpu_field.BLOCK), rows)
        output = table.new_empty(len(points), len(head))
        gradient = table.new_empty(len(points) if with_gradient else 0, 3)
        weights = _array(table).ravel(), *_constants(layout), _array(hidden), _array(head)
        cpu_field.field(_array(points), *weights, saved.numpy(), output.numpy(), gradient.numpy())
        ctx.save_for_backward(points, table, hidden, head, saved)
        ctx.layout = layout
        return output, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_gradient):
        points, table, hidden, head, saved = ctx.saved_tensors
        inputs = [_array(tensor) for tensor in (hidden, head, saved, grad_output, grad_gradient)]
        grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (table, hidden, head)]
        outputs = grads[0].numpy().ravel(), grads[1].numpy(), grads[2].numpy()
        cpu_field.field_backward(_array(points), *_constants(ctx.layout), *inputs, *outputs)
        return None, grads[0], None, grads[1], grads[2], None


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, density, values, samples):
        num_rays = len(samples.counts)
        accumulated, opacity = values.new_empty(num_rays, values.shape[1]), density.new_empty(num_rays)
        weights, remaining = torch.empty_like(density), torch.empty_like(density)
        spans = [_array(part) for part in (samples.t_start, samples.t_end, samples.starts, samples.counts)]
        outputs = [tensor.numpy() for tensor in (accumulated, opacity, weights, remaining)]
        cpu_render.composite(_array(density), _array(values), *spans, *outputs)
        ctx.save_for_backward(values, weights, remaining)
        ctx.spans = spans
        return accumulated, opacity, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        values, weights, remaining = ctx.saved_tensors
        grad_density, grad_values = torch.empty_like(weights), values.new_empty(values.shape)
        inputs = [_array(tensor) for tensor in (weights, remaining, *grads)]
        cpu_render.composite_backward(_array(values), *ctx.spans, *inputs, grad_density.numpy(), grad_values.numpy())
        return grad_density, grad_values, None


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clip, faces, height_px, width_px):
        size = (len(clip), height_px, width_px)
        face = torch.empty(size, dtype=torch.long)
        barycentric, depth = clip.new_empty(*size, 3), clip.new_empty(size)
        cpu_raster.rasterize(_array(clip), faces.numpy(), face.numpy(), barycentric.numpy(), depth.numpy())
        ctx.mark_non_differentiable(face)
        ctx.save_for_backward(clip, faces, face, barycentric, depth)
        return face, barycentric, depth

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads):
        clip, *seen = ctx.saved_tensors
        grad_clip = torch.empty_like(clip, memory_format=torch.contiguous_format)
        cpu_mesh.rasterize_backward(*map(_array, (clip, *seen, *grads)), grad_clip.numpy())
        return grad_clip, None, None, None


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, barycentric, faces, face):
        image = values.new_empty(face.numel(), values.shape[1])
        cpu_mesh.interpolate(*map(_array, (values, faces, face.flatten(), barycentric.view(-1, 3))), image.numpy())
        ctx.save_for_backward(values, faces, face, barycentric)
        return image.view(*face.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_image):
        values, faces, face, barycentric = ctx.saved_tensors
        grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
        grad_barycentric = torch.empty_like(barycentric, memory_format=torch.contiguous_format)
        inputs = values, faces, face.flatten(), barycentric.view(-1, 3), grad_image.reshape(face.numel(), -1)
        cpu_mesh.interpolate_backward(*map(_array, inputs), grad_values.numpy(), grad_barycentric.view(-1, 3).numpy())
        return grad_values, grad_barycentric, None, None


class _Antialias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, clip, edges, fragments):
        parts = edges.vertices, edges.opposite, edges.starts, edges.counts, fragments.face, fragments.depth
        ctx.outline = cpu_mesh.find_outline(*map(_array, (clip, *parts)))
        blended = image.clone(memory_format=torch.contiguous_format)
        channels = image.shape[3]
        cpu_mesh.blend(_array(image).reshape(-1, channels), *ctx.outline, blended.view(-1, channels).numpy())
        ctx.save_for_backward(image, clip, edges.vertices)
        return blended

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_blended):
        image, clip, vertices = ctx.saved_tensors
        _, height_px, width_px, channels = image.shape
        grad_image = grad_blended.clone(memory_format=torch.contiguous_format)
        grad_clip = torch.empty_like(clip, memory_format=torch.contiguous_format)
        before, after = (_array(tensor).reshape(-1, channels) for tensor in (image, grad_blended))
        outputs = grad_image.view(-1, channels).numpy(), grad_clip.numpy()
        mesh = _array(clip), _array(vertices), height_px, width_px
        cpu_mesh.blend_backward(before, *ctx.outline, *mesh, after, *outputs)
        return grad_image, grad_clip, None, None


@lru_cache
def _constants(layout: HashGridLayout) -> tuple[np.ndarray, np.ndarray, tuple[int, ...], bool]:
    """Resolutions, offsets, a tuple as long as the features of a level, and whether blends are smooth, as the hash grid
    kernels take them.
    """
    sizes = np.array(layout.resolutions), np.array(layout.offsets), (0,) * layout.features_per_level
    return *sizes, layout.interpolation == "smoothstep"


def _check_faces(faces: Tensor, num_vertices: int) -> None:
    assert not faces.numel() or (faces.min() >= 0 and faces.max() < num_vertices), "faces name missing vertices"


def _check_table(table: Tensor, layout: HashGridLayout) -> None:
    # The kernels index without bounds, in 32 bits.
    assert table.shape == (layout.num_entries, layout.features_per_level), "the table does not fit the layout"
    assert table.numel() < 2**31, "the table is too large for 32-bit indices"


def _pad4(weight: Tensor) -> Tensor:
    """A layer's weight with zero rows and columns up to multiples of 4, as the kernels want it."""
    columns_short, rows_short = -weight.shape[1] % 4, -len(weight) % 4
    return pad(weight, (0, columns_short, 0, rows_short)) if columns_short or rows_short else weight


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory, or a copy of it where it is not contiguous: one layout, so one compiled kernel."""
    return tensor.detach().contiguous().numpy()
