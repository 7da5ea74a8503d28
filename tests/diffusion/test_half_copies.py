"""A LoRA as on a GPU: computed with in half precision, learned in float32, merged into the weights to answer."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_prior import TEXT_WIDTH, make_tiny_prior
from tiny_score import LEARNER, new_score, views_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raydream.diffusion import lora
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.lora import LoraDenoiser
from raydream.distill.score import HALF_LOSS_SCALE, Score
from raydream.types import Condition

CPU = torch.device("cpu")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
DRAWS = torch.Generator().manual_seed(1)
Z_T, TEXT = torch.randn(2, 4, 16, 16, generator=DRAWS), torch.randn(2, 8, TEXT_WIDTH, generator=DRAWS)
TIMES, CONDITION = torch.tensor([500, 50]), Condition(TEXT, torch.eye(4).expand(2, 4, 4), torch.ones(2), torch.ones(2))


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("priors") / "prior")


def new_lora(prior: Path, dtype: torch.dtype, halved: bool) -> LoraDenoiser:
    """One that has learned something already."""
    learner = LoraDenoiser(DiffusersDenoiser.load(prior, dtype, CPU), LEARNER.rank, 5, halved)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in learner.trainable().items():
            if ".lora_B." in name:
                value.copy_(0.01 * torch.randn(value.shape, generator=draws))
    return learner


def loss_of(learner: LoraDenoiser) -> Tensor:
    return learner.predict(Z_T, TIMES, CONDITION).square().flatten(1).mean(1).sum()


def gradients(learner: LoraDenoiser, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss / 4096 * HALF_LOSS_SCALE, list(learner.trainable().values()))
    assert {each.dtype for each in found} == {torch.float32}
    return torch.cat([(each / HALF_LOSS_SCALE).flatten() for each in found])


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        if func._schema.name in ("aten::mm", "aten::addmm"):
            self.by_dtype[args[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


@HALVES
def test_gradients_are_those_of_float32(prior: Path, dtype: torch.dtype) -> None:
    exact, halved = (
        gradients(learner, loss_of(learner))
        for learner in (new_lora(prior, torch.float32, True), new_lora(prior, dtype, True))
    )
    assert torch.nn.functional.cosine_similarity(exact, halved, dim=0) > 0.999


@HALVES
def test_only_the_camera_is_multiplied_in_float32(prior: Path, dtype: torch.dtype) -> None:
    found = []
    for halved in (False, True):
        learner = new_lora(prior, dtype, halved)
        with _Products() as products:
            learner.predict(Z_T, TIMES, CONDITION)
        found.append(products.by_dtype)
    whole, half = found
    assert half[torch.float32] == 2, "the camera's two layers"
    assert whole[torch.float32] == 2 + len([name for name in learner.trainable() if ".lora_" in name])
    assert half.total() == whole.total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_gradients_it_is_the_frozen_model_with_other_weights(prior: Path, dtype: torch.dtype) -> None:
    """It answers as well as it would by activations, and leaves nothing behind."""
    exact, learner = new_lora(prior, torch.float32, False), new_lora(prior, dtype, True)
    frozen = learner.frozen
    with torch.no_grad():
        for each in (exact, learner):
            for name, value in each.trainable().items():
                if ".lora_B." in name:
                    value.mul_(20)  # far beyond rounding
        truth = exact.eps(Z_T, TIMES, CONDITION) - exact.frozen.eps(Z_T, TIMES, CONDITION)
        with _Products() as asked:
            plain = frozen.eps(Z_T, TIMES, CONDITION)
        with _Products() as products:
            merged = learner.eps(Z_T, TIMES, CONDITION) - plain
    added = learner.eps(Z_T, TIMES, CONDITION).detach() - plain
    layers = len([name for name in learner.trainable() if ".lora_A." in name])
    assert products.by_dtype.total() == asked.by_dtype.total() + layers + 2, "one sum a layer, and the camera"
    cosine = torch.nn.functional.cosine_similarity
    ours, theirs = (float(cosine(truth.flatten(), each.flatten(), dim=0)) for each in (merged, added))
    assert 1 - ours < max(2 * (1 - theirs), 1e-5)
    assert float(merged.norm() / truth.norm()) == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            learner.eps(Z_T, TIMES, replace(CONDITION, text=TEXT[..., :-1]))
        assert torch.equal(frozen.eps(Z_T, TIMES, CONDITION), plain)


@HALVES
def test_passes_and_updates_between_forward_and_backward_lose_nothing(prior: Path, dtype: torch.dtype) -> None:
    learner = new_lora(prior, dtype, True)
    expected = gradients(learner, loss_of(learner))
    loss = loss_of(learner)
    with torch.no_grad():
        for name, value in learner.trainable().items():
            if ".lora_" in name:
                value.add_(1)
        learner.frozen.eps(Z_T, TIMES, CONDITION), learner.eps(Z_T, TIMES, CONDITION)
    assert torch.equal(gradients(learner, loss), expected)


@HALVES
def test_an_update_below_the_half_s_resolution_is_kept(prior: Path, dtype: torch.dtype) -> None:
    learner = new_lora(prior, dtype, True)
    weight = next(value for name, value in learner.trainable().items() if ".lora_A." in name)
    before, small = weight.detach().clone(), 2.0**-6 * torch.finfo(dtype).eps
    with torch.no_grad():
        first = learner.eps(Z_T, TIMES, CONDITION)
        for _ in range(2**10):
            weight.mul_(1 + small)
            if torch.equal(weight.to(dtype), before.to(dtype)):
                assert torch.equal(learner.eps(Z_T, TIMES, CONDITION), first)
        assert not torch.equal(learner.eps(Z_T, TIMES, CONDITION), first), "many of them are seen"


def test_a_checkpoint_of_either_kind_goes_on_as_the_other(prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def new(halved: bool) -> Score:
        monkeypatch.setattr(lora, "LoraDenoiser", partial(LoraDenoiser, hastened=halved))
        return new_score(prior, dtype="float16")

    for first, second in ((False, True), (True, False)):
        score, other = new(first), new(second)
        score.fit(0, range(3), *views_of(0))
        kept = score.snapshot()
        assert {array.dtype for name, array in kept.items() if name.startswith("learned/")} == {np.dtype("float32")}
        assert other.restore(kept) == 1
        again = other.snapshot()
        assert all(np.array_equal(kept[name], again[name]) for name in kept), "nothing is lost on the way"
        ours, theirs = (each.fit(1, range(3), *views_of(1)) for each in (score, other))
        assert ours["loss/fit"] == pytest.approx(theirs["loss/fit"], rel=1e-2)
        assert not any(np.array_equal(kept[name], other.snapshot()[name]) for name in kept if ".lora_" in name)
