"""A run within a budget of memory is the same run: views a few at a time, renders made again for their gradients."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_particles import WhiteCodec, advance, assert_same, make_config, new_particle, some_gradient
from small_runs import Fault, Watch, WatchedRuntime, assert_same_end, new_run, small_config, train
from tiny_prior import make_tiny_prior
from tiny_score import GUIDANCE, LEARNER, learn, new_score, views_of

from raydream import device, runs
from raydream.cluster.gpus import Load, Need
from raydream.cluster.runtime import LocalRuntime
from raydream.config.branches import BranchConfig, LearnerConfig
from raydream.config.cluster import Budget
from raydream.config.names import MethodName
from raydream.distill.loop import RunFailed, RunLoop
from raydream.distill.particle import Particle, make_particle
from raydream.distill.score import Score
from raydream.runs import make_runtime
from raydream.types import Render

STEP, COUNTS = 2, (3, 2, 2)  # seven views: all, 4 and 3, 3, 3 and 1, one at a time


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("prior") / "prior", "v_prediction")


def exact(score: Score) -> Score:
    """The same model in float64, so that answers differ by no more than float32 holds, whatever their batch."""
    for branch in score.branches.values():
        branch.denoiser.unet.double()  # type: ignore[attr-defined]
    return score


def in_parts(score: Score, views_at_once: int) -> Score:
    score.config = replace(score.config, views_at_once=views_at_once)
    return score


def batches(score: Score) -> list[int]:
    """The number of views in each pass through the UNet from now on."""
    sizes: list[int] = []
    score.branches["rgb"].denoiser.unet.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda module, args: sizes.append(len(args[0]))
    )
    return sizes


@pytest.mark.parametrize(
    ("method", "guidance", "texts"),
    [
        ("vsd", GUIDANCE, 2),
        ("sds", GUIDANCE, 2),
        ("sds", replace(GUIDANCE, perp_neg=True), 4),
    ],
)
def test_guiding_a_few_views_at_a_time_is_guiding_all(
    prior: Path, method: MethodName, guidance: BranchConfig, texts: int
) -> None:
    score, messages = exact(learn(new_score(prior, method, guidance), STEP)), views_of(STEP, COUNTS)
    *whole, figures = score.guide(STEP, "rgb", range(3), *messages)
    sizes = batches(score)
    for at_once, parts in ((3, (3, 3, 1)), (4, (4, 3)), (1, (1,) * 7)):
        sizes.clear()
        *pieces, told = in_parts(score, at_once).guide(STEP, "rgb", range(3), *messages)
        for piece, one in zip(pieces, whole, strict=True):
            np.testing.assert_allclose(piece, one, rtol=2e-6, atol=2e-6)
        assert told["guide/t"] == figures["guide/t"]
        assert [size for size in sizes if size not in parts or texts == 1] == [texts * part for part in parts]


@pytest.mark.parametrize(
    "settings", [LEARNER, pytest.param(replace(LEARNER, timesteps_per_view=2), marks=pytest.mark.slow)]
)
def test_learning_from_a_few_views_at_a_time_is_learning_from_all(prior: Path, settings: LearnerConfig) -> None:
    """Also as two replicas, whose shares are those of the mean over all views."""
    score, messages = exact(learn(new_score(prior, learner=settings), STEP)), views_of(STEP)
    for members in ([0, 1, 2], [0, 2]):
        own = [messages[index] for index in members]
        whole = in_parts(score, 0).fit_gradients(STEP, 1, members, *own)
        for at_once in (4, 1):
            parts = in_parts(score, at_once).fit_gradients(STEP, 1, members, *own)
            assert parts.keys() == whole.keys()
            for name, expected in whole.items():
                scale = float(np.abs(expected).max())
                np.testing.assert_allclose(parts[name], expected, rtol=1e-5, atol=2e-6 * scale, err_msg=name)
    assert sum(bool(array.any()) for array in whole.values()) > 0.8 * len(whole), "it has learned before"


def test_a_fit_by_parts_holds_the_graph_of_one(prior: Path) -> None:
    def most_held(at_once: int) -> int:
        score, held = in_parts(learn(new_score(prior), STEP), at_once), {0: 0}
        peaks = [0]

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            peaks[0] = max(peaks[0], sum(held.values()))
            return tensor

        # the graph before a pass has been gone backward through
        unet = score.branches["rgb"].denoiser.unet  # type: ignore[attr-defined]
        unet.register_forward_pre_hook(lambda module, args: held.clear())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            score.fit(STEP, range(3), *views_of(STEP))
        return peaks[0]

    assert most_held(1) < 0.5 * most_held(0)


# --- renders that are made again --------------------------------------------------------------------------------------


def again(*overrides: str) -> Particle:
    return make_particle(replace(make_config(*overrides), renders_again=True))


class SampledCodec(WhiteCodec):
    """Draws with its generator, as a sampled posterior does."""

    def encode(self, render: Render, generator: torch.Generator) -> torch.Tensor:
        latents = super().encode(render, generator)
        return latents + 0.1 * torch.randn(latents.shape, generator=generator) * latents.detach()


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_rendering_again_takes_the_same_steps_to_the_bit(kernels: str) -> None:
    """Drawn posteriors, lights, jitter and noise, renewed occupancy, round trips, pictures between two calls."""
    settings = (
        f"cluster.kernels={kernels}", "stages.0.losses.round_trip=0.1", "stages.0.losses.orientation=0.01",
        "stages.0.losses.sparsity=1", "stages.0.scene.density_noise=0.5", "stages.0.shading.albedo_steps=2",
        "stages.0.scene.tile_samples=100", "stages.0.scene.min_alpha=0.001",
    )  # fmt: skip
    kept, made = new_particle(*settings), again(*settings)
    for step in range(5):
        views = []
        for particle in (kept, made):
            particle.codec = SampledCodec()
            views.append(particle.render(step))
            particle.look_at([20.0], 15.0, 16)
        assert_same(*views)
        one, two = (particle.apply(step, some_gradient(step)) for particle in (kept, made))
        assert {k: v for k, v in one.items() if "/" in k and not k.startswith(("time/", "cpu/"))} == {
            k: v for k, v in two.items() if "/" in k and not k.startswith(("time/", "cpu/"))
        }
    assert_same(made.snapshot(), kept.snapshot())


class Kept:
    """Is counted for as long as a graph holds it."""

    def __init__(self, tensor: torch.Tensor, alive: set[int]) -> None:
        self.tensor, self._alive = tensor.detach(), alive
        alive.add(id(self))

    def __del__(self) -> None:
        self._alive.remove(id(self))


def test_a_particle_that_renders_again_holds_no_graph_while_it_waits() -> None:
    def waiting(particle: Particle) -> int:
        alive: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(tensor, alive), lambda kept: kept.tensor):
            particle.render(0)
        return len(alive)

    assert waiting(new_particle()) > 10
    assert waiting(again()) == 0


def test_a_render_again_is_forgotten_restored_and_doubled_like_any() -> None:
    kept, made = new_particle(), again()
    start = made.snapshot()
    advance(made, range(3))
    made.render(3)
    made.restore(start)
    assert made.apply(3, some_gradient(3)) == {}
    advance(made, range(3))
    assert made.apply(2, some_gradient(2)) == {}
    advance(kept, range(3))
    assert_same(made.snapshot(), kept.snapshot())


@pytest.mark.slow
def test_a_run_within_a_budget_that_loses_a_particle_and_is_resumed_is_the_same_run(tmp_path: Path) -> None:
    config = small_config(steps=8)
    whole, parts = new_run(tmp_path / "whole", config), new_run(tmp_path / "parts", config)
    train(whole, config)

    def budgeted(*faults: Fault) -> WatchedRuntime:
        runtime = WatchedRuntime(*faults)
        runtime.budget = Budget(0, renders_again=True)
        return runtime

    # between its render and its gradients, when nothing but its step is known of it
    runtime = budgeted(Fault("particle", 1, "apply", 4))
    assert train(parts, config, runtime, Watch(stop_after=4)) < 8
    assert runtime.num_faults_left == 0
    assert train(parts, config, budgeted()) == 8
    assert_same_end(parts, whole)


def test_what_the_runtime_has_decided_reaches_the_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    for role, setting in (("score", "views_at_once"), ("particle", "renders_again")):
        make = partial(lambda setting, config: made.append(getattr(config, setting)), setting)
        monkeypatch.setattr(f"raydream.distill.loop.make_{role}", make)
    for budget, name in ((Budget(2, True), "two"), (None, "none")):
        config = small_config("n=1", steps=2)
        loop = RunLoop(LocalRuntime(budget), new_run(tmp_path / name, config), config, Watch())
        loop._set_up(loop.actors, 0)
    assert made == [2, True, 0, False]


def test_a_run_on_its_own_gpu_decides_by_what_is_free_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config, told = small_config("n=3"), list[str]()
    runtime = make_runtime(config, told.append)
    assert (runtime.budget, told) == (None, []), "on a CPU nothing is decided"
    free_gib = 12.0
    monkeypatch.setattr(device, "free_bytes", lambda _: int(free_gib * 2**30))
    needs = [
        Need(Budget(views, again), Load(1.0, 5.0), Load(2.0, 1.0 if views else 8.0))
        for again in (False, True)
        for views in (0, 1)
    ]
    monkeypatch.setattr(runs, "memory_needs", lambda _: needs)
    runtime = make_runtime(config, told.append)
    assert runtime.budget == Budget(1, renders_again=True), "5 stay, 8 or 5 at most beside them, 0.8 for the process"
    assert told == [
        "3 particles and 1 score model in one process on its GPU, 1 view at a time, one particle's graph at a time: "
        "11 of 12 GiB"
    ]
    free_gib = 10.0
    with pytest.raises(RunFailed, match=r"^n: 3 particles .*; --n 2 would fit"):
        make_runtime(config, told.append)
