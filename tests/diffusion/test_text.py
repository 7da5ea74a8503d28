"""Text embeddings: the prior's own, the right side for each view, and Perp-Neg's weights by hand."""

import gc
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_prior import NUM_TOKENS, TEXT_WIDTH, make_tiny_prior
from torch import Tensor
from transformers import CLIPTextModel

from raydream.config.branches import BranchConfig
from raydream.diffusion import text
from raydream.diffusion.prompts import bank_prompts
from raydream.diffusion.text import TextBank, encode_prompts

CPU = torch.device("cpu")
PROMPT = "a red chair"


def bank_of(folder: Path, prompt: str, negative_prompt: str, guidance: BranchConfig) -> TextBank:
    embeddings = encode_prompts(folder, bank_prompts(prompt, negative_prompt), CPU)
    return TextBank(embeddings, prompt, negative_prompt, guidance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("prior") / "tiny")


@pytest.fixture(scope="module")
def bank(folder: Path) -> TextBank:
    return bank_of(folder, PROMPT, "blurry", BranchConfig())


def side(bank: TextBank, name: str) -> Tensor:
    return bank.embedding(f"{PROMPT}, {name} view")


def at(bank: TextBank, azimuth_deg: float, elevation_deg: float = 0.0) -> Tensor:
    return bank.view_embeddings(torch.tensor([azimuth_deg]), torch.tensor([elevation_deg]))[0]


def test_embeddings_are_the_pipelines_own(folder: Path, bank: TextBank) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    positive, negative = pipeline.encode_prompt(PROMPT, CPU, 1, True, negative_prompt="blurry")
    torch.testing.assert_close(bank.prompt_embeddings(2), positive.expand(2, -1, -1))
    torch.testing.assert_close(bank.negative_embeddings(2), negative.expand(2, -1, -1))
    assert bank.embedding(PROMPT).shape == (NUM_TOKENS, TEXT_WIDTH)


@pytest.mark.slow
def test_the_encoder_is_gone_after_encoding(folder: Path) -> None:
    gc.collect()
    before = sum(isinstance(thing, CLIPTextModel) for thing in gc.get_objects())
    kept = bank_of(folder, PROMPT, "", BranchConfig())
    gc.collect()
    assert sum(isinstance(thing, CLIPTextModel) for thing in gc.get_objects()) == before
    assert not kept.embedding(PROMPT).requires_grad


@pytest.mark.parametrize(
    ("name", "azimuths_deg"),
    [
        ("front", (0, 44, -44, 360, -316)),
        ("side", (46, -90, 134, 270, -134)),
        ("back", (136, 180, -180, 179.9, -179.9, 181)),
    ],
)
def test_each_side_has_its_words_also_across_the_seam(
    bank: TextBank, name: str, azimuths_deg: tuple[float, ...]
) -> None:
    for azimuth_deg in azimuths_deg:
        assert torch.equal(at(bank, float(azimuth_deg)), side(bank, name)), azimuth_deg


def test_overhead_goes_before_every_side(bank: TextBank) -> None:
    for azimuth_deg in (0.0, 90.0, 180.0):
        assert torch.equal(at(bank, azimuth_deg, 61.0), side(bank, "overhead"))
    assert torch.equal(at(bank, 0.0, 59.0), side(bank, "front"))


def test_thresholds_come_from_the_settings(folder: Path) -> None:
    narrow = bank_of(folder, PROMPT, "", BranchConfig(front_deg=30.0, back_deg=20.0, overhead_deg=50.0))
    assert torch.equal(at(narrow, 35.0), side(narrow, "side"))
    assert torch.equal(at(narrow, 155.0), side(narrow, "side"))
    assert torch.equal(at(narrow, 0.0, 55.0), side(narrow, "overhead"))
    plain = bank_of(folder, PROMPT, "", BranchConfig(view_dependent_prompts=False))
    assert torch.equal(at(plain, 180.0), plain.embedding(PROMPT))


