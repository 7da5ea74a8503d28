"""What ``Score`` keeps: replicas that stay one model, steps that count once, snapshots that go on to the bit."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny_prior import make_tiny_prior
from tiny_score import LEARNER, learn, new_score, views_of

from raydream.config.names import MethodName
from raydream.distill.messages import Message


@pytest.fixture(scope="module")
def epsilon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("priors") / "epsilon")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_replicas_learn_as_one(epsilon: Path, rounds: int) -> None:
    """Two replicas that share their gradients are equal to the bit, and to rounding what one alone would be."""
    learner = replace(LEARNER, fits_per_step=rounds, timesteps_per_view=2)
    alone, *replicas = (new_score(epsilon, learner=learner) for _ in range(3))
    for step in range(3):
        messages = views_of(step)
        stats = alone.fit(step, range(3), *messages)
        losses = []
        for index in range(rounds):
            shares = [
                score.fit_gradients(step, index, range(3)[r::2], *messages[r::2]) for r, score in enumerate(replicas)
            ]
            figures = [score.fit_update(step, index == rounds - 1, *shares) for score in replicas]
            assert figures[0] == figures[1]
            losses.append(figures[0]["loss/fit"])
        assert np.mean(losses) == pytest.approx(stats["loss/fit"], rel=1e-4)
        assert [score.step for score in replicas] == [alone.step] * 2
    for name, parameter in alone.learned.items():
        assert torch.equal(replicas[0].learned[name], replicas[1].learned[name])
        torch.testing.assert_close(replicas[0].learned[name], parameter, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_learning_rate_warms_up_and_weights_decay(epsilon: Path) -> None:
    """AdamW's first step is the learning rate in each weight that has a gradient, beside the decay of all of them."""
    learner = replace(LEARNER, lr=1e-2, lr_warm_up_steps=10, weight_decay=0.5)
    score = new_score(epsilon, learner=learner)
    before = {name: value.detach().clone() for name, value in score.learned.items()}
    score.fit(0, range(3), *views_of(0))
    for name, value in score.learned.items():
        moved = (value.detach() - (1 - 1e-3 * 0.5) * before[name]).abs().max()
        first = "lora_B" in name or "linear_2" in name  # the others' gradients are still 0
        assert float(moved) == pytest.approx(1e-3 if first else 0.0, rel=1e-3, abs=1e-7)
    for step in range(1, 12):
        score.fit(step, range(3), *views_of(step))
        assert score.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * min(1.0, (step + 1) / 10))


def test_every_round_of_a_step_has_its_own_noise(epsilon: Path) -> None:
    score = new_score(epsilon)
    first, again, second = (score.fit_gradients(0, i, range(3), *views_of(0)) for i in (0, 0, 1))
    assert_same(first, again)
    assert first["share"][-1] != second["share"][-1]  # the loss


def test_shares_are_summed_as_one_array_in_their_order(epsilon: Path) -> None:
    """The same bits as tensor by tensor: each parameter's gradients added one after the other."""
    score = new_score(epsilon)
    draws = np.random.default_rng(0)
    sizes = {name: value.shape for name, value in score.learned.items()}
    shares = [{"share": draws.standard_normal(sum(map(np.prod, sizes.values())) + 1, np.float32)} for _ in range(5)]
    given: dict[str, torch.Tensor] = {}
    with patch.object(score, "_update", lambda step, gradients: given.update(gradients) or {}):
        figures = score.fit_update(0, True, *shares)
    begin = 0
    for name, shape in sizes.items():
        parts = [torch.from_numpy(share["share"][begin : begin + shape.numel()]).view(shape) for share in shares]
        assert torch.equal(given[name], torch.stack(parts).sum(0)), name
        begin += shape.numel()
    assert figures == {"loss/fit": float(sum(share["share"][-1] for share in shares))}


