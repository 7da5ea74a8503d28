"""Training of the embedded prior at toy size: it learns, resumes exactly, exports what others load, and is judged."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_views import SIZE_PX, small_config, small_views
from teams import together
from torch import Tensor, nn

from raydream import seeds
from raydream.config import strict_json
from raydream.config.train import GateConfig, StageSettings, TrainConfig
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.guidance import stratified_timesteps
from raydream.diffusion.layout import LEXICON, native_image_px
from raydream.diffusion.text import encode_prompts
from raydream.priors.find import check_prior
from raydream.train import gate
from raydream.train.captions import Lexicon
from raydream.train.learner import Learner, learning_rate, progress
from raydream.train.loop import Worker
from raydream.train.prior import job as train_job
from raydream.train.prior.checkpoint import read_tensors
from raydream.train.prior.models import build_vae, load_models, normalise_latents, sample_latents
from raydream.train.prior.train import METRICS, PRIOR, contrast_loss, make_sets, train_prior
from raydream.train.team import Team
from raydream.views.view_set import pack, unpack

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
VAE_STEPS, UNET_STEPS = 40, 30


def _train(config: TrainConfig, out: Path, should_stop: Callable[[], bool] = lambda: False) -> bool:
    return train_prior(small_views(), config, out, Worker(CPU, Team(), lambda row: None, should_stop))


def _losses(out: Path, stage: str) -> list[float]:
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [row["loss"] for row in rows if row["stage"] == stage and "loss" in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert _train(small_config(VAE_STEPS, UNET_STEPS), out)
    return out


def test_losses_fall(trained: Path) -> None:
    for stage, factor in (("vae", 0.5), ("unet", 0.9)):
        losses = _losses(trained, stage)
        assert sum(losses[-5:]) < factor * sum(losses[:5]), (stage, losses)
    assert list((trained / "samples").glob("unet_*.png"))
    assert list((trained / "samples").glob("vae_*.png"))


def test_a_training_that_was_stopped_in_both_stages_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = small_config(4, 4)
    config = replace(config, unet=replace(config.unet, contrast=0.5))
    assert _train(config, tmp_path / "whole")
    for stops_after in (3, 3, 100):  # in the VAE, in the UNet, at the end
        asked = iter(range(1000))
        done = _train(config, tmp_path / "parts", lambda asked=asked, n=stops_after: next(asked) >= n - 1)
        assert done == (stops_after == 100)
    assert len(_losses(tmp_path / "parts", "unet")) == 4
    for stage in ("vae", "unet"):
        whole, _ = read_tensors(tmp_path / "whole" / f"{stage}.safetensors")
        parts, facts = read_tensors(tmp_path / "parts" / f"{stage}.safetensors")
        assert facts["step"] == 4
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_contrast_pulls_two_losses_apart_until_they_differ_enough() -> None:
    right = torch.full((4,), 0.2, requires_grad=True)
    wrong = torch.tensor([0.2, 0.1, 0.3, 0.9], requires_grad=True)
    contrast_loss(right, wrong).sum().backward()
    pull = torch.sigmoid((torch.tensor(0.2) - wrong.detach()) / 0.04)
    assert pull[0] == 0.5
    assert pull[3] < 1e-6
    torch.testing.assert_close(right.grad, pull)
    torch.testing.assert_close(wrong.grad, -pull)


def test_contrast_teaches_sides(trained: Path, tmp_path: Path) -> None:
    """Of two trainings that go on from one prior, a side word means more to the one with contrast."""
    gaps = []
    for weight in (0.0, 2.0):
        config = replace(small_config(VAE_STEPS, 120), start=str(trained / PRIOR))
        config = replace(config, unet=replace(config.unet, contrast=weight))
        assert _train(config, tmp_path / str(weight))
        models = load_models(tmp_path / str(weight) / PRIOR, CPU)
        pairs = gate.make_pairs(make_sets(small_views(), config, CPU).train, 64)["side"]
        latents = models.encode_images(pairs.images)
        t = torch.full((len(latents),), 500)
        gap = 0.0
        for seed in range(8):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
            right, wrong = (gate.prior_loss(models)(latents, texts, t, noise) for texts in (pairs.right, pairs.wrong))
            gap += float((wrong / right).log().mean()) / 8
        gaps.append(gap)
    assert gaps[1] > 1.2 * abs(gaps[0]), gaps


def test_a_training_goes_on_from_a_finished_prior(trained: Path, tmp_path: Path) -> None:
    """Its VAE stays and its losses begin where the first training's ended, not at an untrained model's."""
    config = replace(small_config(VAE_STEPS, 6), start=str(trained / PRIOR))
    assert _train(config, tmp_path / "more")
    assert not _losses(tmp_path / "more", "vae")
    first, more = _losses(trained, "unet"), _losses(tmp_path / "more", "unet")
    assert sum(more) / len(more) < sum(first[:6]) / 6 - 0.5 * (sum(first[:6]) - sum(first[-6:])) / 6
    with pytest.raises(ValueError, match=r"^start: its unet has other layers"):
        _train(replace(config, unet=replace(config.unet, channels=(32, 96))), tmp_path / "wider")


def test_a_vae_is_trained_further_for_new_words(trained: Path, tmp_path: Path) -> None:
    """Its losses begin where the first training's ended, on words of its own."""
    config = small_config(4, 1)
    words = replace(config.words, nouns=("ball", "sword"))
    config = replace(config, words=words, vae=replace(config.vae, start=str(trained / PRIOR)))
    assert _train(config, tmp_path / "more")
    first, more = _losses(trained, "vae"), _losses(tmp_path / "more", "vae")
    assert max(more) < sum(first[:5]) / 5 - 0.7 * (sum(first[:5]) - sum(first[-5:])) / 5
    assert Lexicon.loads((tmp_path / "more" / LEXICON).read_text()).nouns == ("ball", "sword")
    with pytest.raises(ValueError, match=r"^vae.start: its VAE has other layers"):
        _train(replace(config, vae=replace(config.vae, channels=(8, 16, 32))), tmp_path / "wider")


