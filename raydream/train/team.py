"""The workers of one training and the mean of their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Team:
    """The workers that train one model; for more than one, ``torch.distributed`` is set up already."""

    rank: int = 0
    size: int = 1

    def largest(self, values: list[float], device: torch.device) -> list[float]:
        """Each value's maximum over the team, so that all workers decide the same."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, device=device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.tolist()


class MeanGradients:
    """A model's gradients, averaged over a team while backward still computes the rest of them.

    Each lies in one of a few flat buffers, in the order in which backward makes them; a full buffer is sent at once.
    The buffers stay for all steps: to a CPU, fresh pages in every step cost more than the sending. ``parameters`` are
    of one type, on one device, and every worker's loss depends on the same ones; a gradient that is None stays so.
    """

    def __init__(self, parameters: Sequence[Parameter], team: Team, buffer_bytes: int = 4 * 2**20) -> None:
        self._parameters, self._team, self._buffer_bytes = parameters, team, buffer_bytes
        self._order: list[int] = []  # of the first backward
        self._buffers: list[Tensor] = []
        self._places: dict[int, tuple[int, Tensor]] = {}  # of each parameter: the buffer's number, the part of it
        self._counts: list[int] = []  # of the gradients in each buffer
        self._missing: list[int] = []
        self._sent: list[distributed.Work] = []
        if team.size > 1:
            for index, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, index))

    def wait(self) -> None:
        """After ``backward``, by all workers together: leaves the team's mean in every ``grad``."""
        if self._team.size == 1:
            return
        if not self._buffers:
            self._lay_out()
            for index, parameter in enumerate(self._parameters):
                if parameter.grad is not None:
                    self._arrive(index, parameter)
        while len(self._sent) < len(self._buffers):  # those with parameters that the loss does not use
            self._send()
        for work in self._sent:
            work.wait()
        self._sent.clear()
        self._missing = list(self._counts)

    def _lay_out(self) -> None:
        """Makes the buffers, in rank 0's order; what no gradient came for in the first step lies at the end."""
        rest = sorted(set(range(len(self._parameters))) - set(self._order))
        first = self._parameters[0]
        order = torch.tensor(self._order + rest, device=first.device)
        distributed.broadcast(order, 0)
        groups: list[list[int]] = [[]]
        room = self._buffer_bytes
        for index in order.tolist():
            size = self._parameters[index].numel() * first.element_size()
            if groups[-1] and size > room:
                groups.append([])
                room = self._buffer_bytes
            groups[-1].append(index)
            room -= size
        for number, group in enumerate(groups):
            sizes = [self._parameters[index].numel() for index in group]
            self._buffers.append(torch.zeros(sum(sizes), dtype=first.dtype, device=first.device))
            for index, part in zip(group, self._buffers[number].split(sizes)):
                self._places[index] = number, part.view_as(self._parameters[index])
        self._counts = [len(group) for group in groups]
        self._missing = list(self._counts)

    def _arrive(self, index: int, parameter: Tensor) -> None:
        """Called by backward for each finished gradient."""
        if not self._buffers:
            self._order.append(index)
            return
        assert parameter.grad is not None
        number, place = self._places[index]
        torch.div(parameter.grad, self._team.size, out=place)
        parameter.grad = place
        self._missing[number] -= 1
        while len(self._sent) < len(self._buffers) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        """Starts the next buffer's sum; all workers send them in the same order."""
        work = distributed.all_reduce(self._buffers[len(self._sent)], async_op=True)
        assert work is not None
        self._sent.append(work)
