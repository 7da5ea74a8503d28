"""What a step asks of a GPU, counted on a pretend device: few waits, one copy for each thing that must cross."""

import importlib.util

import pytest

from raydream.bench.figures import CallCount
from raydream.bench.launches import count_elsewhere

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def calls(preset: str, *overrides: str) -> dict[str, CallCount]:
    return {row.call: row for row in count_elsewhere(preset, overrides)}


@pytest.fixture(scope="module")
def sd21() -> dict[str, CallCount]:
    return calls("sd21", "cluster.graphs=false")


def test_an_actor_waits_twice_a_step_at_most_outside_the_wire(sd21: dict[str, CallCount]) -> None:
    """A particle for the numbers of its samples, the score model for whether its gradient is finite."""
    assert sd21["render"].askers == {"backend.cuda._pack": 2}
    assert sd21["apply"].waits == sd21["guide"].waits == sd21["fit_gradients"].waits == 0
    assert sd21["fit"].askers == sd21["fit_update"].askers == {"distill.score._update": 1}
    assert all(row.wire_waits == (name != "fit_update") for name, row in sd21.items())


def test_replicas_copy_their_share_once_each_way(sd21: dict[str, CallCount]) -> None:
    """One array goes back; there go latents, two kinds of cameras, timesteps, noise and the cameras' weights."""
    share, update = sd21["fit_gradients"], sd21["fit_update"]
    assert share.copies == 7
    assert update.copies == 1
    assert update.to_device_bytes == 2 * share.to_host_bytes > 100_000


def test_guidance_comes_back_in_one_copy(sd21: dict[str, CallCount]) -> None:
    """There go latents, two kinds of cameras, timesteps and noise."""
    latents = 4 * 4 * 16 * 16
    assert sd21["guide"].copies == 6
    assert sd21["guide"].to_host_bytes == 2 * latents


def test_a_unet_of_stable_diffusions_depth_is_counted_whole(sd21: dict[str, CallCount]) -> None:
    """740 operations of a frozen pass and 1,257 of one with a LoRA were counted on the full-size UNet; 384 of
    these go where the LoRA is added to weights."""
    assert 1_500 < sd21["guide"].launches < 1_800
    assert 2_600 < sd21["fit"].launches < 3_300
    assert sd21["fit_update"].launches < 30  # the optimiser takes all parameters together


def test_a_recorded_pass_is_one_launch(sd21: dict[str, CallCount]) -> None:
    """As it will be on a GPU: what is left are draws, noise, sums and copies around three graphs."""
    found = calls("sd21")
    assert found["guide"].launches < 100 < sd21["guide"].launches
    assert found["fit"].launches < 100 < sd21["fit"].launches
    assert all(row.waits == sd21[name].waits for name, row in found.items())


@pytest.mark.parametrize(
    ("preset", "settings", "most"),
    [
        ("exhibit", ["prior.exhibit.assets=procedural", "prior.exhibit.num_modes=2", "prior.exhibit.supersample=1"], 2),
        ("embedded", [], 0),
        ("embedded", ["stages.0.branches.0.method=sds", "stages.0.losses.round_trip=0"], 0),
    ],
)
def test_other_presets_wait_as_little(preset: str, settings: list[str], most: int) -> None:
    """The modes of an exhibit are asked which of them are likely at all."""
    found = calls(preset, *settings)
    assert found["guide"].waits <= most
    assert found["render"].waits <= 2
    assert found["apply"].waits == 0
    if preset == "embedded":
        assert found["guide (maps)"].waits == 0
