"""The loop: who is called with what, whole runs, and runs that are stopped, damaged and shot at."""

import io
import json
import logging
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import trimesh
from PIL import Image
from small_runs import (
    Fault,
    Watch,
    WatchedRuntime,
    assert_same_end,
    checkpoint_bytes,
    new_run,
    small_config,
    timeless_metrics,
    train,
)

from raydream.cluster.runtime import LocalRuntime
from raydream.config import strict_json
from raydream.config.run import RunConfig
from raydream.distill.loop import RunFailed, RunLoop
from raydream.distill.pipeline import run_pipeline
from raydream.distill.watch import RunWatch
from raydream.report.progress import Progress
from raydream.report.tensorboard import TensorboardLog
from raydream.store.run_folder import (
    MESH,
    PREVIEW,
    TURNTABLE,
    FileDigest,
    RunFolder,
    checkpoint_file,
    particle_file,
    preview_file,
)
from raydream.store.tensors import unpack

pytestmark = pytest.mark.slow

STEPS = 8  # checkpoints at 3, 6 and 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = small_config(steps=STEPS)
    run = new_run(tmp_path_factory.mktemp("undisturbed") / "run", config)
    assert train(run, config) == STEPS
    return run


def run_with_faults(folder: Path, *faults: Fault, config: RunConfig | None = None) -> tuple[RunFolder, Watch]:
    config = config or small_config(steps=STEPS)
    run, watch, runtime = new_run(folder, config), Watch(), WatchedRuntime(*faults)
    assert train(run, config, runtime, watch) == STEPS
    assert runtime.num_faults_left == 0, "a planted fault never happened"
    return run, watch


# --- a whole run -------------------------------------------------------------------------------------------------


def test_a_whole_run_leaves_every_artefact(tmp_path: Path) -> None:
    config = small_config("prompt=a red chair", "n=2", steps=STEPS)
    run = new_run(tmp_path / "run", config)
    watch = RunWatch(run, Progress(STEPS), TensorboardLog(run, 0), config.n)
    assert run_pipeline(config, run, LocalRuntime, watch, Watch().stop) == STEPS
    watch.close()

    for index in range(config.n):
        scene = trimesh.load_scene(io.BytesIO(run.read_bytes(particle_file(index, MESH))), file_type="glb")
        (mesh,) = scene.geometry.values()
        assert len(mesh.faces) >= 50
        assert np.abs(mesh.bounds).max() <= 1.0
        assert mesh.visual.material.baseColorTexture.size == (64, 64)
        film = imageio.imread(run.read_bytes(particle_file(index, TURNTABLE)), extension=".mp4")
        assert film.shape == (4, 256, 256, 3)  # enlarged for players
        assert Image.open(io.BytesIO(run.read_bytes(particle_file(index, PREVIEW)))).size == (256, 256)
    for step in (3, 6, STEPS):
        grid = Image.open(io.BytesIO(run.read_bytes(preview_file(step))))
        assert grid.width >= 2 * 16
        assert grid.height >= 2 * 16  # two views, one above the other
    report = run.read_bytes("report.html").decode()
    assert "a red chair" in report
    assert json.loads(run.read_bytes("versions.json"))["python"].startswith("3.")
    assert [row["step"] for row in run.read_metrics()] == list(range(STEPS))
    assert any(size > 0 for size in run.list_files("tensorboard").values())
    assert strict_json.loads(RunConfig, run.read_config()) == config
    assert set(run.list_files("checkpoints")) == {
        checkpoint_file(step, name)
        for step in (6, STEPS)
        for name in ("manifest.json", "particle_000.safetensors", "particle_001.safetensors", "score.safetensors")
    }


def test_every_figure_of_a_step_is_in_its_row(undisturbed: RunFolder) -> None:
    row = undisturbed.read_metrics()[-1]
    named = {"loss/rgb", "loss/fit", "scene/opacity", "scene/samples", "guide/t", "time/step_s"}
    timed = {f"{clock}/{part}_s" for clock in ("time", "cpu") for part in ("render", "apply", "guide", "fit")}
    assert set(row) == {"step"} | named | timed


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_every_bit(tmp_path: Path, undisturbed: RunFolder, seed: int) -> None:
    config = small_config(f"seed={seed}", steps=STEPS)
    run = new_run(tmp_path / "again", config)
    train(run, config)
    if seed == 0:
        assert_same_end(run, undisturbed)
    else:
        first, second = checkpoint_bytes(run), checkpoint_bytes(undisturbed)
        assert all(first[name] != second[name] for name in first)


