"""What an actor does about numbers that are not finite: it leaves them out, says so, and gives up where they stay."""

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

_log = logging.getLogger(__name__)
MOST_IN_A_ROW = 10


def all_finite(tensors: Sequence[Tensor]) -> Bool[Tensor, ""]:
    """Whether all numbers are; the answer stays on the device."""
    return torch.stack(torch._foreach_norm(list(tensors))).isfinite().all()


class NonFinite:
    """Counts for each thing in how many steps in a row it was not finite."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()

    def note(self, what: str, step: int, finite: bool) -> None:
        """``FloatingPointError`` at the ``MOST_IN_A_ROW``-th time in a row: no accident, and no rollback will help."""
        if finite:
            self._in_a_row[what] = 0
            return
        self._in_a_row[what] += 1
        _log.warning("step %d: %s is not finite and left out", step, what)
        if self._in_a_row[what] >= MOST_IN_A_ROW:
            raise FloatingPointError(f"{what} was not finite in {MOST_IN_A_ROW} steps in a row, until step {step}")
