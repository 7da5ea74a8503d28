"""Fine-tuning of the aligned geometric prior: it learns, resumes exactly on any number of workers, and refuses."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_agp import LATENT_PX, agp_config, settings_json, view_recipe, write_prior, write_views
from teams import together

from raydream.config import strict_json
from raydream.config.agp import AgpConfig
from raydream.priors.agp import AgpDenoiser
from raydream.priors.find import read_facts
from raydream.store.run_folder import RunFolder
from raydream.train.agp import checkpoint
from raydream.train.agp import job as agp_job
from raydream.train.agp import throughput as agp_benchmark
from raydream.train.agp.samples import MemorySamples, check_views
from raydream.train.agp.train import AGP, SAMPLES, AgpRequest, finetune_agp
from raydream.train.deepspeed import read_deepspeed
from raydream.train.engine import cut, join, slice_length
from raydream.train.loop import Worker
from raydream.train.team import Team

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inputs:
    prior: Path
    views: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(write_prior(folder / "prior"), write_views(folder / "views", view_recipe()))


def _train(
    inputs: Inputs,
    config: AgpConfig,
    out: Path,
    team: Team | None = None,
    deepspeed: dict[str, object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    if not out.exists():
        RunFolder.create(str(out), strict_json.dumps(config))
    source, view_config = MemorySamples.read(inputs.views, LATENT_PX, config.data), check_views(inputs.views, LATENT_PX)
    request = AgpRequest(inputs.views, inputs.prior, str(out), config, deepspeed, "memory", LATENT_PX, view_config)
    return finetune_agp(request, source, Worker(CPU, team or Team(), lambda row: None, should_stop))


def _losses(out: Path) -> list[float]:
    return [row["loss"] for row in RunFolder.open(str(out)).read_metrics()]


def _steps(out: Path) -> list[int]:
    return [row["step"] for row in RunFolder.open(str(out)).read_metrics()]


def _stopping_after(number: int) -> Callable[[], bool]:
    asked = iter(range(10_000))
    return lambda: next(asked) >= number - 1


def test_it_learns_and_leaves_a_whole_run_folder(inputs: Inputs, tmp_path: Path) -> None:
    config = replace(agp_config(60, rank=8), save_every_steps=100)
    out = tmp_path / "run"
    assert _train(inputs, config, out)
    losses = _losses(out)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), losses
    assert [path.name for path in (out / SAMPLES).iterdir()] == ["step_0000060.png"]
    facts = read_facts(out / AGP)
    assert (facts.num_steps, facts.rank, facts.fov_y_deg) == (60, 8, (45.0, 45.0))
    assert AgpDenoiser.load(out / AGP, inputs.prior, CPU).facts == facts


def test_a_training_that_was_stopped_ends_with_the_same_weights(inputs: Inputs, tmp_path: Path) -> None:
    config = agp_config(6)
    assert _train(inputs, config, tmp_path / "whole")
    assert not _train(inputs, config, tmp_path / "parts", should_stop=_stopping_after(3))
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"step": 4, "loss": 9.0}\n')  # told, but never saved
    assert _train(inputs, config, tmp_path / "parts")
    assert _steps(tmp_path / "parts") == [1, 2, 3, 4, 5, 6]
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / AGP / "agp.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_slices_cover_a_tensor_once(size: int) -> None:
    for shape in ((7,), (2, 3), (1,)):
        full = torch.arange(float(torch.Size(shape).numel())).view(shape) + 1
        parts = [cut(full, Team(rank, size)) for rank in range(size)]
        assert {len(part) for part in parts} == {slice_length(full.numel(), size)}
        whole = torch.cat(parts)
        assert torch.equal(whole[: full.numel()].view(shape), full)
        assert not whole[full.numel() :].any()
    assert torch.equal(join(cut(full, Team()), full.shape, Team()), full)


def test_shards_are_restored_on_another_number_of_workers(inputs: Inputs, tmp_path: Path) -> None:
    """Two workers save; one goes on with exactly their state, saves, and two go on from that."""
    config, out = agp_config(4), tmp_path / "run"
    RunFolder.create(str(out), strict_json.dumps(config))
    together(2, tmp_path / "a", lambda team: _train(inputs, config, out, team))
    shards = sorted(path.name for path in (out / "checkpoints" / "step_00000004").glob("shard-*"))
    assert len(shards) == 2
    run = RunFolder.open(str(out))
    denoiser = AgpDenoiser.from_prior(inputs.prior, config.model.rank, 99, CPU)
    begin = functools.partial(
        checkpoint.begin, settings=config.stage, team=Team(), deepspeed=None, run=run, step=4,
        loss_of=lambda: torch.zeros(()),
    )  # fmt: skip
    learner = begin(denoiser)
    exported = load_file(out / AGP / "agp.safetensors")
    assert all(torch.equal(value.half(), exported[name]) for name, value in learner.averaged().items())
    checkpoint.save(learner, run, denoiser.facts.prior_sha256)  # the same state in one shard
    assert len(list((out / "checkpoints" / "step_00000004").glob("shard-*"))) == 2
    again = AgpDenoiser.from_prior(inputs.prior, config.model.rank, 98, CPU)
    begin(again)
    for name, value in again.trainable().items():
        assert torch.equal(value, denoiser.trainable()[name])
    longer = replace(config, stage=replace(config.stage, num_steps=6))
    together(2, tmp_path / "b", lambda team: _train(inputs, longer, out, team))
    assert _steps(out) == [1, 2, 3, 4, 5, 6]
    whole = tmp_path / "whole"
    RunFolder.create(str(whole), strict_json.dumps(longer))
    together(2, tmp_path / "c", lambda team: _train(inputs, longer, whole, team))
    # the learning rate of the shorter run fell sooner, so only its first steps are the same
    assert _losses(whole)[0] == _losses(out)[0]
    assert all(torch.isfinite(torch.tensor(_losses(out))))


def test_zero_stages_agree_with_plain_torch_and_share_their_checkpoints(inputs: Inputs, tmp_path: Path) -> None:
    """Two workers: a step in each of ZeRO 1, 2 and 3, each going on from the one before, then a plain one."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install 'raydream[deepspeed]'")
    config = agp_config(4, rank=0)
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    for out in (plain, mixed):
        RunFolder.create(str(out), strict_json.dumps(config))
    together(2, tmp_path / "a", lambda team: _train(inputs, config, plain, team))

    def chain(team: Team, source: str) -> bool:
        settings = read_deepspeed(source, config.stage, 2, on_gpu=False)
        return not _train(inputs, config, mixed, team, settings, _stopping_after(1))

    for source in ("1", "2", "3"):
        together(2, tmp_path / source, lambda team, source=source: chain(team, source))
    together(2, tmp_path / "b", lambda team: _train(inputs, config, mixed, team))
    assert _steps(mixed) == list(range(1, 5))
    assert _losses(mixed) == pytest.approx(_losses(plain), rel=1e-4)


