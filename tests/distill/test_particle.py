"""One particle, driven step by step: what a call may change, what comes out of it, and where its gradient goes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_particles import (
    SETTINGS,
    VIEWS,
    ColorCodec,
    WhiteCodec,
    advance,
    assert_same,
    make_config,
    new_particle,
    some_gradient,
)
from small_runs import new_run, small_config
from small_scenes import nerf_of
from torch import Tensor

from raydream.config.scene import LossConfig
from raydream.distill.particle import Particle, make_particle, step_cameras
from raydream.schedule import Constant, Steps


def parameter_gradients(particle: Particle) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in nerf_of(particle).named_parameters() if p.grad is not None}


# --- what a call may change ---------------------------------------------------------------------------------------


def test_apply_drops_what_is_early_stale_or_doubled() -> None:
    particle = new_particle()
    untouched = particle.snapshot()
    assert particle.apply(0, some_gradient(0)) == {}  # nothing was rendered
    particle.render(0)
    assert particle.apply(1, some_gradient(0)) == {}
    assert_same(particle.snapshot(), untouched)
    assert particle.apply(0, some_gradient(0))
    once = particle.snapshot()
    assert particle.step == once["step"] == 1
    assert particle.apply(0, some_gradient(0)) == {}  # the same call again
    particle.render(1)
    assert particle.apply(0, some_gradient(0)) == {}  # and once more, after the next render
    assert_same(particle.snapshot(), once)
    assert particle.apply(1, some_gradient(1))  # which is still there


def test_render_changes_nothing_and_repeats_itself() -> None:
    once, twice = new_particle(), new_particle()
    first = once.render(0)
    for _ in range(2):
        again = twice.render(0)
        assert_same(again, first)
    once.apply(0, some_gradient(0))
    twice.apply(0, some_gradient(0))
    assert_same(once.snapshot(), twice.snapshot())


def test_a_step_out_of_turn_is_refused() -> None:
    particle = new_particle(index=1)
    for step in (1, -1):
        with pytest.raises(RuntimeError, match=f"particle 1 stands at step 0, asked to render step {step}"):
            particle.render(step)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_restored_particle_continues_to_the_bit(at: int) -> None:
    """Occupancy is refreshed every second step, so its state counts too; at 0 Adam has no state yet."""
    particle = new_particle()
    advance(particle, range(at))
    saved = particle.snapshot()
    kept = {name: array.copy() for name, array in saved.items()}
    advance(particle, range(at, 6))
    assert_same(saved, kept)  # a snapshot is a copy
    other = new_particle()
    other.render(0)  # a render in flight is forgotten
    assert other.restore(saved) == at
    assert other.apply(0, some_gradient(0)) == {}
    advance(other, range(at, 6))
    assert_same(other.snapshot(), particle.snapshot())
    names = set(saved)
    assert {"scene/field.table", "scene/field.hidden", "scene/field.head", "scene/occupancy", "step"} <= names
    assert ({"adam/0/exp_avg", "adam/0/exp_avg_sq", "adam/0/step"} <= names) == (at > 0)


def test_rolling_back_in_place_is_starting_anew() -> None:
    particle = new_particle()
    start = particle.snapshot()
    advance(particle, range(3))
    end = particle.snapshot()
    particle.restore(start)
    advance(particle, range(3))
    assert_same(particle.snapshot(), end)


def test_a_checkpoint_file_holds_the_snapshot(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", small_config(*SETTINGS))
    particle = new_particle(index=2)
    advance(particle, range(2))
    digests = particle.save(run.uri, 2)
    run.commit_checkpoint(2, digests)
    assert list(digests) == ["particle_002.safetensors"]
    other = new_particle(index=2)
    assert other.load(run.uri, 2) == 2
    assert_same(other.snapshot(), particle.snapshot())


def test_an_idle_particle_stays_still() -> None:
    """ProlificDreamer keeps all particles in one optimiser, whose old momentum moves those that were not drawn."""
    idle, busy = new_particle(index=0), new_particle(index=1)
    advance(idle, range(3))
    before = idle.snapshot()
    advance(busy, range(5))
    idle.render(3)
    assert_same(idle.snapshot(), before)
    assert float(before["adam/0/step"]) == 3
    assert np.abs(before["adam/0/exp_avg"]).max() > 0  # momentum there would be


def test_particles_start_differently_and_the_same_one_alike() -> None:
    first, again, other = new_particle(index=0), new_particle(index=0), new_particle(index=1)
    assert_same(first.snapshot(), again.snapshot())
    assert not np.array_equal(first.snapshot()["scene/field.table"], other.snapshot()["scene/field.table"])
    assert not np.array_equal(first.render(0)["c2w"], other.render(0)["c2w"])


# --- gradients ----------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_latents_reaches_every_parameter() -> None:
    particle = new_particle("stages.0.scene.background=network", "stages.0.scene.random_background_probability=0")
    particle.codec = ColorCodec()
    particle.render(0)
    particle.apply(0, some_gradient(0))
    named = dict(nerf_of(particle).named_parameters())
    groups = {name.split(".weights")[0] for name in named}
    assert groups == {"field.table", "field.hidden", "field.head", "background"}
    for name, p in named.items():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_the_gradient_is_that_of_the_product_over_the_views() -> None:
    """d(loss)/d(latents) is the given gradient divided by the number of views."""
    particle, gradient = new_particle(), some_gradient(0)
    particle.render(0)
    assert particle._pending is not None
    assert particle._pending.seen is not None
    latents = particle._pending.seen.latents["rgb"]
    parameters = dict(nerf_of(particle).named_parameters())
    expected = torch.autograd.grad(latents, list(parameters.values()), torch.from_numpy(gradient) / VIEWS, True)
    particle.apply(0, gradient)
    for (name, found), wanted in zip(parameter_gradients(particle).items(), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9, msg=name)


def test_twice_the_gradient_is_twice_the_gradient() -> None:
    """ProlificDreamer's autograd function ignores the gradient that comes in, so that a scaled loss is not scaled."""
    found = []
    for factor in (1, 2):
        particle = new_particle()
        particle.render(0)
        stats = particle.apply(0, factor * some_gradient(0))
        found.append((parameter_gradients(particle), stats["loss/rgb"]))
    (once, loss), (twice, twice_loss) = found
    assert all(torch.equal(2 * once[name], twice[name]) for name in once)  # a power of two: to the bit
    assert twice_loss == pytest.approx(4 * loss)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_goes_down_the_gradient(sign: int) -> None:
    """A constant gradient on the colours darkens the object, its opposite lightens it; in steps of 1 of 255."""
    particle = new_particle()
    before = particle.look_at([0.0], 15.0, 16)[0, 8, 8].astype(int)
    gradient = np.zeros((VIEWS, 4, 16, 16), dtype=np.float32)
    gradient[:, :3] = sign
    for step in range(20):
        particle.render(step)
        particle.apply(step, gradient)
    after = particle.look_at([0.0], 15.0, 16)[0, 8, 8].astype(int)
    assert (sign * (before - after)[:3] > 4).all(), (before, after)


