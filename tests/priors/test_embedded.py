"""The prior that ships: small enough, what it says it is, and at work in a run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from small_runs import SMALL, new_run, train

from raydream import cli
from raydream.assets.recolour import COLOURS
from raydream.config import strict_json
from raydream.config.agp import AgpGridConfig
from raydream.config.presets import embedded
from raydream.coordinates import decode_ccm
from raydream.diffusion import layout
from raydream.precision import has_fast_bfloat16
from raydream.priors import find
from raydream.priors.agp import AgpDenoiser
from raydream.priors.diffusers_folder import unet_dtype
from raydream.train.agp.train import grid_condition, sample_maps
from raydream.train.prior.export import MAX_BYTES
from raydream.train.prior.models import load_models, sample_latents
from raydream.train.texts import CachedTexts

pytestmark = pytest.mark.slow

FOLDER = find.EMBEDDED
MAX_AGP_BYTES = 12_000_000
CPU = torch.device("cpu")


def test_it_is_a_whole_prior_of_the_promised_size_and_words() -> None:
    assert find.resolve_prior("embedded") == FOLDER
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MAX_BYTES
    assert layout.native_image_px(FOLDER) == 64
    lexicon = json.loads((FOLDER / "lexicon.json").read_text())
    assert len(lexicon["nouns"]) >= 40
    assert lexicon["colours"] == list(COLOURS)
    card, gate = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "gate.json").read_text())
    assert "CC0-1.0" in card
    for test in ("noun", "colour", "side"):
        assert f"{gate['held_out_views'][test]['all']:.2f} (all)" in card


def test_diffusers_loads_it_as_it_is_without_a_warning(
    recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its constructor tells of each entry of the scheduler's settings that it takes for outdated."""
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert [str(warning.message) for warning in recwarn] == []
    assert "scheduler" not in capfd.readouterr().err


def test_its_samples_have_the_colours_of_their_words() -> None:
    """Means over the whole image, from the same noise."""
    models = load_models(FOLDER, CPU)
    images = []
    for word in ("red", "blue", "white", "black"):
        latents = sample_latents(models, [f"a {word} barrel"], 4.0, 8, torch.Generator().manual_seed(0))
        images.append(models.decode(latents)[0].mean(dim=(1, 2)))
    red, blue, white, black = images
    assert red[0] - red[2] > 0.2 > -0.2 > blue[0] - blue[2]
    assert white.mean() > black.mean() + 0.5


def test_the_preset_runs_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    scene = [setting for setting in SMALL if setting.startswith(("stages.0.scene", "cluster", "output"))]
    config = strict_json.apply_overrides(embedded(2), ["prompt=a red barrel", "n=2", *scene])
    run = new_run(tmp_path / "run", config)
    assert train(run, config) == 2
    rows = run.read_metrics()
    assert all(float(str(row[f"loss/{name}"])) > 0 for row in rows for name in ("rgb", "fit", "ccm"))
    request = cli.parse("", ["--preset", "embedded", "--prompt", "an astronaut"])
    with pytest.raises(ValueError, match=r"^prompt: 'an astronaut' names no object .* barrel, "):
        find.check_prompt(find.resolve_prior(request.config.prior.source), request.config.prompt)


def test_its_geometric_prior_belongs_to_the_preset_until_another_prior_is_given() -> None:
    def agp(*words: str) -> str:
        return cli.parse("", ["--preset", "embedded", *words]).config.stages[0].geometric_prior

    assert agp() == agp("--prior", "mine", "--agp", "embedded") == "embedded"
    assert agp("--agp", "off") == agp("--prior", "mine") == ""


def test_unets_of_the_preset_are_bfloat16_where_that_is_fast() -> None:
    prior = embedded().prior
    fast = torch.bfloat16 if has_fast_bfloat16(CPU) else torch.float32
    assert unet_dtype(prior, CPU) == fast
    assert unet_dtype(dataclasses.replace(prior, dtype="float32"), CPU) == torch.float32


def test_its_geometric_prior_knows_where_a_front_is() -> None:
    """Maps of nouns seen from four sides: what is near the camera has large coordinates along its direction."""
    folder = find.resolve_agp("embedded")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_AGP_BYTES
    agp, texts = AgpDenoiser.load(folder, FOLDER, CPU), CachedTexts.load(FOLDER, CPU)
    grid = AgpGridConfig(azimuths_deg=(0.0, 90.0, 180.0, 270.0))
    distance, fov_y_deg = (sum(low_high) / 2 for low_high in (agp.facts.distance, agp.facts.fov_y_deg))
    cond = grid_condition(texts, ("a chair", "a car", "a table"), grid, distance, fov_y_deg)
    maps = sample_maps(agp, cond, texts.encode([""])[0], 4.0, 12, torch.Generator().manual_seed(0))
    coordinates, opacity = decode_ccm(maps)
    seen = (opacity > 0.5).float()
    mean = ((coordinates * seen).sum((1, 2)) / seen.sum((1, 2))).view(3, 4, 3).mean(0)
    front, right, back, left = mean
    assert front[2] > back[2] + 0.2
    assert right[0] > left[0] + 0.2
    assert (right[2] - left[2]).abs() < 0.2
