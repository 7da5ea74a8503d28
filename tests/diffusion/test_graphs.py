"""Recorded functions say what they say themselves, to the bit: by a tape in the place of a CUDA graph."""

import logging
from collections.abc import Callable

import pytest
import tape
import torch
from torch import Tensor

from raydream.diffusion.graphs import Graphed

Function = Callable[..., tuple[Tensor, ...]]


def check_recorded(function: Function, calls: list[tuple[Tensor, ...]], between: Callable[[], None]) -> None:
    """The recorded function against the function, call by call."""
    graphed = Graphed("a pass", function, tape.record)
    for inputs in calls:
        for ours, plain in zip(graphed(*inputs), function(*inputs), strict=True):
            assert torch.equal(ours, plain), "the recording says something else"
        between()


def draws(count: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)) for _ in range(count)]


def test_a_recording_follows_inputs_parameters_and_shapes() -> None:
    weight = torch.nn.Parameter(torch.eye(4))

    def pull(rows: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        loss = ((rows @ weight).relu() * scale).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, weight)

    def step() -> None:
        with torch.no_grad():
            weight.add_(0.1)

    check_recorded(pull, draws(3), step)
    graphed, (first, second) = Graphed("a pass", pull, tape.record), draws(2)
    kept = graphed(*first)
    assert torch.equal(kept[1], pull(*first)[1])
    graphed(*second)
    assert torch.equal(kept[1], pull(*first)[1]), "results outlive the next call"
    assert torch.equal(graphed(first[0][:2], first[1])[0], pull(first[0][:2], first[1])[0])


def test_a_number_of_the_host_that_changes_is_found() -> None:
    step = iter(range(100))

    def planted(rows: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (rows * scale + next(step),)

    with pytest.raises(AssertionError, match="the recording says something else"):
        check_recorded(planted, draws(2), lambda: None)


def test_a_parameter_that_was_replaced_is_found() -> None:
    held = [torch.ones(4)]

    def planted(rows: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (rows * scale + held[0],)

    with pytest.raises(AssertionError, match="the recording says something else"):
        check_recorded(planted, draws(2), lambda: held.__setitem__(0, held[0] + 1))


@pytest.mark.parametrize(
    "wait",
    [
        lambda rows: rows * rows.sum().item(),
        lambda rows: rows[rows > 0],
        lambda rows: rows + torch.tensor(3.0),
        lambda rows: rows + torch.randn(3, 4),
    ],
)
def test_a_wait_cannot_be_recorded_and_is_told(
    wait: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    work = []

    def planted(rows: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        work.append(0)
        return (wait(rows),)

    graphed = Graphed("the planted pass", planted, tape.record)
    with caplog.at_level(logging.WARNING):
        for inputs in draws(3):
            assert graphed(*inputs)[0].numel()
    told = [record.message for record in caplog.records]
    assert len(told) == 1, "once"
    assert told[0].startswith("the planted pass is not recorded as a CUDA graph and runs launch by launch: ")
    assert len(work) == 1 + 3, "and runs"