def test_regularizers_add_to_the_gradient_and_to_the_figures() -> None:
    weights = LossConfig(Constant(1.0), Constant(1.0), Constant(1.0), Constant(1.0))
    config = make_config()
    particle = make_particle(dataclasses.replace(config, stage=dataclasses.replace(config.stage, losses=weights)))
    particle.render(0)
    stats = particle.apply(0, np.zeros((VIEWS, 4, 16, 16), dtype=np.float32))
    names = {f"loss/{name}" for name in ("sparsity", "opaqueness", "orientation", "z_variance")}
    assert all(stats[name] > 0 for name in names - {"loss/orientation"})
    assert names <= set(stats)
    assert stats["loss/rgb"] == 0
    assert nerf_of(particle).field.table.grad is not None
    assert nerf_of(particle).field.table.grad.abs().max() > 0


def test_figures_of_a_step() -> None:
    particle = new_particle()
    particle.render(0)
    stats = particle.apply(0, some_gradient(0))
    timed = {f"{clock}/{part}_s" for clock in ("time", "cpu") for part in ("render", "apply")}
    assert set(stats) == {"loss/rgb", "scene/opacity", "scene/samples"} | timed
    assert all(type(value) is float for value in stats.values())
    assert stats["loss/rgb"] == pytest.approx(0.5 * np.square(some_gradient(0)).sum() / VIEWS, rel=1e-6)
    assert 0 < stats["scene/opacity"] < 1
    assert stats["scene/samples"] > 0
    assert all(stats[name] > 0 for name in timed)


