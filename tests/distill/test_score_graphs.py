"""The score model with recorded passes (``tests/support/tape.py``) and without: the same to the bit."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tape
import torch
from tiny_prior import make_tiny_prior
from tiny_score import new_score, views_of

from raydream.config import strict_json
from raydream.config.actors import score_config
from raydream.config.presets import make_preset
from raydream.diffusion import lora
from raydream.diffusion.lora import LoraDenoiser
from raydream.distill import score as score_module
from raydream.distill.messages import Message
from raydream.distill.score import Score, _recorder


def recorded(score: Score) -> Score:
    """The same with all passes recorded."""
    return Score(score.config, score.device, list(score.branches.values()), score.learner, tape.record)


def same(first: Message, second: Message) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("prediction", "dtype"), [("epsilon", "float16"), pytest.param("v_prediction", "float32", marks=pytest.mark.slow)]
)
def test_steps_are_the_same_to_the_bit(
    tmp_path: Path, prediction: str, dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Over steps, a checkpoint that is gone back to, another loss scale and other numbers of views."""
    monkeypatch.setattr(lora, "LoraDenoiser", partial(LoraDenoiser, hastened=True))
    prior = make_tiny_prior(tmp_path / "prior", prediction)
    plain, graphed = new_score(prior, dtype=dtype), recorded(new_score(prior, dtype=dtype))
    runs = []
    for score in (plain, graphed):
        found, places = [], {name: value.data_ptr() for name, value in score.learned.items()}
        for step in range(2):
            messages = views_of(step)
            found += score.guide(step, "rgb", range(3), *messages)[:-1]
            found.append(np.array(score.fit(step, range(3), *messages)["loss/fit"]))
        kept = score.snapshot()
        score.fit(2, range(3), *views_of(2))
        assert not same(score.snapshot(), kept)
        score.restore(kept)
        score.loss_scale /= 2
        found += score.guide(2, "rgb", range(3), *views_of(2, (1, 2, 1)))[:-1]
        score.fit(2, range(3), *views_of(2, (1, 1, 1)))
        assert places == {name: value.data_ptr() for name, value in score.learned.items()}, "a recording reads there"
        runs.append((found, score.snapshot()))
    (ours, state), (theirs, other) = runs
    assert all(np.array_equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert same(state, other)
    assert not [record for record in caplog.records if "CUDA graph" in record.message], "everything was recorded"
    denoisers = graphed._reference, graphed.branches["rgb"].denoiser
    passes = [graphed._pull, *(vars(each)["_eps"] for each in denoisers)]
    assert [len(vars(each)["_recorded"]) for each in passes] == [2, 2, 2], "one for each number of views"


def test_passes_are_recorded_on_a_gpu_beside_a_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "CudaRecorder", lambda: tape.record)
    cuda = torch.device("cuda")
    sd, exact = (score_config(make_preset(preset, 10), 0, 0) for preset in ("sd21", "exhibit"))
    off = strict_json.apply_overrides(make_preset("sd21", 10), ["cluster.graphs=false"])
    assert _recorder(sd, cuda) is tape.record
    for config, device in ((sd, torch.device("cpu")), (exact, cuda), (score_config(off, 0, 0), cuda)):
        assert _recorder(config, device) is None
