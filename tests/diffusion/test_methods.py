"""The methods of score distillation: the table is the list of names, and each gradient is its formula."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_prior import make_tiny_prior
from tiny_score import GUIDANCE, SCALE, new_score, views_of
from torch import Tensor

from raydream.config import strict_json
from raydream.config.names import LEARNING_METHODS, METHOD_NAMES, MethodName
from raydream.config.presets import make_preset
from raydream.diffusion import guidance
from raydream.diffusion.methods import METHODS, Eps
from raydream.distill.branches import condition
from raydream.distill.messages import unpack_views
from raydream.runs import check_run

VIEWS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("prior"))


def random_eps() -> tuple[Eps, Tensor]:
    """Unrelated numbers of everything that a method may look at, and w(t)."""
    draws = torch.Generator().manual_seed(0)
    guided, negative, reference, noise, z_0 = torch.randn(5, VIEWS, 4, 6, 6, generator=draws, dtype=torch.float64)
    abar_t, w_t = torch.rand(2, VIEWS, generator=draws, dtype=torch.float64) * 0.8 + 0.1
    return Eps(guided, negative, reference, noise, z_0, abar_t), w_t


def test_the_table_has_the_names_and_knows_who_learns() -> None:
    assert tuple(METHODS) == METHOD_NAMES
    assert [name for name in METHODS if METHODS[name].needs_negative] == ["csd"]


def sjc(eps: Eps, w_t: Tensor) -> Tensor:
    """``-sigma * score``, (z_0 + sigma * noise - D) / sigma without the noise, and w(t) is not asked."""
    sigma = ((1 - eps.abar_t) / eps.abar_t).sqrt()[:, None, None, None]
    noisy = eps.z_0 + sigma * eps.noise
    denoised = noisy - sigma * eps.guided
    return (noisy - denoised) / sigma - eps.noise


FORMULAS: dict[MethodName, Callable[[Eps, Tensor], Tensor]] = {
    "vsd": lambda eps, w_t: w_t[:, None, None, None] * (eps.guided - eps.reference),
    "sds": lambda eps, w_t: w_t[:, None, None, None] * (eps.guided - eps.noise),
    "sjc": sjc,
    "csd": lambda eps, w_t: w_t[:, None, None, None] * (eps.guided - eps.negative),
}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_gradient_is_its_formula(method: MethodName) -> None:
    eps, w_t = random_eps()
    torch.testing.assert_close(METHODS[method].gradient(eps, w_t), FORMULAS[method](eps, w_t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, SCALE])
def test_csd_is_what_the_text_adds_times_the_scale(scale: float) -> None:
    eps, w_t = random_eps()
    assert eps.negative is not None
    positive = eps.noise  # any other numbers
    told = dataclasses.replace(eps, guided=guidance.classifier_free(eps.negative, positive, scale))
    expected = w_t[:, None, None, None] * scale * (positive - eps.negative)
    torch.testing.assert_close(METHODS["csd"].gradient(told, w_t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_method_looks_only_at_what_it_names(method: MethodName) -> None:
    eps, w_t = random_eps()
    row = METHODS[method]
    least = dataclasses.replace(
        eps,
        negative=eps.negative if row.needs_negative else None,
        reference=eps.reference if method in LEARNING_METHODS else None,
    )
    assert torch.equal(row.gradient(least, w_t), row.gradient(eps, w_t))


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_csd_in_a_run_is_its_formula_whatever_the_scale(folder: Path, scale: float) -> None:
    """Both texts are asked where guidance at scale 1 alone would not need the negative one."""
    score, messages = new_score(folder, "csd", dataclasses.replace(GUIDANCE, scale=scale)), views_of(0)
    assert score.learner is None
    *found, _ = score.guide(0, "rgb", range(3), *messages)

    branch, views = score.branches["rgb"], unpack_views(messages, 0, score.device)
    t, noise = score._draw("guide", 0, range(3), messages, 20, 980)
    abar_t = branch.alphas_cumprod[t]
    z_t = guidance.add_noise(views.latents, noise, abar_t)
    texts = branch.texts.view_embeddings(views.azimuth_deg, views.elevation_deg), branch.texts.negative_embeddings(6)
    with torch.no_grad():
        positive, negative = (branch.denoiser.eps(z_t, t, condition(views, text)) for text in texts)
    expected = (1 - abar_t)[:, None, None, None] * scale * (positive - negative)
    assert expected.abs().max() > 1e-4
    np.testing.assert_allclose(np.concatenate(found), expected.numpy(), rtol=1e-4, atol=1e-6)


def test_an_exhibit_refuses_csd_and_names_the_field() -> None:
    run = strict_json.apply_overrides(make_preset("exhibit", 10), ["prompt=a chair", "prior.exhibit.assets=procedural"])
    with pytest.raises(ValueError, match=r"^stages\.0\.branches\.0\.method: must not be csd for an exhibit"):
        check_run(run.with_method("csd"))