# --- what leaves a particle -----------------------------------------------------------------------------------------


def test_resolution_follows_its_milestones_and_latents_keep_their_size() -> None:
    milestones = Steps(((0, 16.0), (2, 32.0)))
    config = make_config()
    camera = dataclasses.replace(config.stage.camera, image_px=milestones)
    config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, camera=camera))
    assert [step_cameras(config, step).height_px for step in range(4)] == [16, 16, 32, 32]
    particle = make_particle(config)
    num_samples = []
    for step in range(4):
        assert particle.render(step)["latents/rgb"].shape == (VIEWS, 4, 16, 16)
        num_samples.append(particle.apply(step, some_gradient(step))["scene/samples"])
    assert min(num_samples[2:]) > 3 * max(num_samples[:2])


@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_a_message_is_plain_arrays(wire: str) -> None:
    message = new_particle(f"cluster.wire_dtype={wire}").render(0)
    shapes = {"latents/rgb": (VIEWS, 4, 16, 16), "c2w": (VIEWS, 4, 4), "step": ()}
    shapes |= {name: (VIEWS,) for name in ("fov_y_deg", "azimuth_deg", "elevation_deg")}
    assert {name: array.shape for name, array in message.items()} == shapes
    assert message["latents/rgb"].dtype == wire
    assert message["c2w"].dtype == np.float32
    assert np.abs(message["latents/rgb"]).max() <= 1.001


def test_a_round_trip_adds_its_pull_where_the_codec_sees_another_colour() -> None:
    """A codec that takes every picture for a white one draws the particle to white, by the weight that is asked for."""

    def pull(weight: float) -> tuple[dict[str, Tensor], dict[str, float]]:
        particle = new_particle()
        stage = particle.config.stage
        losses = dataclasses.replace(stage.losses, sparsity=Constant(0.0), round_trip=Constant(weight))
        particle.config = dataclasses.replace(particle.config, stage=dataclasses.replace(stage, losses=losses))
        particle.codec = WhiteCodec()
        particle.render(0)
        stats = particle.apply(0, np.zeros((VIEWS, 4, 16, 16), np.float32))
        return parameter_gradients(particle), stats

    (once, stats), (twice, _), (none, without) = pull(1.0), pull(2.0), pull(0.0)
    assert stats["loss/round_trip"] > 0
    assert "loss/round_trip" not in without
    assert all(not gradient.any() for gradient in none.values())
    head = next(name for name in once if "head" in name)
    torch.testing.assert_close(twice[head], 2 * once[head])
    assert once[head].abs().max() > 0


def test_pictures_have_straight_alpha() -> None:
    """A soft ball of one colour: that colour wherever anything is seen, also where it is thin."""
    particle = new_particle()
    with torch.no_grad():
        nerf_of(particle).field.head.zero_()
    pictures = particle.look_at([0.0, 90.0, 180.0], 10.0, 24)
    assert pictures.shape == (3, 24, 24, 4)
    assert pictures.dtype == np.uint8
    assert not pictures[:, 0, 0, 3].any()
    assert (pictures[:, 12, 12, 3] > 200).all()
    seen = pictures[..., 3] > 0
    assert (pictures[..., 3][seen] < 200).any()
    assert np.abs(pictures[..., :3][seen].astype(int) - 128).max() <= 1
    step = particle.step
    particle.render(step)  # looking does not disturb a step
    particle.look_at([0.0], 0.0, 8)
    assert particle.apply(step, some_gradient(step))
