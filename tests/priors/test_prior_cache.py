"""What is frozen is read once in a process, and a run in a process that has had others is the run of a new one."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from small_runs import small_config
from tiny_prior import make_tiny_prior
from tiny_score import learn, new_score, views_of
from transformers import CLIPTextModel

from raydream.camera import orbit_cameras
from raydream.config.actors import ScoreConfig, score_config
from raydream.config.names import MethodName
from raydream.config.prior import PriorConfig
from raydream.diffusion.latent import LatentCodec
from raydream.distill.score import Score, make_score
from raydream.priors.cache import AGPS, CODECS, DENOISERS, MODES, TEXTS, PartCache
from raydream.priors.exhibit_modes import ExhibitModes
from raydream.priors.find import resolve_prior
from raydream.priors.kinds import prior_kind
from raydream.types import Condition

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NUM_STEPS = 3


def forget_priors() -> None:
    """Lets go of all that stayed loaded, as if the process were new."""
    for cache in (DENOISERS, AGPS, CODECS, TEXTS, MODES):
        cache._parts.clear()


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
    said = score.guide(NUM_STEPS, "rgb", range(3), *views_of(NUM_STEPS))[:-1]
    answers = {f"answer {index}": torch.from_numpy(answer) for index, answer in enumerate(said)}
    return digest(answers | dict(score.learned))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("something was loaded again")


def refuse_all(patch: pytest.MonkeyPatch) -> None:
    for model in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel):
        patch.setattr(model, "from_pretrained", refuse)
    patch.setattr(ExhibitModes, "load", refuse)


def exhibit_config(**changes: Any) -> ScoreConfig:
    return replace(score_config(small_config(), 0, 0), **changes)


def codec_of(folder: Path) -> LatentCodec:
    return prior_kind(PriorConfig(kind="diffusers", source=str(folder))).codec(CPU)


def frozen_unet(folder: Path, method: MethodName = "vsd") -> torch.nn.Module:
    return new_score(folder, method).branches["rgb"].denoiser.unet  # type: ignore[attr-defined]


# --- nothing is loaded twice ----------------------------------------------------------------------------------------


def test_a_second_setup_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_score(folder)
    codec = codec_of(folder)
    make_score(exhibit_config())
    with monkeypatch.context() as patch:
        refuse_all(patch)
        new_score(folder, method="sds")
        assert codec_of(folder) is codec
        make_score(exhibit_config(seed=7))
        with pytest.raises(AssertionError, match="loaded again"):
            make_score(exhibit_config(prompt="a table"))


def test_a_prior_that_was_changed_on_the_disk_is_read_again(tmp_path: Path) -> None:
    def first_weight() -> torch.Tensor:
        return next(iter(frozen_unet(tmp_path).parameters())).clone()

    make_tiny_prior(tmp_path, seed=0)
    before = first_weight()
    assert torch.equal(first_weight(), before)
    make_tiny_prior(tmp_path, seed=1)
    assert not torch.equal(first_weight(), before)


def test_a_cache_makes_room_before_it_loads() -> None:
    cache, loaded = PartCache(2), []

    def get(name: str) -> str:
        return cache.get(name, lambda: loaded.append((name, len(cache._parts))) or name)

    assert [get(name) for name in "ababcacb"] == list("ababcacb")
    assert loaded == [("a", 0), ("b", 1), ("c", 1), ("a", 1), ("b", 1)]


def test_what_could_not_be_loaded_is_tried_again() -> None:
    cache = PartCache(1)
    with pytest.raises(AssertionError, match="loaded again"):
        cache.get("a", refuse)
    assert cache.get("a", lambda: 1) == 1


# --- and a run does not see what was there before it ----------------------------------------------------------------


def test_a_later_run_has_the_bits_of_a_new_process(folder: Path) -> None:
    first = learned(new_score(folder))
    learned(new_score(folder, method="sds"))
    third = learned(new_score(folder))
    code = "import sys, pathlib, test_prior_cache as t; print(t.learned(t.new_score(pathlib.Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    fresh = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert first == third == fresh.stdout.strip()


def test_a_lora_leaves_the_kept_weights_and_layers_alone(folder: Path) -> None:
    plain = frozen_unet(folder, "sds")
    names, before = list(plain.state_dict()), digest(plain.state_dict())
    first = learn(new_score(folder), NUM_STEPS)
    second = new_score(folder)
    assert first.learned.keys() == second.learned.keys()
    assert all(first.learned[name] is not second.learned[name] for name in first.learned)
    again = frozen_unet(folder, "sds")
    assert list(again.state_dict()) == names
    assert digest(again.state_dict()) == digest(plain.state_dict()) == before
    shared = {parameter.data_ptr() for parameter in plain.parameters()}
    assert {parameter.data_ptr() for parameter in again.parameters()} == shared, "frozen weights exist once"


def test_an_exhibit_looks_the_same_from_the_cache() -> None:
    cameras = orbit_cameras(
        torch.tensor([20.0, -100.0]), torch.tensor([10.0, 30.0]), torch.full((2,), 2.8), torch.full((2,), 45.0), 16, 16
    )
    z_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def answer() -> torch.Tensor:
        branch = make_score(exhibit_config()).branches["rgb"]
        text = branch.texts.prompt_embeddings(2)
        cond = Condition(text, cameras.c2w, cameras.fov_y_deg, torch.ones(2))
        return branch.denoiser.eps(z_t, torch.tensor([300, 700]), cond)

    first, second = answer(), answer()
    forget_priors()
    assert torch.equal(first, second)
    assert torch.equal(first, answer())


def test_each_prior_finds_its_own_folder(tmp_path: Path) -> None:
    folders = [make_tiny_prior(tmp_path / str(seed), seed=seed) for seed in range(2)]
    bits = [learned(new_score(resolve_prior(str(folder)))) for folder in (*folders, *folders)]
    assert bits[:2] == bits[2:]
    assert bits[0] != bits[1]