def assert_same(first: Message, second: Message) -> None:
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_step_is_learned_once(epsilon: Path) -> None:
    """Doubled and stale calls change nothing, and a gradient from a model of another step is not given."""
    score = learn(new_score(epsilon), 2)
    before = score.snapshot()
    shares = [score.fit_gradients(2, 0, range(3), *views_of(2))]
    assert score.fit(1, range(3), *views_of(1)) == score.fit(3, range(3), *views_of(3)) == {}
    assert score.fit_update(1, True, *shares) == score.fit_update(3, True, *shares) == {}
    assert_same(score.snapshot(), before)
    for step in (1, 3):
        with pytest.raises(RuntimeError, match=f"has learned 2 steps, asked to guide step {step}"):
            score.guide(step, "rgb", range(3), *views_of(step))
    score.guide(2, "rgb", range(3), *views_of(2))
    assert_same(score.snapshot(), before)


def test_guiding_and_learning_leave_the_prior_alone(epsilon: Path) -> None:
    score = new_score(epsilon)
    frozen = {k: v.clone() for k, v in score.branches["rgb"].denoiser.unet.named_parameters() if "lora_" not in k}
    start = {name: value.clone() for name, value in score.learned.items()}
    for step in range(2):
        score.guide(step, "rgb", range(3), *views_of(step))
        score.fit(step, range(3), *views_of(step))
    now = dict(score.branches["rgb"].denoiser.unet.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert all(value.grad is None for value in now.values())
    assert not any(torch.equal(score.learned[name], value) for name, value in start.items())


@pytest.mark.parametrize("method", ["sds", "sjc"])
def test_without_a_learner_nothing_is_learned(epsilon: Path, method: MethodName) -> None:
    score = new_score(epsilon, method)
    assert score.fit(0, range(3), *views_of(0)) == {}
    assert score.warm_up(0, range(3), *views_of(0)) == {"loss/fit": 0.0}
    assert set(score.snapshot()) == {"step"}
    score.guide(4, "rgb", range(3), *views_of(4))  # any step will do


def test_a_restored_score_goes_on_to_the_bit(epsilon: Path) -> None:
    first = learn(new_score(epsilon), 2)
    snapshot = first.snapshot()
    kept = {name: array.copy() for name, array in snapshot.items()}
    again = new_score(epsilon)
    assert again.restore(snapshot) == 2
    answers = []
    for score in (first, again):
        *gradients, _ = score.guide(2, "rgb", range(3), *views_of(2))
        score.fit(2, range(3), *views_of(2))
        answers.append([*gradients, *score.guide(3, "rgb", range(3), *views_of(3))[:-1]])
    assert_same(first.snapshot(), again.snapshot())
    assert all(np.array_equal(a, b) for a, b in zip(*answers, strict=True))
    assert_same(snapshot, kept)  # a snapshot is a copy
    assert first.restore(snapshot) == 2  # back in time, in place
    assert_same(first.snapshot(), snapshot)


def test_a_snapshot_of_another_learner_is_refused(epsilon: Path) -> None:
    other = new_score(epsilon, learner=replace(LEARNER, rank=2)).snapshot()
    for snapshot in (other, new_score(epsilon, "sds").snapshot()):
        with pytest.raises(ValueError, match=r"^resume: .*other parameters"):
            new_score(epsilon).restore(snapshot)


def test_a_warm_up_learns_before_step_0(epsilon: Path) -> None:
    """The same updates wherever it is done, and step 0 is still to come."""
    learner = replace(LEARNER, warm_up_fits=3)
    scores = [new_score(epsilon, learner=learner) for _ in range(2)]
    start = scores[0].snapshot()
    for score in scores:
        assert score.warm_up(0, range(3), *views_of(0))["loss/fit"] > 0
        assert score.step == 0
    assert_same(scores[0].snapshot(), scores[1].snapshot())
    assert len(scores[0].snapshot()) > len(start)  # the optimiser has begun
    assert scores[0].fit(0, range(3), *views_of(0))
    untouched = new_score(epsilon)
    untouched.warm_up(0, range(3), *views_of(0))
    assert_same(untouched.snapshot(), start)
