"""Captions that compete, and who judges them: against the prior's own loss and CLIP's own forward pass."""

import json

import pytest
import torch
from tiny_clip import make_tiny_clip
from tiny_prior import make_tiny_prior
from transformers import CLIPModel, CLIPProcessor

from raydream import seeds
from raydream.config.evaluate import EvaluateConfig
from raydream.diffusion.guidance import add_noise, v_target
from raydream.evaluate.word_judges import ClipJudge, PriorJudge, distractors, word_frontness
from raydream.train.captions import Lexicon
from raydream.train.gate import prior_loss
from raydream.train.prior.models import load_models

NOUNS = ("chair", "car", "apple", "boat", "tree", "cup", "lamp", "sword", "axe", "bed")
CAPTIONS = ["a red chair", "a blue boat", "a red chair, front view", "a red chair, back view"]
CPU = torch.device("cpu")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(1))


# --- captions -------------------------------------------------------------------------------------------------------


def test_distractors_exchange_colour_object_or_both():
    found = distractors("a DSLR photo of a red chair", NOUNS, 9)
    assert found == distractors("a DSLR photo of a red chair", NOUNS, 9)
    assert len(set(found)) == 9
    assert "a DSLR photo of a red chair" not in found
    assert all(text.startswith("a DSLR photo of a") for text in found)
    assert sum("chair" in text for text in found) == 3
    assert sum(" red " in text for text in found) == 3


def test_distractors_keep_the_grammar():
    found = distractors("a chair", NOUNS, 9)
    assert "an apple" in found
    assert "an axe" in found
    assert "a boat" in found
    assert "a tree" in distractors("an apple", NOUNS, 9)
    assert "boats by the sea" in distractors("chairs by the sea", NOUNS, 9)


def test_distractors_need_words():
    with pytest.raises(ValueError, match=r"captions: .* names none of 10"):
        distractors("a bald eagle", NOUNS, 3)
    with pytest.raises(ValueError, match="num_candidates: only 9"):
        distractors("a chair", NOUNS, 20)


# --- a prior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_prior_scores_by_its_own_training_loss(tmp_path, images, kind):
    """The gate's loss on the same noises is the oracle; an eps-model's error on v follows from its noise."""
    folder = make_tiny_prior(tmp_path / "prior", kind)
    (folder / "lexicon.json").write_text(Lexicon(NOUNS, ("red",), (), (), NOUNS).dumps())
    settings = EvaluateConfig(prior=str(folder), timesteps=(300, 700), num_noises=2)
    judge = PriorJudge.load(CAPTIONS, settings, CPU)
    scores = judge.scores(images, CAPTIONS[:2])
    models = load_models(folder, CPU)
    latents = models.encode_images(images.permute(0, 3, 1, 2) * 2 - 1)
    assert torch.allclose(judge.features(images), latents.flatten(1), atol=1e-5)
    for column, caption in enumerate(CAPTIONS[:2]):
        errors = []
        for timestep in (300, 700):
            for index in range(2):
                drawn = torch.randn(latents.shape[1:], generator=seeds.generator(1, "classifier", index, timestep))
                noise, t = drawn.expand_as(latents), torch.full((3,), timestep)
                if kind == "v_prediction":
                    errors.append(prior_loss(models)(latents, [caption] * 3, t, noise))
                    continue
                abar = models.alphas_cumprod()[t]
                z_t = add_noise(latents, noise, abar)
                eps = models.unet(z_t, t, models.encode_text([caption] * 3), return_dict=False)[0]
                root = abar.sqrt()[:, None, None, None]
                z_0 = (z_t - (1 - abar).sqrt()[:, None, None, None] * eps) / root
                v = v_target(z_0, eps, abar)
                errors.append((v - v_target(latents, noise, abar)).square().mean(dim=(1, 2, 3)))
        assert torch.allclose(scores[:, column], -torch.stack(errors).mean(0), rtol=1e-3)


def test_view_words_decide_what_a_front_is(images):
    class Planted:
        name = "planted"

        def scores(self, images, captions):
            assert captions == CAPTIONS[2:]
            return torch.stack([images.mean(dim=(1, 2, 3)), torch.full((len(images),), 0.25)], dim=1)

        def features(self, images):
            return images.flatten(1)

    front = word_frontness(Planted(), images, "a red chair")
    assert torch.allclose(front, images.mean(dim=(1, 2, 3)) - 0.25)


# --- a CLIP ---------------------------------------------------------------------------------------------------------


def test_a_clip_scores_by_its_cosine(tmp_path, images):
    folder = make_tiny_clip(tmp_path / "clip")
    judge = ClipJudge.load(folder, CPU)
    scores = judge.scores(images, CAPTIONS)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pictures = [(image * 255).round().byte().numpy() for image in images]
    inputs = processor(text=CAPTIONS, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        answer = model(**inputs)
    assert torch.allclose(scores, answer.logits_per_image / model.logit_scale.exp(), atol=1e-5)
    assert torch.allclose(judge.features(images), answer.image_embeds, atol=1e-5)
    assert scores.std() > 1e-4  # a model that answers the same to everything would agree with itself too


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"clip: .* has no config.json"):
        ClipJudge.load(tmp_path, CPU)
    folder = make_tiny_clip(tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(ValueError, match=r"clip: .* is not a CLIP"):
        ClipJudge.load(folder, CPU)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
