"""Workers that train one model: their mean gradients, and that two with half a batch each step like one with it all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from small_agp import LATENT_PX, write_prior
from teams import together
from torch import Tensor, nn

from raydream.camera import orbit_cameras
from raydream.config.train import StageSettings
from raydream.priors.agp import AgpDenoiser
from raydream.train.learner import Learner
from raydream.train.prior import checkpoint
from raydream.train.team import MeanGradients, Team
from raydream.types import Condition

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SETTINGS = StageSettings(num_steps=6, batch_size=4, lr=1e-2, warm_up_steps=1, gradient_clip=0.05, ema_decay=0.9)
SIZE = 4  # of one worker's batch


class Net(nn.Module):
    """Layers that backward reaches in another order than they are named in, one that is seldom used, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.seldom, self.never, self.first = (nn.Linear(*ab) for ab in ((8, 2), (3, 2), (3, 3), (3, 8)))

    def forward(self, x: Tensor, with_all: bool) -> Tensor:
        y = self.last(torch.tanh(self.first(x)))
        return y + self.seldom(x) if with_all else y


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _data(size: int, step: int) -> Tensor:
    """The batches of all workers together: worker i has the i-th part."""
    return torch.randn(size * SIZE, 3, generator=torch.Generator().manual_seed(step))


def _part(data: Tensor, team: Team) -> Tensor:
    return data.chunk(team.size)[team.rank]


@pytest.mark.parametrize(("size", "buffer_bytes"), [(2, 1), (2, 100), (3, 2**20)])
def test_gradients_are_the_mean_over_the_team_whatever_the_buffers(
    tmp_path: Path, size: int, buffer_bytes: int
) -> None:
    def work(team: Team) -> bool:
        model, plain = _net(), _net()
        gradients = MeanGradients(list(model.parameters()), team, buffer_bytes)
        for step in range(4):
            data, with_all = _data(size, step), step >= 2
            model(_part(data, team), with_all).square().mean().backward()
            gradients.wait()
            plain(data, with_all).square().mean().backward()
            for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
                assert (ours.grad is None) == (theirs.grad is None), (step, name)
                if ours.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, msg=f"step {step}, {name}")
            model.zero_grad(set_to_none=True)
            plain.zero_grad(set_to_none=True)
        return True

    together(size, tmp_path / "store", work)


def test_gradients_are_sent_while_backward_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on all but the first layer's, which backward makes last, are on their way before that."""
    first = nn.Linear(3, 8)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 2))
    events: list[str] = []
    real = distributed.all_reduce

    def recorded(tensor: Tensor, *, async_op: bool) -> object:
        events.append(f"sum of {tensor.numel()}")
        return real(tensor, async_op=async_op)

    def work(team: Team) -> bool:
        monkeypatch.setattr(distributed, "all_reduce", recorded)
        gradients = MeanGradients(list(model.parameters()), team, buffer_bytes=1)
        first.weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
        for _ in range(2):
            events.clear()
            model(torch.ones(1, 3)).sum().backward()
            gradients.wait()
        place = events.index("first layer")
        return {"sum of 2", "sum of 16", "sum of 8"} <= {*events[:place]} and events.count("sum of 24") == 1

    together(2, tmp_path / "store", work)


def _trained(team: Team, steps: range, begin: Path) -> Learner[Net]:
    learner = checkpoint.begin(_net(), SETTINGS, team, begin, lambda: torch.zeros(()))

    def loss() -> Tensor:
        return learner.module(_part(_data(2, learner.step), team), True).square().mean()

    for step in steps:
        assert learner.step == step
        learner.update(loss)
    return learner


def test_two_workers_step_like_one_with_the_joined_batch_and_resume_exactly(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    checkpoint.save(_trained(Team(), range(6), nothing), tmp_path / "one")

    def work(team: Team) -> bool:
        checkpoint.save(_trained(team, range(6), nothing), tmp_path / "whole")
        checkpoint.save(_trained(team, range(3), nothing), tmp_path / "half")
        distributed.barrier()  # rank 0 writes
        checkpoint.save(_trained(team, range(3, 6), tmp_path / "half"), tmp_path / "resumed")
        return True

    together(2, tmp_path / "store", work)
    one, _ = checkpoint.read_tensors(tmp_path / "one")
    start = {f"module.{name}": value for name, value in _net().state_dict().items()}
    assert not torch.allclose(one["module.first.weight"], start["module.first.weight"], atol=1e-2)
    whole, _ = checkpoint.read_tensors(tmp_path / "whole")
    resumed, _ = checkpoint.read_tensors(tmp_path / "resumed")
    torch.testing.assert_close(whole, one)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 4])
def test_two_workers_fine_tune_like_one_with_the_joined_batch(tmp_path: Path, rank: int) -> None:
    """All weights and updates of a rank; some views do not see their camera."""
    prior = write_prior(tmp_path / "prior")
    draw = torch.Generator().manual_seed(0)
    noised, target = torch.randn(2, 2 * SIZE, 4, LATENT_PX, LATENT_PX, generator=draw)
    text = torch.randn(2 * SIZE, 5, 16, generator=draw)
    t = torch.arange(2 * SIZE) * 100
    angles, ones = torch.arange(2 * SIZE) * 40.0, torch.ones(2 * SIZE)
    cameras = orbit_cameras(angles, 15 * ones, 3 * ones, 45 * ones, 1, 1)
    seen = (torch.arange(2 * SIZE) % 3 > 0).float()

    def trained(team: Team) -> dict[str, Tensor]:
        denoiser = AgpDenoiser.from_prior(prior, rank, 0, CPU)
        learner = Learner(denoiser.unet, SETTINGS, team, denoiser.trainable())
        given = (text, cameras.c2w, cameras.fov_y_deg, seen)

        def loss() -> Tensor:
            cond = Condition(*(_part(each, team) for each in given))
            answer = denoiser.predict(_part(noised, team), _part(t, team), cond)
            return (answer - _part(target, team)).square().mean()

        for _ in range(3):
            learner.update(loss)
        return {name: value.detach() for name, value in denoiser.trainable().items()} | learner.averaged()

    one = trained(Team())

    def work(team: Team) -> bool:
        torch.testing.assert_close(trained(team), one, rtol=1e-3, atol=2e-5)
        return True

    start = AgpDenoiser.from_prior(prior, rank, 0, CPU).trainable()
    assert max(float((one[name] - value.detach()).abs().max()) for name, value in start.items()) > 1e-3
    together(2, tmp_path / "store", work)
