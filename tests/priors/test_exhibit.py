"""What an exhibit's exact score refuses of a run's settings, before anything is made."""

import dataclasses

import pytest

from raydream.config import strict_json
from raydream.config.presets import make_preset
from raydream.config.run import RunConfig
from raydream.runs import check_run


def run_of(*overrides: str) -> RunConfig:
    words = ["prompt=a chair", "prior.exhibit.assets=procedural", *overrides]
    return strict_json.apply_overrides(make_preset("exhibit", 10), words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("negative_prompt=ugly", "^negative_prompt: an exhibit knows the names of its objects only; leave it empty"),
        ("stages.0.losses.round_trip=1", r"^stages\.0\.losses\.round_trip: needs a prior with a VAE; leave it at 0"),
        ("stages.0.branches.0.scale=7.5", r"^stages\.0\.branches\.0\.scale: an exhibit's score is exact; .* must be 1"),
        ("stages.0.branches.0.perp_neg=true", r"^stages\.0\.branches\.0\.perp_neg: .* no view words; switch it off"),
        ("stages.0.branches.0.method=csd", r"^stages\.0\.branches\.0\.method: must not be csd .*; use vsd, sds or sjc"),
        ("prompt=a zeppelin", "^prompt: 'a zeppelin' names nothing"),
    ],
)
def test_what_an_exact_score_cannot_do_is_refused_by_name(words: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_run(run_of(words))


@pytest.mark.parametrize(("size_px", "of"), [(1, 4), (3, 4), (16, 16)])
def test_a_picture_that_the_learned_reference_cannot_halve_is_refused(size_px: int, of: int) -> None:
    """Three levels of patches of 4 px, or of single ones where the size is no multiple of 16."""
    with pytest.raises(ValueError, match=rf"^prior\.image_px: must be a multiple of {of}, and not itself, for 3 unet_"):
        check_run(run_of(f"prior.image_px={size_px}"))


def test_sizes_are_those_of_the_learned_reference_and_free_without_one() -> None:
    assert check_run(run_of("prior.image_px=3").with_method("sds")).prior.image_px == 3
    for size_px in ("4", "32", "64"):
        check_run(run_of(f"prior.image_px={size_px}", "stages.0.learner.unet_channels=[16, 16]"))


def test_every_stage_is_looked_at() -> None:
    run = run_of()
    scaled = dataclasses.replace(run.stages[0].branches[0], scale=2.0)
    second = dataclasses.replace(run.stages[0], start="previous", branches=(scaled,))
    with pytest.raises(ValueError, match=r"^stages\.1\.branches\.0\.scale: "):
        check_run(dataclasses.replace(run, stages=(run.stages[0], second)))


def test_the_assets_of_a_checked_run_are_named_outright() -> None:
    found = check_run(run_of("prior.exhibit.assets="))
    assert found.prior.exhibit.assets
    assert check_run(found) == found


def test_a_prior_with_a_vae_may_do_all_of_it() -> None:
    words = ["prompt=a red barrel", "negative_prompt=blue", "stages.0.losses.round_trip=1"]
    run = strict_json.apply_overrides(make_preset("embedded", 10), [*words, "stages.0.branches.0.perp_neg=true"])
    assert check_run(run.with_method("csd")) == run.with_method("csd")