def test_without_zero_a_training_in_bfloat16_saves_and_takes_up_its_float32_weights(
    inputs: Inputs, tmp_path: Path
) -> None:
    """As on GPUs, where ZeRO 0 keeps a float32 copy of each weight, which is what the optimiser knows."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install 'raydream[deepspeed]'")
    config = agp_config(4, rank=0)
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    for out in (whole, parts, plain):
        RunFolder.create(str(out), strict_json.dumps(config))

    def train(team: Team, out: Path, steps: int) -> bool:
        settings = read_deepspeed("0", config.stage, 2, on_gpu=True)
        return _train(inputs, config, out, team, settings, _stopping_after(steps)) == (steps > 4)

    together(2, tmp_path / "a", lambda team: train(team, whole, 5))
    together(2, tmp_path / "b", lambda team: train(team, parts, 2))
    shard = load_file(next((parts / "checkpoints" / "step_00000002").glob("shard-*")))
    assert all(shard[name].any() for name in shard if "exp_avg" in name)
    assert any(not torch.equal(part, part.bfloat16().float()) for name, part in shard.items() if "value/" in name)
    together(2, tmp_path / "c", lambda team: train(team, parts, 5))
    assert _losses(parts) == _losses(whole)
    together(2, tmp_path / "d", lambda team: _train(inputs, config, plain, team))
    assert _losses(whole) == pytest.approx(_losses(plain), rel=2e-2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("7", r"deepspeed: must be 0, 1, 2, 3 or a JSON file"),
        ("[1]", r"not a JSON object"),
        ('{"optimizer": {"type": "Adam"}}', r"deepspeed\.optimizer: the job brings its own"),
        ('{"scheduler": {}}', r"deepspeed\.scheduler"),
        ('{"train_micro_batch_size_per_gpu": 8}', r"train_micro_batch_size_per_gpu: is 8, but the job's is 4"),
        ('{"train_batch_size": 4}', r"train_batch_size: is 4, but the job's is 8"),
        ('{"gradient_accumulation_steps": 2}', r"gradient_accumulation_steps"),
        ('{"gradient_clipping": 0.5}', r"gradient_clipping"),
        ('{"fp16": {"enabled": true}}', r"deepspeed\.fp16"),
        ('{"bf16": {"enabled": true}}', r"deepspeed\.bf16|on CPUs in float32"),
        ('{"zero_optimization": 2}', r"zero_optimization must be a JSON object, got 2"),
        ('{"zero_optimization": {"stage": 5}}', r"needs a stage of 0, 1, 2 or 3, got 5"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}', r"offload_optimizer"),
    ],
)
def test_a_deepspeed_config_that_contradicts_the_job_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_deepspeed("7" if content == "7" else str(path), agp_config(1).stage, 2, on_gpu=False)


def test_a_deepspeed_config_is_filled_from_the_job(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    given = {
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
    }
    path.write_text(json.dumps(given))
    config = read_deepspeed(str(path), agp_config(1).stage, 8, on_gpu=True)
    assert config["zero_optimization"] == given["zero_optimization"]
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (32, 4)
    assert config["bf16"] == {"enabled": True}
    assert read_deepspeed("2", agp_config(1).stage, 1, on_gpu=False)["zero_optimization"] == {"stage": 2}


# --- the command ----------------------------------------------------------------------------------------------------


def _main(inputs: Inputs, out: Path, *more: str) -> int:
    words = ["--views", inputs.views, "--prior", str(inputs.prior), "--out", str(out), "--no-ray", "--device", "cpu"]
    return agp_job.main("test", [*words, *more])


def test_the_job_trains_and_goes_on(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = settings_json(agp_config(2), tmp_path / "settings.json")
    out = tmp_path / "run"
    assert _main(inputs, out, "--config", config) == 0
    assert "step=2" in capsys.readouterr().out
    assert _main(inputs, out, "--set", "stage.num_steps=3") == 0  # the other settings are the folder's own
    assert _steps(out) == [1, 2, 3]
    assert _main(inputs, out, "--set", "model.rank=2") == 2
    assert "other seed, model or data" in capsys.readouterr().err
    other = Inputs(write_prior(tmp_path / "other", seed=1), inputs.views)
    assert _main(other, out) == 2
    assert "made from another prior" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "0"), "workers"),
        (("--deepspeed", "9"), "deepspeed"),
        (("--views", "/nowhere"), "views"),
        (("--prior", "/nowhere"), "prior"),
        (("--minutes", "-1"), "minutes"),
        (("--set", "stage.lr=-1"), "stage.lr"),
        (("--data", "stream"), "data"),
    ],
)
def test_bad_input_is_told_before_anything_is_made(
    inputs: Inputs, tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert _main(inputs, out, *words) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not out.exists()


def test_the_plan_needs_nothing(capsys: pytest.CaptureFixture) -> None:
    assert agp_job.main("test", ["--plan", "--workers", "4"]) == 0
    assert "4 GPUs" in capsys.readouterr().out


def test_the_benchmark_times_the_same_work_twice(inputs: Inputs) -> None:
    config = agp_config(1)
    source = MemorySamples.read(inputs.views, LATENT_PX, config.data)
    found = agp_benchmark.compare_throughput(config, inputs.prior, source, CPU, num_rounds=1, num_steps=1)
    assert found.job > 0 < found.bare
    assert found.overhead == pytest.approx(found.bare / found.job - 1)
