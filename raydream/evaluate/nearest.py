"""R-precision for an exhibit, whose prior is a set of assets: is the asset nearest to a particle one of the
prompt's?
"""

import torch
from jaxtyping import Float
from torch import Tensor

from raydream.assets.exhibit import exhibit_assets, match_prompt
from raydream.config.prior import ExhibitConfig
from raydream.evaluate.diversity import turned_distances
from raydream.evaluate.results import Recognition
from raydream.evaluate.turntable import Turntable
from raydream.priors.exhibit_modes import ExhibitModes
from raydream.types import Backend, Cameras

NUM_OTHERS = 48
_CPU = torch.device("cpu")


class NearestAsset:
    """The assets of an exhibit's prompt, and others of the same folder that the prompt does not mean, as
    distractors.
    """

    def __init__(self, prompt: str, config: ExhibitConfig, cameras: Cameras, backend: Backend) -> None:
        """Raises ValueError naming ``prompt`` or ``assets`` as ``exhibit_assets`` does."""
        source = config.assets or None
        meant = {record.uid for record in match_prompt(prompt, source)[1]}
        modes = exhibit_assets(prompt, source, config.num_modes)
        others = [asset for asset in exhibit_assets(None, source, NUM_OTHERS) if asset.uid not in meant]
        self._assets, self._num_modes = [*modes, *others], len(modes)
        modes_seen = ExhibitModes(self._assets, config.supersample, backend, _CPU, object_radius=1.0)
        self._tables = _pictures(modes_seen, cameras)

    def recognise(self, table: Turntable) -> Recognition:
        """By the picture distance; exhibits fix where front is, so nothing is turned."""
        single = torch.stack([_unturned(table.rgba, other) for other in self._tables])
        whole = torch.stack([turned_distances(table.rgba, other)[0] for other in self._tables])
        order = whole.argsort(stable=True).tolist()
        rank = next(place for place, index in enumerate(order, 1) if index < self._num_modes)
        best = self._assets[order[0]]
        right_views = (single.argmin(0) < self._num_modes).float().mean()
        return Recognition("nearest", rank == 1, rank, best.caption or best.uid, float(right_views), len(order))


def _pictures(modes: ExhibitModes, cameras: Cameras) -> Float[Tensor, "asset view h w 4"]:
    """The modes as their own light shows them, as premultiplied colour and coverage again."""
    latents = modes.means(cameras.c2w, cameras.fov_y_deg, torch.arange(modes.num_modes), cameras.height_px)
    channels = latents.permute(1, 0, 3, 4, 2)
    alpha = (channels[..., 3:] + 1) / 2
    return torch.cat([(channels[..., :3] + alpha) / 2, alpha], dim=-1)


def _unturned(first: Float[Tensor, "view h w 4"], second: Float[Tensor, "view h w 4"]) -> Float[Tensor, " view"]:
    squared = (first - second).square().sum(dim=(1, 2, 3))
    union = torch.maximum(first[..., 3], second[..., 3]).sum(dim=(1, 2))
    return squared / union.clamp_min(1e-9)