def test_a_training_that_goes_on_keeps_the_words_of_its_start(trained: Path, tmp_path: Path) -> None:
    """Tokens must keep their meaning, whatever words the new settings would choose."""
    config = replace(small_config(VAE_STEPS, 2), start=str(trained / PRIOR))
    lexicon = (trained / LEXICON).read_text()
    assert _train(replace(config, words=replace(config.words, nouns=("ball", "sword"))), tmp_path / "fewer")
    assert (tmp_path / "fewer" / LEXICON).read_text() == lexicon
    written = [path.read_text() for path in (tmp_path / "fewer" / PRIOR).rglob("*.json")]
    assert not any(str(trained) in text for text in written)
    views = small_views()
    without = views.select([i for i, card in enumerate(views.objects) if not card.uid.startswith("ball")])
    with pytest.raises(ValueError, match=r"^views: .* called ball and by no rarer noun"):
        make_sets(without, config, CPU, Lexicon.loads(lexicon))


def test_the_folder_is_a_stable_diffusion_pipeline(trained: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = trained / PRIOR
    check_prior(folder)
    assert native_image_px(folder) == SIZE_PX
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "a red crate, front view", height=SIZE_PX, width=SIZE_PX, num_inference_steps=3, generator=generator,
        output_type="np",
    ).images  # fmt: skip
    assert images.shape == (1, SIZE_PX, SIZE_PX, 3)
    assert images.std() > 0


def test_our_denoiser_reads_the_folder_as_it_was_trained(trained: Path) -> None:
    folder = trained / PRIOR
    models = load_models(folder, CPU)
    latents = models.encode_images(
        make_sets(small_views(), small_config(1, 1), CPU).held_out.batch(4, "x", 0, 0).images
    )
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 400, 700, 999])
    abar = models.alphas_cumprod()[t][:, None, None, None]
    text = encode_prompts(folder, ["a red crate"], CPU)["a red crate"]
    assert torch.allclose(text, models.encode_text(["a red crate"])[0], atol=1e-5)
    denoiser = DiffusersDenoiser.load(folder, torch.float32, CPU)
    noised = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    with torch.no_grad():
        v = denoiser.run(noised, t, text.expand(4, -1, -1))
        error = (v - (abar.sqrt() * noise - (1 - abar).sqrt() * latents)).square().mean(dim=(1, 2, 3))
        assert torch.allclose(models.v_loss(latents, text.expand(4, -1, -1), t, noise), error, rtol=1e-3)
    assert models.alphas_cumprod()[-1] == 0