def test_views_are_answered_in_their_order(bank: TextBank) -> None:
    many = bank.view_embeddings(torch.tensor([180.0, 0.0, 90.0]), torch.tensor([0.0, 0.0, 80.0]))
    assert torch.equal(many, torch.stack([side(bank, name) for name in ("back", "front", "overhead")]))


@pytest.mark.parametrize(
    ("azimuth_deg", "positive", "negatives"),
    [
        (0, {"front": 1.0}, {"front": 2.426 - 4 * math.exp(-0.5), "side": 2.426 - 4}),
        (-45, {"front": 0.5, "side": 0.5}, dict.fromkeys(("front", "side"), 2.426 - 4 * math.exp(-0.25))),
        (90, {"side": 1.0}, {"side": 0.606 - math.exp(-0.5), "front": -0.967 - math.exp(-0.5)}),
        (-135, {"side": 0.5, "back": 0.5}, {"side": 0.606 - math.exp(-0.25), "front": -0.967 - math.exp(-0.25)}),
        (180, {"back": 1.0}, {"side": 0.606 - 1, "front": -0.967 - 1}),
    ],
)
def test_perp_neg_by_hand(
    bank: TextBank, azimuth_deg: float, positive: dict[str, float], negatives: dict[str, float]
) -> None:
    texts = bank.perp_neg_texts(torch.tensor([float(azimuth_deg)]), torch.zeros(1))
    torch.testing.assert_close(texts.positive[0], sum(share * side(bank, name) for name, share in positive.items()))
    assert torch.equal(texts.negatives[:, 0], torch.stack([side(bank, name) for name in negatives]))
    torch.testing.assert_close(texts.weights[:, 0], torch.tensor(list(negatives.values())), rtol=1e-5, atol=1e-6)
    assert (texts.weights < 1e-3).all()


def test_perp_neg_of_several_views_is_that_of_each(bank: TextBank) -> None:
    azimuths, elevations = torch.tensor([10.0, 170.0, 100.0]), torch.tensor([0.0, 0.0, 70.0])
    together = bank.perp_neg_texts(azimuths, elevations)
    for view in range(3):
        alone = bank.perp_neg_texts(azimuths[view : view + 1], elevations[view : view + 1])
        assert torch.equal(together.positive[view], alone.positive[0])
        assert torch.equal(together.negatives[:, view], alone.negatives[:, 0])
        assert torch.equal(together.weights[:, view], alone.weights[:, 0])
    torch.testing.assert_close(together.positive[2], side(bank, "overhead"))
    assert (together.weights[:, 2] == 0).all()


def test_perp_neg_is_continuous_around_the_object() -> None:
    """Weights jump only at 90 degrees, where the pair of negatives changes; its share of the sides does not jump."""
    for azimuth_deg in (0.0, 30.0, 89.9, 90.1, 150.0, 179.9):
        (_, _, before), weights = text.perp_neg_pairs(azimuth_deg)
        (_, _, after), moved = text.perp_neg_pairs(azimuth_deg + 0.01)
        assert abs(before - after) < 1e-3
        assert all(abs(weights[name] - moved[name]) < 1e-3 for name in weights)


def test_a_prompt_that_would_lose_its_end_is_an_error(folder: Path) -> None:
    fits = "x" * (NUM_TOKENS - 2)
    text.encode_prompts(folder, [fits], CPU)
    with pytest.raises(ValueError, match=r"^prompt: 1 tokens too long"):
        text.encode_prompts(folder, [fits + "x"], CPU)
    with pytest.raises(ValueError, match=r"^prompt: "):  # the prompt alone fits, its view words would be cut off
        bank_of(folder, fits, "", BranchConfig())


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "{0} %s {name}", "a\nchair\t'\"\\", "ein Stühlchen 🪑"])
def test_a_prompt_is_only_data(folder: Path, prompt: str) -> None:
    odd = bank_of(folder, prompt, "", BranchConfig())
    assert odd.embedding(prompt).isfinite().all()
    assert at(odd, 0.0).isfinite().all()