# --- the algorithm of a step ---------------------------------------------------------------------------------------


def test_the_controller_passes_on_what_it_never_looks_into(tmp_path: Path) -> None:
    config, runtime = small_config(steps=3), WatchedRuntime()
    train(new_run(tmp_path / "run", config), config, runtime)
    for value in runtime.received:
        match value:
            case None | str():
                pass  # something was built, or says what it computes on
            case dict():
                assert all(isinstance(entry, str | float | int | FileDigest) for entry in value.values())
            case np.ndarray():
                assert value.dtype == np.uint8, "the only arrays for the controller are pictures"
            case _:
                raise AssertionError(f"the controller received {type(value)}")
    assert any(isinstance(value, np.ndarray) for value in runtime.received)
    assert not [value for value in runtime.sent if isinstance(value, np.ndarray | dict)]


@pytest.mark.parametrize(
    ("method", "replicas", "of_a_step"),
    [
        ("vsd", 1, {"render": 3, "guide": 1, "apply": 3, "fit": 1}),
        ("vsd", 2, {"render": 3, "guide": 2, "apply": 3, "fit_gradients": 4, "fit_update": 4}),
        ("sds", 1, {"render": 3, "guide": 1, "apply": 3}),
        ("sjc", 1, {"render": 3, "guide": 1, "apply": 3}),
    ],
)
def test_who_is_called_in_a_step(tmp_path: Path, method: str, replicas: int, of_a_step: dict[str, int]) -> None:
    settings = (
        f"stages.0.branches.0.method={method}",
        f"cluster.score_replicas={replicas}",
        "stages.0.learner.fits_per_step=2",
    )
    config, runtime = small_config(*settings, steps=2), WatchedRuntime()
    train(new_run(tmp_path / "run", config), config, runtime)
    num_steps_and_once = {name: 2 * count for name, count in of_a_step.items()}
    once = {"build": 3 + replicas, "hardware": 3 + replicas, "save": 4, "look_at": 3}
    once |= {"warm_up": replicas} if method == "vsd" else {}
    counted = {name: sum(call[2] == name for call in runtime.calls) for name in {call[2] for call in runtime.calls}}
    assert counted == num_steps_and_once | once


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_of_the_score_model_are_one_model(tmp_path: Path, undisturbed: RunFolder, replicas: int) -> None:
    config = small_config(f"cluster.score_replicas={replicas}", steps=STEPS)
    run, runtime = new_run(tmp_path / "run", config), WatchedRuntime()
    train(run, config, runtime)
    assert {index for role, index, method, _ in runtime.calls if method == "guide"} == set(range(replicas))
    for row, other in zip(timeless_metrics(run), timeless_metrics(undisturbed), strict=True):
        # the same sums in another order: float32 rounding, magnified by eight steps of Adam
        assert row["loss/rgb"] == pytest.approx(other["loss/rgb"], rel=1e-3)
        assert row["loss/fit"] == pytest.approx(other["loss/fit"], rel=1e-3)


@pytest.mark.parametrize("method", ["sds", "sjc"])
def test_without_a_learned_reference_a_resumed_run_is_the_same_run(tmp_path: Path, method: str) -> None:
    config = small_config(f"stages.0.branches.0.method={method}", steps=STEPS)
    whole, parts = new_run(tmp_path / "whole", config), new_run(tmp_path / "parts", config)
    train(whole, config)
    assert train(parts, config, watch=Watch(stop_after=2)) < STEPS
    assert train(parts, config) == STEPS
    assert_same_end(parts, whole)
    assert set(unpack(checkpoint_bytes(whole)["score.safetensors"])[0]) == {"step"}
    assert "loss/fit" not in whole.read_metrics()[0]


# --- stopped and resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [0, 3, 6])
def test_stopped_and_resumed_is_uninterrupted(tmp_path: Path, undisturbed: RunFolder, stop_after: int) -> None:
    config = small_config(steps=STEPS)
    run = new_run(tmp_path / "run", config)
    reached = train(run, config, watch=Watch(stop_after))
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert stop_after < reached == checkpoint.step < STEPS or stop_after == 6
    assert [row["step"] for row in run.read_metrics()] == list(range(reached))
    assert train(RunFolder.open(run.uri), config) == STEPS
    assert_same_end(run, undisturbed)