def test_latents_are_normalised_without_changing_reconstructions() -> None:
    torch.manual_seed(0)
    vae = build_vae(small_config(1, 1).vae)
    images = make_sets(small_views(), small_config(1, 1), CPU).train.batch(16, "x", 0, 0).images
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        normalise_latents(vae, images)
        after = vae.encode(images).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
        scaled = after.mean * vae.config["scaling_factor"]
    assert torch.allclose(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(scaled.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    ratio = before.mean.std(dim=(0, 2, 3)) / after.mean.std(dim=(0, 2, 3))
    assert torch.allclose(before.std.mean(dim=(0, 2, 3)) / after.std.mean(dim=(0, 2, 3)), ratio, rtol=1e-3)


def test_other_words_or_models_cannot_go_on_in_the_same_folder(trained: Path) -> None:
    config = small_config(VAE_STEPS, UNET_STEPS)
    with pytest.raises(ValueError, match="out"):
        _train(replace(config, seed=1), trained)
    with pytest.raises(ValueError, match="out"):
        _train(replace(config, vae=replace(config.vae, channels=(8, 8, 16))), trained)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    def second() -> bool:
        with pytest.raises(ValueError, match="another process"):
            _train(small_config(1, 1), tmp_path)
        return True

    assert not _train(small_config(2, 1), tmp_path, second)


def test_pace_is_set_by_steps_or_by_the_clock() -> None:
    settings = StageSettings(num_steps=100, batch_size=1, lr=1.0, warm_up_steps=10)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.1, rel=1e-2)
    assert learning_rate(settings, 50, 1e9) == pytest.approx(0.525, rel=1e-6)
    assert learning_rate(settings, 100, 0.0) == pytest.approx(0.05)
    timed = train_job.with_minutes(TrainConfig(), 100.0)
    assert (timed.vae.stage.minutes, timed.unet.stage.minutes) == (12.0, 88.0)
    assert progress(timed.unet.stage, 10, 44 * 60.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="minutes"):
        train_job.with_minutes(TrainConfig(), 0.0)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    module = nn.Linear(2, 2)
    learner = Learner(module, StageSettings(num_steps=2, batch_size=1, lr=0.1), Team())
    before = module.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="step 0"):
        learner.update(lambda: module.weight.sum() * float("inf"))
    assert torch.equal(module.weight, before)


def test_a_team_agrees_when_to_stop(tmp_path: Path) -> None:
    together(2, tmp_path / "store", lambda team: team.largest([float(team.rank), float(-team.rank)], CPU) == [1.0, 0.0])


def test_settings_survive_json_and_name_what_is_wrong() -> None:
    config = TrainConfig()
    assert strict_json.loads(TrainConfig, strict_json.dumps(config)) == config
    with pytest.raises(ValueError, match=r"unet\.stage\.lr"):
        strict_json.apply_overrides(config, ["unet.stage.lr=-1"])
    with pytest.raises(ValueError, match=r"did you mean 'recolour_probability'"):
        strict_json.apply_overrides(config, ["look.recolor_probability=0.1"])


def test_packed_views_come_back_nearly_the_same_and_small(tmp_path: Path) -> None:
    views = small_views()
    size = pack(views, tmp_path / "views.zip")
    back = unpack(tmp_path / "views.zip")
    assert size < 0.1 * (views.rgb.numel() + views.alpha.numel() + views.shade.numel())
    assert back.objects == views.objects
    assert torch.equal(back.azimuth_deg, views.azimuth_deg)
    for name in ("rgb", "alpha", "shade"):
        error = (getattr(back, name).float() - getattr(views, name).float()).square().mean().sqrt()
        assert error < 8, name
    assert (back.rgb <= back.alpha).all()
    (tmp_path / "broken.zip").write_bytes((tmp_path / "views.zip").read_bytes()[:500])
    with pytest.raises(ValueError, match="views"):
        unpack(tmp_path / "broken.zip")


def _oracle(words: dict[str, Tensor]) -> gate.CaptionLoss:
    """A loss that knows: the squared distance to a latent which each caption stands for."""

    def loss(latents: Tensor, captions: Sequence[str], t: Tensor, noise: Tensor) -> Tensor:
        return (latents - torch.stack([words[caption] for caption in captions])).square().mean(dim=(1, 2, 3))

    return loss


