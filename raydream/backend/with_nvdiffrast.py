"""nvdiffrast (0.4.0; its licence allows no commercial use) behind the protocol: which face is seen at each pixel.

Barycentrics, interpolation and antialiasing stay ours: its antialiasing follows edges of the faces that are seen at
pixels, and loses the outline where faces are smaller than that. Imported where a run names the package; on NVIDIA GPUs.
"""

import nvdiffrast.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from raydream.backend import reference
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
        self.interpolate, self.antialias = inner.interpolate, inner.antialias
        self._contexts: dict[torch.device, object] = {}

    def rasterize(
        self, clip: Float[Tensor, "view vertex 4"], faces: Int[Tensor, "face 3"], height_px: int, width_px: int
    ) -> Fragments:
        if len(faces) >= _MAX_FACES:
            raise ValueError(f"faces: nvdiffrast takes fewer than {_MAX_FACES}, got {len(faces)}; use our own kernels")
        if clip.device not in self._contexts:
            self._contexts[clip.device] = nvdiffrast.torch.RasterizeCudaContext(device=clip.device)
        context, size = self._contexts[clip.device], (height_px, width_px)
        places, usable = reference.project(clip, *size)
        # one by one, for each view leaves out faces of its own
        views = zip(clip.detach().float(), usable)
        face = torch.stack([_seen_faces(context, vertices, drawn, faces.long(), size) for vertices, drawn in views])
        return reference.make_fragments(places[:, faces.long()], face)


def _seen_faces(
    context: object,
    clip: Float[Tensor, "vertex 4"],
    usable: Bool[Tensor, " vertex"],
    faces: Int[Tensor, "face 3"],
    size: tuple[int, int],
) -> Int[Tensor, "h w"]:
    (drawn,) = usable[faces].all(1).nonzero(as_tuple=True)
    face = torch.full(size, -1, device=clip.device)
    if not len(drawn):
        return face
    image, _ = nvdiffrast.torch.rasterize(
        context, _positions(clip, usable)[None], faces[drawn].int(), size, grad_db=False
    )
    number = image[0, ..., 3].long() - 1
    hit = number >= 0
    face[hit] = drawn[number[hit]]
    return face


def _positions(clip: Float[Tensor, "vertex 4"], usable: Tensor) -> Float[Tensor, "vertex 4"]:
    """Corners as nvdiffrast takes them: y downwards, for its first row is the lowest, and a z that puts each corner in
    front of another as its w does, between two planes that nothing lies beyond.
    """
    x, y, _, w = clip.unbind(1)
    near, far = 0.99 * w[usable].min(), 1.01 * w[usable].max()
    z = ((far + near) * w - 2 * far * near) / (far - near)
    nowhere = clip.new_tensor([0.0, 0.0, 0.0, 1.0])
    return torch.where(usable[:, None], torch.stack((x, -y, z, w), dim=-1), nowhere)
