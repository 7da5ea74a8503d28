"""A LoRA that stands on another prior than the one that guides: ProlificDreamer's learns v on Stable Diffusion 2.1."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_prior import make_tiny_prior
from tiny_score import GUIDANCE, LEARNER, PROMPT, new_score, views_of

from raydream.config.branches import LearnerConfig
from raydream.config.presets import make_preset
from raydream.config.prior import PriorConfig
from raydream.config.run import RunConfig
from raydream.diffusion import guidance
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.distill.branches import condition
from raydream.distill.messages import unpack_views
from raydream.priors import diffusers_folder
from raydream.priors.geometric import check_priors
from raydream.priors.kinds import prior_kind

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("priors")
    return make_tiny_prior(base / "epsilon"), make_tiny_prior(base / "v", "v_prediction", seed=1)


def run_with(guiding: Path, learner: LearnerConfig) -> RunConfig:
    base = make_preset("diffusers", 4)
    stage = replace(base.stages[0], learner=learner)
    return replace(base, prompt=PROMPT, prior=PriorConfig("diffusers", str(guiding)), stages=(stage,))


def test_it_learns_in_the_other_priors_own_way(folders: tuple[Path, Path]) -> None:
    """At its start the reference is the other prior: what guides is the difference between the two, in noise."""
    guiding, learning = folders
    score = new_score(guiding, guidance=replace(GUIDANCE, scale=1.0), learner=replace(LEARNER, prior=str(learning)))
    assert score.learner is not None
    assert score.learner.prediction_type == "v_prediction"
    messages = views_of(0)
    *gradients, _ = score.guide(0, "rgb", range(3), *messages)
    views = unpack_views(messages, 0, CPU, "rgb")
    t, noise = score._draw("guide", 0, range(3), messages, 20, 980)
    one, other = (DiffusersDenoiser.load(folder, torch.float32, CPU) for folder in folders)
    abar = one.alphas_cumprod[t]
    z_t = guidance.add_noise(views.latents, noise, abar)
    branch = score.branches["rgb"]
    told, plain = branch.text(views, 0, range(3), [2] * 3), branch.texts.prompt_embeddings(6)
    with torch.no_grad():
        difference = one.eps(z_t, t, condition(views, told)) - other.eps(z_t, t, condition(views, plain))
    expected = (1 - abar)[:, None, None, None] * difference
    torch.testing.assert_close(torch.cat([torch.from_numpy(g) for g in gradients]), expected, rtol=1e-4, atol=1e-5)
    start = {name: value.detach().clone() for name, value in score.learned.items()}
    score.fit(0, range(3), *messages)
    assert any(not torch.equal(start[name], value) for name, value in score.learned.items())


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet/config.json", {"cross_attention_dim": 64}, "text of width 64"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "schedule of beta_end 0.02, the prior that guides has"),
    ],
)
def test_a_prior_that_does_not_fit_the_guiding_one_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, part: str, change: dict[str, Any], words: str
) -> None:
    other = make_tiny_prior(tmp_path / "other")
    config = json.loads((other / part).read_text())
    (other / part).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=f"^stages.0.learner.prior: .*{words}.*--set stages.0.learner.prior= to learn"):
        check_priors(run_with(folders[0], LearnerConfig(prior=str(other))))


def test_one_that_is_not_here_names_the_setting(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"^stages.0.learner.prior: .*'nowhere' is neither a folder nor"):
        check_priors(run_with(folders[0], LearnerConfig(prior="nowhere")))
    sds = run_with(folders[0], LearnerConfig(prior="nowhere")).with_method("sds")
    assert check_priors(sds) == sds, "nobody learns, nobody looks"


def test_an_exact_score_has_none() -> None:
    base = make_preset("exhibit", 4)
    stage = replace(base.stages[0], learner=LearnerConfig(prior="sd21"))
    with pytest.raises(ValueError, match=r"^stages.0.learner.prior: must be empty"):
        check_priors(replace(base, stages=(stage,)))


def test_a_worker_may_download_what_the_driver_may(monkeypatch: pytest.MonkeyPatch, folders: tuple[Path, Path]) -> None:
    """On another node nothing is in the cache yet."""
    asked: list[tuple[str, bool]] = []

    def find(source: str, allow_download: bool = False) -> Path:
        asked.append((source, allow_download))
        return folders[0]

    monkeypatch.setattr(diffusers_folder, "resolve_prior", find)
    kind = prior_kind(PriorConfig("diffusers", "sd21-base", allow_download=True))
    kind.codec(CPU)
    kind.denoiser(PROMPT, "reference", CPU)
    assert set(asked) == {("sd21-base", True)}