def test_gate_finds_an_oracle_and_is_undecided_about_noise(generator: torch.Generator) -> None:
    maker = make_sets(small_views(), small_config(1, 1), CPU).train
    pairs = gate.make_pairs(maker, 200)
    assert set(pairs) == {"noun", "colour", "side", "side_any"}
    config = GateConfig()

    def random_loss(latents: Tensor, captions: Sequence[str], t: Tensor, noise: Tensor) -> Tensor:
        return torch.rand(len(captions), generator=generator)

    for test, pair in pairs.items():
        assert all(right != wrong for right, wrong in zip(pair.right, pair.wrong))
        words = {caption: torch.randn(4, 2, 2, generator=generator) for caption in (*pair.right, *pair.wrong)}
        latents = torch.stack([words[caption] for caption in pair.right])
        assert gate.preference(_oracle(words), latents, pair, config)["all"] == 1
        chance = gate.preference(random_loss, latents, pair, config)["all"]
        assert abs(chance - 0.5) < 4 * 0.5 / (2 * len(latents)) ** 0.5, test  # four standard deviations
        tied = gate.preference(lambda *given: torch.zeros(len(given[1])), latents, pair, config)["all"]
        assert tied == 0.5
    for right, wrong in zip(pairs["noun"].right, pairs["noun"].wrong):
        assert right.split()[1:-1] == wrong.split()[1:-1]  # the same colour


def test_classifier_recognises_the_class_that_a_latent_is_of(generator: torch.Generator) -> None:
    names = [f"class {index}" for index in range(10)]
    words = {name: torch.randn(4, 4, 4, generator=generator) for name in names}
    config = GateConfig(classifier_noises=1, classifier_timesteps=(500,))
    latents = torch.stack([words[name] for name in names]) + 0.3 * torch.randn(10, 4, 4, 4, generator=generator)
    candidates = [tuple([name, *(other for other in names if other != name)]) for name in names]
    assert gate.classify(_oracle(words), latents, candidates, config).all()
    wrong = [tuple(reversed(captions)) for captions in candidates]
    assert not gate.classify(_oracle(words), latents, wrong, config).any()


def test_evaluation_of_a_whole_folder_writes_its_model_card(trained: Path, capsys: pytest.CaptureFixture) -> None:
    pack(small_views(), trained / "views.zip", quality=100)
    config = replace(
        small_config(VAE_STEPS, UNET_STEPS),
        gate=GateConfig(num_renders=12, num_classified=3, classifier_noises=1, sample_steps=3),
    )
    config = replace(config, vae=replace(config.vae, start="some/where/else"))
    path = trained / "evaluate.json"
    path.write_text(strict_json.dumps(config))
    words = ["--views", str(trained / "views.zip"), "--out", str(trained), "--config", str(path), "--evaluate"]
    assert train_job.main("", [*words, "--device", "cpu"]) in (0, 1)
    results = json.loads((trained / PRIOR / "gate.json").read_text())
    assert 0 <= results["held_out_views"]["noun"]["all"] <= 1
    assert results["composed"]["samples"] == 3
    assert Image.open(trained / "samples" / "sheet.png").size == (10 * SIZE_PX, 10 * SIZE_PX)
    card = (trained / PRIOR / "README.md").read_text()
    assert "CC0-1.0" in card
    assert '"start": "else"' in card
    assert "| noun | 0.9 |" in card
    assert "| noun | 0.9 |" in capsys.readouterr().out


def test_bad_command_lines_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    missing = ["--views", str(tmp_path / "none.zip"), "--out", str(tmp_path), "--no-ray"]
    assert train_job.main("", missing) == 2
    assert "views" in capsys.readouterr().err
    assert train_job.main("", [*missing, "--set", "unet.depth=3"]) == 2
    assert "unet.depth" in capsys.readouterr().err
    assert train_job.main("", [*missing, "--evaluate"]) == 2
    assert "train first" in capsys.readouterr().err


def test_samples_follow_their_generator(trained: Path) -> None:
    models = load_models(trained / PRIOR, CPU)
    first, again, other = (
        sample_latents(models, ["a red ball"], 2.0, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.4, 1.2), (-1.0, 0.5)])
def test_timesteps_follow_their_distribution(mean: float, std: float) -> None:
    """Against the closed form of the distribution function; one step in each equal part of it."""
    generator = seeds.generator(0, "test", 0, 0)
    t = stratified_timesteps(20_000, generator, mean, std)
    levels = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
    expected = torch.special.ndtr((torch.logit(levels) - mean) / std) if std else levels
    measured = (t.double()[:, None] < 1000 * levels).double().mean(0)
    assert torch.allclose(measured, expected, atol=2e-3)
    assert t.min() >= 0
    assert t.max() <= 999
    assert torch.equal(t, t.sort().values)
