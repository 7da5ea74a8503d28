"""nvdiffrast (0.4.0; its licence allows no commercial use) behind the protocol: its rasteriser.

Its interpolation and antialiasing have no place in the protocol: they are for meshes that are optimised.
Imported where a run names the package; float32 on NVIDIA GPUs.
"""

import nvdiffrast.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.types import Backend, Fragments

_MAX_FACES = 2**24  # beyond which its float32 images hold bits in place of a face's number


class WithNvdiffrast:
    """``inner``, with rasterising by nvdiffrast. It moves corners to a grid of sixteenths of a pixel, so that a pixel
    centre next to an edge may fall to the neighbour, and of equally near faces any one wins.
    """

    def __init__(self, inner: Backend) -> None:
        self.name = f"nvdiffrast+{inner.name}"
        self.field, self.field_gradient = inner.field, inner.field_gradient
        self.march, self.prune, self.composite = inner.march, inner.prune, inner.composite
        self._contexts: dict[torch.device, object] = {}

    def rasterize(
        self, clip: Float[Tensor, "view vertex 4"], faces: Int[Tensor, "face 3"], height_px: int, width_px: int
    ) -> Fragments:
        if len(faces) >= _MAX_FACES:
            raise ValueError(f"faces: nvdiffrast takes fewer than {_MAX_FACES}, got {len(faces)}; use our own kernels")
        if clip.device not in self._contexts:
            self._contexts[clip.device] = nvdiffrast.torch.RasterizeCudaContext(device=clip.device)
        context, size = self._contexts[clip.device], (height_px, width_px)
        # one by one, for each view leaves out faces of its own
        views = [_rasterize_view(context, vertices, faces.long(), size) for vertices in clip.detach().float()]
        face, barycentric, depth = (torch.stack(images) for images in zip(*views, strict=True))
        return Fragments(face, barycentric.to(clip.dtype), depth.to(clip.dtype))


def _rasterize_view(
    context: object, clip: Float[Tensor, "vertex 4"], faces: Int[Tensor, "face 3"], size: tuple[int, int]
) -> tuple[Int[Tensor, "h w"], Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    usable = (clip[:, 3] > 0) & clip.isfinite().all(1)
    (drawn,) = usable[faces].all(1).nonzero(as_tuple=True)
    face, barycentric = torch.full(size, -1, device=clip.device), clip.new_zeros(*size, 3)
    if not len(drawn):
        return face, barycentric, clip.new_zeros(size)
    image, _ = nvdiffrast.torch.rasterize(
        context, _positions(clip, usable)[None], faces[drawn].int(), size, grad_db=False
    )
    number = image[0, ..., 3].long() - 1
    hit = number >= 0
    face[hit] = drawn[number[hit]]
    u, v = image[0, ..., 0][hit], image[0, ..., 1][hit]
    barycentric[hit] = torch.stack((u, v, 1 - u - v), dim=-1)
    corner_depth = clip[:, 3][faces[face.clamp(min=0)]]
    return face, barycentric, (barycentric * corner_depth).sum(-1)


def _positions(clip: Float[Tensor, "vertex 4"], usable: Tensor) -> Float[Tensor, "vertex 4"]:
    """Corners as nvdiffrast takes them: y downwards, for its first row is the lowest, and a z that puts each corner in
    front of another as its w does, between two planes that nothing lies beyond.
    """
    x, y, _, w = clip.unbind(1)
    near, far = 0.99 * w[usable].min(), 1.01 * w[usable].max()
    z = ((far + near) * w - 2 * far * near) / (far - near)
    nowhere = clip.new_tensor([0.0, 0.0, 0.0, 1.0])
    return torch.where(usable[:, None], torch.stack((x, -y, z, w), dim=-1), nowhere)
