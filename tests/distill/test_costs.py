"""What actors take, reckoned without them: against closed forms, and against what real tensors do."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_prior import make_tiny_prior
from tiny_score import new_score, views_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raydream.bench.sd21 import SD21_SCHEDULE, SD21_UNET, SD21_VAE
from raydream.cluster.gpus import plan_in_words, plan_on_own_gpu
from raydream.cluster.placement import Cluster, Key, Nodes, plan_bundles
from raydream.config.actors import score_config
from raydream.config.branches import LearnerConfig
from raydream.config.cluster import Budget, ClusterConfig
from raydream.config.presets import make_preset
from raydream.config.prior import PriorConfig
from raydream.config.run import RunConfig
from raydream.diffusion.tally import tally
from raydream.distill import costs
from raydream.distill.costs import Cost, cost_lines, run_costs, score_costs
from raydream.launch import main
from raydream.priors import diffusers_folder
from raydream.runs import memory_needs
from raydream.schedule import Constant

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
    reckoned = score_costs(score_config(run_on(folder, 3), 0, 0), 6, [0])[0]
    # the real one has texts of its own length, which the attention's share follows
    assert reckoned.step_flops == pytest.approx(counter.get_total_flops(), rel=0.25)
    split = score_costs(score_config(run_on(folder, 6), 0, 0), 12, [0, 6, 1])
    twice = split[0]
    updates = 1e-3  # which are added to the weights once, however many views there are
    assert twice.step_flops == pytest.approx(2 * reckoned.step_flops, rel=updates)
    assert twice.held_bytes == reckoned.held_bytes
    assert twice.peak_bytes == pytest.approx(2 * reckoned.peak_bytes, rel=0.1)
    score_of_three = score_config(run_on(folder, 3), 0, 0)
    _, _, [six] = costs._look(score_of_three, score_of_three.branches[0], [6])
    assert reckoned.peak_bytes == pytest.approx(max(each.peak_bytes for each in six), rel=0.03), "by one and two"
    assert split[6].peak_bytes == pytest.approx(reckoned.peak_bytes, rel=0.05), "half of the views at a time"
    assert 4 * split[1].peak_bytes < reckoned.peak_bytes


def test_an_exact_score_takes_nothing_worth_telling() -> None:
    assert run_costs(make_preset("exhibit", 10)) == {}
    assert cost_lines(make_preset("exhibit", 10)) == []


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[Budget, tuple[Cost, Cost]]:
    """What the SD preset's eight particles and their score model take at 512 px, by their budget."""
    folder = tmp_path_factory.mktemp("sd21")
    for part, config in SD21.items():
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.parent.mkdir()
        path.write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusers_folder, "resolve_prior", lambda *_: folder)
        patched.setattr(diffusers_folder, "file_stamps", lambda folder: (str(folder),))
        return run_costs(replace(make_preset("sd21", 10), n=8))


@pytest.mark.slow
def test_stable_diffusion_and_eight_particles(eight: dict[Budget, tuple[Cost, Cost]]) -> None:
    particle, score = eight[Budget()]
    parameters = 865_910_724  # of the UNet, as published
    assert score.held_bytes == pytest.approx(2 * 2 * parameters, rel=0.05), "one that guides, one to learn on"
    # .80 TFLOP a pass at 64 x 64 latents: guidance's two and the LoRA's one, 8 views; a fit is worth 2 to 3 more
    assert 8 * 0.8 * (3 + 2) < score.step_flops / 1e12 < 8 * 0.8 * (3 + 3)
    assert 3e9 < particle.total_bytes < 20e9
    assert score.total_bytes < 20e9
    frugal, frugal_score = eight[Budget(1, True)]
    assert frugal.total_bytes == particle.total_bytes, "one graph is as large as ever"
    assert frugal.step_flops == pytest.approx(4 / 3 * particle.step_flops)
    assert frugal_score.held_bytes == score.held_bytes
    # to one view's come the summed gradients of those before
    assert frugal_score.peak_bytes == pytest.approx(score.peak_bytes / 8, rel=0.05)


@pytest.mark.slow
def test_the_table_of_cards_is_what_is_reckoned(
    eight: dict[Budget, tuple[Cost, Cost]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "run_costs", lambda run: eight)
    needs = memory_needs(make_preset("sd21", 10))
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")

    def cell(words: str, budget: Budget | None) -> str:
        told = re.sub("^.* GPU, ", "", words)
        return told if str(budget) else f"everything at once: {told}"

    def on(kind: str, gpus: int) -> str:
        cluster = Cluster([Nodes({"CPU": 64.0, "GPU": float(gpus), f"accelerator_type:{kind}": 1.0})])
        keys: list[Key] = [*(("particle", index) for index in range(8)), ("score", 0)]
        return cell(*plan_in_words(dict(zip(keys, plan_bundles(ClusterConfig(), 8, cluster))), cluster, needs))

    for size, kind, free in (("24 GB", "L4", 22.0), ("40 GB", "A100-40G", 39.0), ("80 GB", "H100", 79.0)):
        alone = cell(*plan_on_own_gpu(8, 1, needs, free))
        row = " | ".join([alone, *(on(kind, gpus) for gpus in (1, 2, 4))])
        assert f"| {size} ({kind}) | {row} |" in page


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


def test_stages_that_are_alike_are_reckoned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, asked = Cost(1, 2, 3.0), list[int]()
    monkeypatch.setattr(costs, "particle_cost", lambda config: asked.append(config.first_step) or cost)
    monkeypatch.setattr(costs, "score_costs", lambda config, num_views, sizes: dict.fromkeys(sizes, cost))
    base = make_preset("sd21", 10)
    stage = base.stages[0]
    later = replace(stage, name="again", num_steps=7, start="previous", lr_scale=Constant(0.1))
    larger = replace(later, camera=replace(stage.camera, image_px=Constant(768.0)))
    run_costs(replace(base, stages=(stage, later, larger, later)))
    assert len(asked) == 2
    assert 17 in asked, "the larger one"