def test_stopped_before_the_first_step_and_resumed(tmp_path: Path, undisturbed: RunFolder) -> None:
    config, watch = small_config(steps=STEPS), Watch()
    run = new_run(tmp_path / "run", config)
    watch.stop.set()
    assert train(run, config, watch=watch) == 0
    assert train(run, config) == STEPS
    assert_same_end(run, undisturbed)


def flip_a_byte(run: RunFolder, step: int) -> None:
    path = Path(run.uri) / checkpoint_file(step, "particle_001.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(run: RunFolder, step: int) -> None:
    path = Path(run.uri) / checkpoint_file(step, "score.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def lose_a_file(run: RunFolder, step: int) -> None:
    (Path(run.uri) / checkpoint_file(step, "particle_000.safetensors")).unlink()


def cut_off_the_manifest(run: RunFolder, step: int) -> None:
    path = Path(run.uri) / checkpoint_file(step, "manifest.json")
    path.write_bytes(path.read_bytes()[:40])


def never_commit(run: RunFolder, step: int) -> None:
    """What a driver leaves that dies in the middle of a checkpoint, and in the middle of a line."""
    folder = Path(run.uri) / "checkpoints" / f"step_{step:08d}"
    (folder / "manifest.json").unlink()
    (folder / "score.safetensors").rename(folder / ".0123.tmp")
    with open(Path(run.uri) / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss/r')


@pytest.mark.parametrize("damage", [flip_a_byte, cut_off, lose_a_file, cut_off_the_manifest, never_commit])
def test_a_damaged_checkpoint_costs_a_few_steps_and_nothing_else(tmp_path, undisturbed, damage, caplog) -> None:
    config = small_config(steps=STEPS)
    run = new_run(tmp_path / "run", config)
    train(run, config)
    damage(run, STEPS)
    with caplog.at_level(logging.WARNING):
        reopened = RunFolder.open(run.uri)
        found = reopened.latest_checkpoint()
    assert found is not None
    assert found.step == 6
    assert damage is never_commit or "step 8 is damaged" in caplog.text
    with reopened.lock():
        assert train(reopened, config) == STEPS
    assert_same_end(run, undisturbed)
    assert not list(Path(run.uri).rglob("*.tmp"))


# --- shot at -------------------------------------------------------------------------------------------------------

KILLED = [
    Fault("particle", 0, "build"),
    Fault("score", 0, "build"),
    Fault("particle", 2, "render", 0),
    Fault("score", 0, "warm_up"),
    Fault("score", 0, "guide", 0),
    Fault("particle", 1, "apply", 1),
    Fault("score", 0, "fit", 2),
    Fault("particle", 0, "save", 3),
    Fault("score", 0, "save", 6),
    Fault("particle", 2, "apply", 5),
    Fault("score", 0, "guide", 7),
    Fault("particle", 1, "look_at"),
]


@pytest.mark.parametrize("fault", KILLED, ids=lambda f: f"{f.role}{f.index}-{f.method}-{f.step}")
def test_a_killed_actor_changes_nothing(tmp_path: Path, undisturbed: RunFolder, fault: Fault) -> None:
    run, watch = run_with_faults(tmp_path / "run", fault)
    assert watch.num_restarts == 1
    assert_same_end(run, undisturbed)
    assert set(watch.previews) == {3, 6, STEPS}


def test_many_deaths_at_once_and_during_the_recovery_change_nothing(tmp_path: Path, undisturbed: RunFolder) -> None:
    deaths = (
        Fault("particle", 0, "apply", 4),
        Fault("score", 0, "guide", 4),
        Fault("particle", 1, "load"),
        Fault("particle", 0, "build", skip=1),
    )
    run, watch = run_with_faults(tmp_path / "run", *deaths)
    assert watch.num_restarts == 4
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("method", ["render", "fit", "warm_up", "save"])
def test_an_error_that_may_pass_is_tried_again(tmp_path: Path, undisturbed: RunFolder, method: str) -> None:
    role = "score" if method in ("fit", "warm_up") else "particle"
    run, watch = run_with_faults(tmp_path / "run", Fault(role, 0, method, error="RuntimeError"))
    assert watch.num_restarts == 1
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("step", [2, 5])
def test_an_error_in_the_set_up_of_a_restarted_actor_is_tried_again(tmp_path, undisturbed, step) -> None:
    config = small_config(steps=STEPS)
    run, watch = new_run(tmp_path / "run", config), Watch()
    runtime = WatchedRuntime(
        Fault("particle", 1, "render", step), Fault("particle", 1, "build", skip=1, error="OSError")
    )
    assert train(run, config, runtime, watch) == STEPS
    assert watch.num_restarts == 2
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("round_index", [0, 1])
def test_no_update_of_a_replica_is_lost_unseen(tmp_path: Path, round_index: int) -> None:
    config = small_config("cluster.score_replicas=2", "stages.0.learner.fits_per_step=2", "n=2", steps=4)
    whole, disturbed, watch = new_run(tmp_path / "whole", config), new_run(tmp_path / "run", config), Watch()
    train(whole, config)
    runtime = WatchedRuntime(Fault("score", 1, "fit_update", 1, error="RuntimeError", skip=round_index))
    train(disturbed, config, runtime, watch)
    assert watch.num_restarts == 1
    assert_same_end(disturbed, whole)


def test_deaths_during_the_export_change_nothing(tmp_path: Path, undisturbed: RunFolder) -> None:
    config, watch = small_config(steps=STEPS), Watch()
    run = new_run(tmp_path / "run", config)
    runtime = WatchedRuntime(Fault("particle", 1, "export"), Fault("particle", 2, "export", skip=1))
    assert run_pipeline(config, run, lambda: runtime, watch, watch.stop) == STEPS
    assert watch.num_restarts == 2
    assert_same_end(run, undisturbed)
    assert all(run.exists(particle_file(index, MESH)) for index in range(config.n))
    assert run.exists("report.html")


def test_an_export_is_never_made_from_an_older_checkpoint(tmp_path: Path, undisturbed: RunFolder) -> None:
    config = small_config(steps=STEPS)
    run, runtime = new_run(tmp_path / "run", config), WatchedRuntime(Fault("particle", 1, "export"))
    loop = RunLoop(runtime, run, config, Watch())
    loop.start(0)
    assert loop.train(0, Watch().stop) == STEPS
    flip_a_byte(run, STEPS)
    with pytest.raises(RunFailed, match="the checkpoint of step 8 is damaged; resume makes it again"):
        loop.everywhere(STEPS, "export", lambda actor: (run.uri,))
    assert train(run, config) == STEPS
    assert_same_end(run, undisturbed)


def test_the_budget_of_restarts_ends_and_the_run_can_be_resumed(tmp_path: Path, undisturbed: RunFolder) -> None:
    config = small_config("cluster.max_restarts=1", steps=STEPS)
    run, watch = new_run(tmp_path / "run", config), Watch()
    deaths = WatchedRuntime(Fault("particle", 0, "render", 4), Fault("particle", 0, "render", 5, skip=1))
    with pytest.raises(RunFailed, match=r"particle 0 died at step 5 .*max_restarts=1 is spent"):
        train(run, config, deaths, watch)
    assert watch.num_restarts == 1
    assert train(RunFolder.open(run.uri), config) == STEPS
    assert_same_end(run, undisturbed)


def test_a_budget_of_none(tmp_path: Path) -> None:
    config, watch = small_config("cluster.max_restarts=0", steps=STEPS), Watch()
    with pytest.raises(RunFailed, match=r"score 0 died at step 0 .*max_restarts=0 is spent"):
        train(new_run(tmp_path / "run", config), config, WatchedRuntime(Fault("score", 0, "guide", 0)), watch)
    assert watch.num_restarts == 0


def test_a_mistake_ends_the_run_at_once(tmp_path: Path) -> None:
    config, watch = small_config("prompt=a zeppelin", steps=STEPS), Watch()
    with pytest.raises(RunFailed, match=r"score 0 raised ValueError .*'a zeppelin' names nothing.*cannot change that"):
        train(new_run(tmp_path / "run", config), config, watch=watch)
    assert watch.num_restarts == 0


def test_an_error_that_comes_again_ends_the_run(tmp_path: Path, undisturbed: RunFolder) -> None:
    config, watch = small_config(steps=STEPS), Watch()
    run = new_run(tmp_path / "run", config)
    planted = [Fault("particle", 2, "render", 4, error="RuntimeError")] * 2
    with pytest.raises(RunFailed, match=r"particle 2 raised RuntimeError at step 4 .*again at the same step"):
        train(run, config, WatchedRuntime(*planted), watch)
    assert watch.num_restarts == 1
    assert train(run, config) == STEPS
    assert_same_end(run, undisturbed)
