"""Ground truth for a Janus measure: an asset whose back is a second front."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydream.assets.asset import Asset
from raydream.coordinates import tight_box


def glue_two_fronts(asset: Asset, depth: float = 0.5) -> Asset:
    """The front of an asset (towards +z), cut off at ``depth`` of its box (0 is its foremost point, 1 its rearmost),
    and its mirror image behind the cut.

    Cut through the middle, a chair loses its backrest and becomes a stool; nearly all of it, cut far back, is two
    chairs back to back.
    """
    box = tight_box(asset.vertices)
    cut = box.maximum[2] - depth * box.extents[2]
    corners = asset.vertices[asset.faces]
    weights, source = clip_faces(corners[..., 2] - cut)
    front = weights @ corners[source]
    mirror = front.new_tensor([1.0, 1.0, -1.0])
    back = (front * mirror + front.new_tensor([0.0, 0.0, 2.0]) * cut).flip(1)  # flipped: faces keep their outside
    normals = weights @ asset.corner_normals[source]

    def both(values: Tensor) -> Tensor:
        kept = weights @ values[source]
        return torch.cat([kept, kept.flip(1)])

    vertices = torch.cat([front, back]).flatten(0, 1)
    return replace(
        asset,
        uid=f"{asset.uid}-janus",
        vertices=vertices,
        faces=torch.arange(len(vertices), device=vertices.device).view(-1, 3),
        corner_colors=both(asset.corner_colors),
        corner_normals=torch.cat([normals, (normals * mirror).flip(1)]),
        corner_uv=both(asset.corner_uv),
        face_texture=asset.face_texture[source].repeat(2),
    )


def clip_faces(height: Float[Tensor, "face 3"]) -> tuple[Float[Tensor, "part 3 3"], Int[Tensor, " part"]]:
    """The parts of triangles where a linear function, given at their corners, is positive.

    A part is a triangle: each of its corners is a mixture (a row of weights) of the corners of the face ``source``.
    """
    above = height > 0
    count = above.sum(-1)
    # Turned so that corner 0 is the one that stands alone on its side.
    alone = torch.where(count == 1, above.int().argmax(-1), (~above).int().argmax(-1))
    turn = (alone[:, None] + torch.arange(3, device=height.device)) % 3
    own = torch.eye(3, dtype=height.dtype, device=height.device)[turn]
    turned = height.gather(1, turn)

    def crossing(corner: int) -> Tensor:
        share = (turned[:, 0] / (turned[:, 0] - turned[:, corner]))[:, None]
        return (1 - share) * own[:, 0] + share * own[:, corner]

    first, second = crossing(1), crossing(2)
    shapes = (
        (count == 3, (own[:, 0], own[:, 1], own[:, 2])),
        (count == 1, (own[:, 0], first, second)),
        (count == 2, (first, own[:, 1], own[:, 2])),
        (count == 2, (first, own[:, 2], second)),
    )
    weights = torch.cat([torch.stack([part[chosen] for part in parts], dim=1) for chosen, parts in shapes])
    return weights, torch.cat([torch.nonzero(chosen)[:, 0] for chosen, _ in shapes])
