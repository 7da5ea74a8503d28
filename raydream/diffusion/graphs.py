"""CUDA graphs: what a function of tensors launches is recorded once for each shape of its inputs, and from then on
started as a whole. A UNet's passes are hundreds of launches each, which take the host longer than the device.
"""

import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from raydream.types import Condition, Denoiser, Latents

_log = logging.getLogger(__name__)
_WARM_UPS = 3  # before a recording, on a stream of its own: libraries set themselves up in the first passes

Work = Callable[[], tuple[Tensor, ...]]
Recording = tuple[Callable[[], None], tuple[Tensor, ...]]  # repeats the work; its results, each time in the same place
Record = Callable[[Work], Recording]


class CudaRecorder:
    """Records by ``torch.cuda.CUDAGraph``. All recordings share their memory: a result is good until the next one."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Recording:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results


class Graphed:
    """A function of tensors by way of recordings; what it returns is the caller's own.

    Of inputs of the same shapes it must always ask the same, whatever their numbers: it waits for none, and takes none
    from the host that changes. What else it reads, such as parameters, must stay where it is in memory. What cannot be
    recorded is said once, as ``name``, and runs launch by launch.
    """

    def __init__(self, name: str, function: Callable[..., tuple[Tensor, ...]], record: Record) -> None:
        self._name, self._function, self._record = name, function, record
        self._recorded: dict[Hashable, tuple[list[Tensor], Recording] | None] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((each.shape, each.dtype) for each in inputs)
        if key not in self._recorded:
            self._recorded[key] = self._recording(inputs)
        recorded = self._recorded[key]
        if recorded is None:
            return self._function(*inputs)
        places, (repeat, results) = recorded
        torch._foreach_copy_(places, inputs)
        repeat()
        own = [torch.empty_like(result) for result in results]
        torch._foreach_copy_(own, results)
        return tuple(own)

    def _recording(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Recording] | None:
        places = [torch.empty_like(each, memory_format=torch.contiguous_format).copy_(each) for each in inputs]
        try:
            return places, self._record(lambda: self._function(*places))
        except RuntimeError as error:
            _log.warning("%s is not recorded as a CUDA graph and runs launch by launch: %s", self._name, error)
            return None


class GraphedDenoiser:
    """A ``Denoiser`` by way of recordings; not differentiable."""

    def __init__(self, name: str, denoiser: Denoiser, record: Record) -> None:
        @torch.no_grad()
        def eps(z_t: Tensor, t: Tensor, *cond: Tensor) -> tuple[Tensor]:
            return (denoiser.eps(z_t, t, Condition(*cond)),)

        self._eps = Graphed(name, eps, record)

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        return self._eps(z_t, t, cond.text, cond.c2w, cond.fov_y_deg, cond.camera_weight)[0]
