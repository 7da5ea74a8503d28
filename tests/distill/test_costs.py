"""What actors take, reckoned without them: against closed forms, and against what real tensors do."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_prior import SD21_SCHEDULE, SD21_UNET, SD21_VAE, make_tiny_prior
from tiny_score import new_score, views_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raydream.config.actors import score_config
from raydream.config.branches import LearnerConfig
from raydream.config.presets import make_preset
from raydream.config.prior import PriorConfig
from raydream.config.run import RunConfig
from raydream.diffusion.tally import tally
from raydream.distill.costs import cost_lines, run_costs, score_cost
from raydream.launch import main
from raydream.priors import diffusers_folder

META = torch.device("meta")
SD21 = {"unet": SD21_UNET, "vae": SD21_VAE, "scheduler": SD21_SCHEDULE}


def test_bytes_and_operations_of_a_linear_layer() -> None:
    weight = torch.empty(64, 32, device=META, requires_grad=True)
    rows = torch.empty(100, 32, device=META)

    def work() -> None:
        hidden = rows @ weight.T
        torch.autograd.grad(hidden.relu().sum(), weight)

    found = tally(work, [weight, rows])
    assert found.flops == 2 * 2 * 100 * 32 * 64, "one product forward, and backward one by the weight"
    activations = 4 * 100 * 64
    assert 2 * activations <= found.peak_bytes <= 4 * activations + 4 * 64 * 32


def test_attention_is_reckoned_as_a_fused_kernel() -> None:
    query = torch.empty(1, 2, 4096, 8, device=META)
    found = tally(lambda: nn.functional.scaled_dot_product_attention(query, query, query), [query])
    assert found.flops == 2 * 2 * 2 * 4096 * 4096 * 8
    assert found.peak_bytes < 4 * 4096 * 4096, "no matrix of all pairs"


def run_on(folder: Path, n: int) -> RunConfig:
    base = make_preset("sd21", 10)
    stage = replace(base.stages[0], camera=make_preset("embedded", 10).stages[0].camera, learner=LearnerConfig())
    return replace(base, n=n, stages=(stage,), prior=PriorConfig("diffusers", str(folder)))


@pytest.mark.slow
def test_operations_are_those_of_the_real_score_model(tmp_path: Path) -> None:
    folder = make_tiny_prior(tmp_path / "prior")
    score = new_score(folder)
    with FlopCounterMode(display=False) as counter:
        score.guide(0, "rgb", range(3), *views_of(0))
        score.fit(0, range(3), *views_of(0))
    reckoned = score_cost(score_config(run_on(folder, 3), 0, 0), 6)
    # the real one has texts of its own length, which the attention's share follows
    assert reckoned.step_flops == pytest.approx(counter.get_total_flops(), rel=0.25)
    twice = score_cost(score_config(run_on(folder, 6), 0, 0), 12)
    assert twice.step_flops == pytest.approx(2 * reckoned.step_flops)
    assert twice.held_bytes == reckoned.held_bytes
    assert twice.peak_bytes == pytest.approx(2 * reckoned.peak_bytes, rel=0.1)


def test_an_exact_score_takes_nothing_worth_telling() -> None:
    assert run_costs(make_preset("exhibit", 10)) is None
    assert cost_lines(make_preset("exhibit", 10)) == []


@pytest.mark.slow
def test_stable_diffusion_and_eight_particles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, config in SD21.items():
        path = tmp_path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.parent.mkdir()
        path.write_text(json.dumps(config))
    monkeypatch.setattr(diffusers_folder, "resolve_prior", lambda *_: tmp_path)
    monkeypatch.setattr(diffusers_folder, "file_stamps", lambda folder: (str(folder),))
    costs = run_costs(replace(make_preset("sd21", 10), n=8))
    assert costs is not None
    particle, score = costs
    parameters = 865_910_724  # of the UNet, as published
    assert score.held_bytes == pytest.approx(2 * 2 * parameters, rel=0.05), "one that guides, one to learn on"
    # .80 TFLOP a pass at 64 x 64 latents: guidance's two and the LoRA's one, 8 views; a fit is worth 2 to 3 more
    assert 8 * 0.8 * (3 + 2) < score.step_flops / 1e12 < 8 * 0.8 * (3 + 3)
    assert 3e9 < particle.total_bytes < 20e9
    in_one_process = 8 * particle.total_bytes + score.total_bytes  # all graphs wait for their gradients at once
    assert in_one_process < 80 * 2**30


@pytest.mark.slow
def test_a_dry_run_tells_them_beside_the_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_prior(tmp_path / "prior")
    words = [
        "--prior",
        str(folder),
        "--prompt",
        "a cube",
        "--n",
        "3",
        "--set",
        "stages.0.camera.image_px=64",
        "--dry-run",
    ]
    assert main("test", words) == 0
    out, told = capfd.readouterr()
    assert json.loads(out)["n"] == 3
    assert re.search(r"each of 3 particles, as it starts: \d+ MiB held, \d+ MiB more at most, [\d.]+ GFLOP a", told)
    assert re.search(r"the score model: \d+ MiB held, \d+ MiB more at most, [\d.]+ GFLOP a step", told)
    assert main("test", ["--preset", "sd21", "--dry-run", "--prompt", "a cube"]) == 0
    assert (
        "what its actors would take cannot be told: prior: 'sd21-base' is not on this machine" in capfd.readouterr().err
    )
