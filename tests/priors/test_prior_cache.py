"""What is frozen is read once in a process, and a run in a process that has had others is the run of a new one."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from raydream.priors.load import Shelf, forget_priors, load_codec, load_prior
from small_runs import small_config
from tiny_prior import make_tiny_prior
from tiny_score import learn, new_score, views_of
from transformers import CLIPTextModel

from raydream.camera import orbit_cameras
from raydream.config.actors import ParticleConfig, ScoreConfig, particle_config, score_config
from raydream.config.prior import PriorConfig
from raydream.distill.score import Score
from raydream.priors.exhibit_modes import ExhibitModes
from raydream.priors.find import resolve_prior
from raydream.types import Condition

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NUM_STEPS = 3


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    """Nothing is kept yet, and nothing of this test stays."""
    forget_priors()
    yield
    forget_priors()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("prior"))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    parts = (name.encode() + tensor.detach().contiguous().numpy().tobytes() for name, tensor in sorted(tensors.items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def learned(score: Score) -> str:
    """The bits of what a score model says and of what it learns within a few steps."""
    learn(score, NUM_STEPS)
    said = score.guide(NUM_STEPS, range(3), *views_of(NUM_STEPS))[:-1]
    answers = {f"answer {index}": torch.from_numpy(answer) for index, answer in enumerate(said)}
    return digest(answers | dict(score.learned))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("something was loaded again")


def refuse_all(patch: pytest.MonkeyPatch) -> None:
    for model in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel):
        patch.setattr(model, "from_pretrained", refuse)
    patch.setattr(ExhibitModes, "load", refuse)


def exhibit_config(**changes: Any) -> ScoreConfig:
    config = small_config()
    return replace(score_config(config, config.stages[0], 0), **changes)


def codec_config(folder: Path) -> ParticleConfig:
    config = small_config()
    prior = PriorConfig(kind="diffusers", source=str(folder))
    return replace(particle_config(config, 0, 0), prior=prior)


# --- nothing is loaded twice ----------------------------------------------------------------------------------------


def test_a_second_setup_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_score(folder)
    codec = load_codec(codec_config(folder), CPU)
    load_prior(exhibit_config(), CPU)
    with monkeypatch.context() as patch:
        refuse_all(patch)
        new_score(folder, method="sds")
        assert load_codec(codec_config(folder), CPU) is codec
        load_prior(exhibit_config(seed=7), CPU)
        with pytest.raises(AssertionError, match="loaded again"):
            load_prior(exhibit_config(prompt="a table"), CPU)


def test_a_prior_that_was_changed_on_the_disk_is_read_again(tmp_path: Path) -> None:
    def first_weight() -> torch.Tensor:
        return next(iter(new_score(tmp_path).prior.denoiser.unet.parameters())).clone()  # type: ignore[attr-defined]

    make_tiny_prior(tmp_path, seed=0)
    before = first_weight()
    assert torch.equal(first_weight(), before)
    make_tiny_prior(tmp_path, seed=1)
    assert not torch.equal(first_weight(), before)


def test_a_shelf_makes_room_before_it_loads() -> None:
    shelf, loaded = Shelf(2), []

    def get(name: str) -> str:
        return shelf.get(name, lambda: loaded.append((name, len(shelf._parts))) or name)

    assert [get(name) for name in "ababcacb"] == list("ababcacb")
    assert loaded == [("a", 0), ("b", 1), ("c", 1), ("a", 1), ("b", 1)]


def test_what_could_not_be_loaded_is_tried_again() -> None:
    shelf = Shelf(1)
    with pytest.raises(AssertionError, match="loaded again"):
        shelf.get("a", refuse)
    assert shelf.get("a", lambda: 1) == 1


# --- and a run does not see what was there before it ----------------------------------------------------------------


def test_a_later_run_has_the_bits_of_a_new_process(folder: Path) -> None:
    first = learned(new_score(folder))
    learned(new_score(folder, method="sds"))
    third = learned(new_score(folder))
    code = "import sys, pathlib, test_prior_cache as t; print(t.learned(t.new_score(pathlib.Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(folder)]
    fresh = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300, check=True)
    assert first == third == fresh.stdout.strip()


def test_a_lora_leaves_the_kept_weights_and_layers_alone(folder: Path) -> None:
    plain = new_score(folder, method="sds").prior.denoiser.unet  # type: ignore[attr-defined]
    names, before = list(plain.state_dict()), digest(plain.state_dict())
    first = learn(new_score(folder), NUM_STEPS)
    second = new_score(folder)
    assert first.learned.keys() == second.learned.keys()
    assert all(first.learned[name] is not second.learned[name] for name in first.learned)
    again = new_score(folder, method="sds").prior.denoiser.unet  # type: ignore[attr-defined]
    assert list(again.state_dict()) == names
    assert digest(again.state_dict()) == digest(plain.state_dict()) == before
    shared = {parameter.data_ptr() for parameter in plain.parameters()}
    assert {parameter.data_ptr() for parameter in again.parameters()} == shared, "frozen weights exist once"


def test_an_exhibit_looks_the_same_from_the_shelf() -> None:
    cameras = orbit_cameras(
        torch.tensor([20.0, -100.0]), torch.tensor([10.0, 30.0]), torch.full((2,), 2.8), torch.full((2,), 45.0), 16, 16
    )
    z_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def answer() -> torch.Tensor:
        prior = load_prior(exhibit_config(), CPU)
        text = prior.texts.prompt_embeddings(2)
        cond = Condition(text, cameras.c2w, cameras.fov_y_deg, torch.ones(2))
        return prior.denoiser.eps(z_t, torch.tensor([300, 700]), cond)

    first, second = answer(), answer()
    forget_priors()
    assert torch.equal(first, second)
    assert torch.equal(first, answer())


def test_each_prior_finds_its_own_folder(tmp_path: Path) -> None:
    folders = [make_tiny_prior(tmp_path / str(seed), seed=seed) for seed in range(2)]
    bits = [learned(new_score(resolve_prior(str(folder)))) for folder in (*folders, *folders)]
    assert bits[:2] == bits[2:]
    assert bits[0] != bits[1]
