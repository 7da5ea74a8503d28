"""What a run says of the devices that it is on, and of what going on there is worth."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_runs import Watch, new_run, small_config, train

from raydream.config.cluster import ClusterConfig
from raydream.config.presets import sd21
from raydream.distill.loop import _named
from raydream.distill.pipeline import _going_on
from raydream.distill.score import Score
from raydream.runs import check_run

pytestmark = pytest.mark.slow


def test_what_each_actor_computes_on_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(folder: Path, *settings: str) -> list[str]:
        watch, config = Watch(), small_config("n=2", *settings, steps=1)
        train(new_run(folder, config), config, watch=watch)
        return [message for message in watch.phases if "kernels" in message]

    assert told(tmp_path / "one") == ["score 0: cpu, kernels numba; particles 0-1: cpu, kernels numba"]
    monkeypatch.setattr(Score, "hardware", lambda score: f"cuda (card {score.config.replica})")
    assert told(tmp_path / "two", "cluster.score_replicas=2") == [
        "score 0: cuda (card 0); score 1: cuda (card 1); particles 0-1: cpu, kernels numba"
    ]
    assert _named("particle", [0, 2, 3]) == "particles 0, 2, 3"


def test_going_on_says_what_it_is_worth_on_a_gpu() -> None:
    by_order = dataclasses.replace(sd21(10), cluster=ClusterConfig(deterministic=True))
    assert "cluster.deterministic=true" in _going_on(sd21(10), 3)
    assert {_going_on(run, 3) for run in (by_order, small_config())} == {"going on from step 3"}


@pytest.mark.parametrize("kernels", ["cuda", "nerfacc"])
def test_kernels_that_this_machine_cannot_run_are_refused_before_there_is_a_run(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"kernels: {kernels} needs a CUDA device.*use ours or reference"):
        check_run(small_config(f"cluster.kernels={kernels}"))
