"""Recorded functions say what they say themselves, to the bit: by a tape in the place of a CUDA graph."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import pytest
import tape
import torch
from torch import Tensor

from raydream.diffusion.graphs import CudaRecorder, Graphed

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


def test_a_recording_on_a_gpu_follows_torch_s_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm up on a side stream that waits for and is waited for, then record once into the one pool. The calls are held
    to torch's own signatures; torch itself needs a GPU to make any of them.
    """
    told: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            told.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        told.append(f"into {name}")
        yield
        told.append(f"out of {name}")

    def graph(*args: object, **kwargs: object) -> AbstractContextManager[None]:
        call = inspect.signature(graph_class.__init__).bind(None, *args, **kwargs).arguments
        assert (call["pool"], call["capture_error_mode"]) == ("pool", "thread_local")
        return entered("graph")

    graph_class = torch.cuda.graph
    made = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def work() -> tuple[Tensor, ...]:
        told.append("work")
        return (torch.ones(2),)

    repeat, results = CudaRecorder()(work)
    assert told == [
        "side waits for main",
        "into side",
        *["work"] * 3,
        "out of side",
        "main waits for side",
        "into graph",
        "work",
        "out of graph",
    ]
    assert repeat is made.replay
    assert torch.equal(results[0], torch.ones(2))
    assert {"replay"} <= set(vars(torch.cuda.graphs.CUDAGraph))
