"""tiny-cuda-nn (BSD-3) behind the protocol: its hash grid and its fully fused network.

Both compute with the run's own parameters, which are laid out for them in each call, so that checkpoints are the same
whatever computes. Facts of revision 6ee3546 (April 2026): a grid of ``base_resolution`` N has N vertices along an axis
and looks a point up at ``x * (N - 1) + 0.5``; a level that fits is stored densely, x fastest, its length rounded up to
8 entries, a finer one is hashed with Instant-NGP's primes; a network's weights follow one another in rows, widths
rounded up to 16. So a level of R cells is a grid of its own, of R + 1 vertices, whose points come half a cell earlier.

Imported where a run names the package; NVIDIA GPUs of compute capability 7.5 or newer.
"""

from functools import lru_cache

import tinycudann
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from raydream.backend.layout import is_dense
from raydream.types import Backend, HashGridLayout

_ENTRIES, _WIDTH = 8, 16  # what lengths of levels and widths of layers are rounded up to


class WithTinyCudaNn:
    """``inner``, with encoding and network by tiny-cuda-nn: the encoding in float32, the network in float16.

    Derivatives by the point stay ``inner``'s: the fused network has no second derivatives. Each level's points cost 12
    bytes a sample, which our own kernels do without.
    """

    def __init__(self, inner: Backend) -> None:
        self.name, self._inner = f"tinycudann+{inner.name}", inner
        self.field_gradient, self.march, self.composite = inner.field_gradient, inner.march, inner.composite
        self.prune, self.rasterize = inner.prune, inner.rasterize
        self.interpolate, self.antialias = inner.interpolate, inner.antialias
        self._encodings: dict[HashGridLayout, nn.Module] = {}
        self._networks: dict[tuple[int, int, int], nn.Module] = {}

    def field(
        self,
        points: Float[Tensor, "sample 3"],
        table: Float[Tensor, "entry feature"],
        layout: HashGridLayout,
        hidden: Float[Tensor, "unit width"],
        head: Float[Tensor, "out unit"],
    ) -> Float[Tensor, "sample out"]:
        if not len(points):
            return self._inner.field(points, table, layout, hidden, head)  # a kernel cannot be launched for nothing
        sizes = (hidden.shape[1], len(hidden), len(head))
        if sizes not in self._networks:
            self._networks[sizes] = _network(*sizes)
        weights = pad(hidden, (0, -sizes[0] % _WIDTH)), pad(head, (0, 0, 0, -sizes[2] % _WIDTH))
        params = torch.cat([weight.flatten() for weight in weights])
        features = self.features(points, table, layout)
        return functional_call(self._networks[sizes], {"params": params}, (features,)).to(table.dtype)

    def features(
        self, points: Float[Tensor, "sample 3"], table: Float[Tensor, "entry feature"], layout: HashGridLayout
    ) -> Float[Tensor, "sample width"]:
        """What the network is given: ``reference.hash_grid``."""
        if layout not in self._encodings:
            self._encodings[layout] = _encoding(layout)
        shifted = points.detach().clamp(0, 1)[:, None] - _half_cells(layout, points.device, points.dtype)[:, None]
        return functional_call(self._encodings[layout], {"params": _entries(table, layout)}, (shifted.flatten(1),))


@lru_cache
def _half_cells(layout: HashGridLayout, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " level"]:
    return 0.5 / torch.tensor(layout.resolutions, dtype=dtype, device=device)


def _encoding(layout: HashGridLayout) -> nn.Module:
    levels = [
        {
            "otype": "Grid",
            "type": "Hash",
            "n_dims_to_encode": 3,
            "n_levels": 1,
            "n_features_per_level": layout.features_per_level,
            "log2_hashmap_size": (layout.offsets[level + 1] - layout.offsets[level] - 1).bit_length(),
            "base_resolution": resolution + 1,
            "interpolation": layout.interpolation.capitalize(),
        }
        for level, resolution in enumerate(layout.resolutions)
    ]
    config = {"otype": "Composite", "nested": levels}
    return tinycudann.Encoding(3 * layout.num_levels, config, dtype=torch.float32).requires_grad_(False)


def _network(width: int, hidden_width: int, out: int) -> nn.Module:
    config = {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": hidden_width,
        "n_hidden_layers": 1,
    }
    return tinycudann.Network(width, out, config).requires_grad_(False)


def _entries(table: Float[Tensor, "entry feature"], layout: HashGridLayout) -> Float[Tensor, " number"]:
    """The table as tiny-cuda-nn stores it, each dense level rounded up to a whole number of entries."""
    lengths = [after - before for before, after in zip(layout.offsets, layout.offsets[1:])]
    levels = table.split(lengths)
    return torch.cat([
        pad(rows, (0, 0, 0, -len(rows) % _ENTRIES if is_dense(layout, level) else 0)).flatten()
        for level, rows in enumerate(levels)
    ])  # fmt: skip
