"""A run of several stages: what the second one takes over, how it is resumed, and what cannot follow what."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import Fault, Watch, WatchedRuntime, assert_same_end, new_run, small_config, train

from raydream.cluster.runtime import LocalRuntime
from raydream.config import strict_json
from raydream.config.branches import BranchConfig
from raydream.config.run import PREVIOUS, RunConfig
from raydream.distill.loop import RunFailed
from raydream.distill.pipeline import run_pipeline
from raydream.runs import check_run
from raydream.schedule import Constant
from raydream.store.run_folder import RunFolder
from raydream.store.tensors import unpack

FIRST, SECOND = 5, 4
FIELD = ("scene/field.table", "scene/field.hidden", "scene/field.head", "scene/occupancy")


def two_stages(*overrides: str, methods: Sequence[str] = ("vsd", "sds"), start: str = PREVIOUS) -> RunConfig:
    """Checkpoints at 3, 5 (where the first stage ends), 6 and 9."""
    config = small_config(*overrides, steps=FIRST).with_method(methods[0])
    stage = config.stages[0]
    second = replace(stage, name="refine", num_steps=SECOND, start=start).with_method(methods[1])
    return replace(config, stages=(stage, second), output=replace(config.output, keep_checkpoints=9))


def scene_at(run: RunFolder, step: int, particle: int) -> dict[str, np.ndarray]:
    return unpack(run.read_checkpoint_file(step, f"particle_{particle:03d}.safetensors"))[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = two_stages()
    run = new_run(tmp_path_factory.mktemp("stages") / "run", config)
    watch = Watch()
    assert train(run, config, watch=watch) == FIRST + SECOND
    assert "stage 2 of 2, refine: 4 steps" in watch.phases
    return run


def test_each_stage_is_pulled_as_its_settings_say(undisturbed: RunFolder) -> None:
    rows = undisturbed.read_metrics()
    assert [row["step"] for row in rows] == list(range(FIRST + SECOND))
    assert all("loss/fit" in row for row in rows[:FIRST])
    assert not any("loss/fit" in row for row in rows[FIRST:])


def test_the_second_stage_moves_on_from_where_the_first_one_ended(tmp_path: Path) -> None:
    """With learning rates of 0 nothing moves any more: the scenes at the end are those of the first stage's end."""
    config = two_stages()
    still = replace(config.stages[1], lr_scale=Constant(0.0))
    config = replace(config, stages=(config.stages[0], still))
    run = new_run(tmp_path / "run", config)
    train(run, config)
    for particle in range(config.n):
        before, after = scene_at(run, FIRST, particle), scene_at(run, FIRST + SECOND, particle)
        assert all(np.array_equal(before[name], after[name]) for name in FIELD[:3])
        assert float(before["adam/0/step"]) == FIRST
        assert float(after["adam/0/step"]) == SECOND, "its optimiser is new"


def test_what_was_learned_goes_on_too(tmp_path: Path) -> None:
    config = two_stages(methods=("vsd", "vsd"))
    frozen = replace(config.stages[1], learner=replace(config.stages[1].learner, lr=1e-30, weight_decay=0.0))
    config = replace(config, stages=(config.stages[0], frozen))
    run = new_run(tmp_path / "run", config)
    train(run, config)
    before, after = (unpack(run.read_checkpoint_file(step, "score.safetensors"))[0] for step in (FIRST, FIRST + SECOND))
    learned = [name for name in before if name.startswith("learned/")]
    assert learned
    assert all(np.allclose(before[name], after[name], atol=1e-20) for name in learned)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [2, FIRST - 1, FIRST])
def test_a_run_resumes_in_whatever_stage_it_was_stopped(
    tmp_path: Path, undisturbed: RunFolder, stop_after: int
) -> None:
    config = two_stages()
    run = new_run(tmp_path / "run", config)
    assert train(run, config, watch=Watch(stop_after=stop_after)) < FIRST + SECOND
    assert train(run, config) == FIRST + SECOND
    assert_same_end(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("particle", 1, "render", FIRST - 1),
        Fault("particle", 0, "start_from", FIRST),
        Fault("particle", 2, "render", FIRST),
        Fault("score", 0, "guide", FIRST + 2),
        Fault("particle", 1, "build", skip=1),
    ],
    ids=lambda fault: f"{fault.method}-{fault.step}",
)
def test_a_death_in_either_stage_or_between_them_changes_nothing(
    tmp_path: Path, undisturbed: RunFolder, fault: Fault
) -> None:
    config, runtime, watch = two_stages(), WatchedRuntime(fault), Watch()
    run = new_run(tmp_path / "run", config)
    assert train(run, config, runtime, watch) == FIRST + SECOND
    assert runtime.num_faults_left == 0
    assert watch.num_restarts == 1
    assert_same_end(run, undisturbed)


def test_a_whole_run_of_two_stages_is_exported(tmp_path: Path) -> None:
    config, watch = two_stages("n=1"), Watch()
    run = new_run(tmp_path / "run", config)
    assert run_pipeline(config, run, LocalRuntime, watch, watch.stop) == FIRST + SECOND
    assert run.exists("particles/000/mesh.glb")
    assert strict_json.loads(RunConfig, run.read_config()) == config


def test_a_stage_starts_from_another_run(tmp_path: Path, undisturbed: RunFolder) -> None:
    """From the scenes of its last checkpoint, which nothing moves here."""
    config = small_config(f"stages.0.start={undisturbed.uri}", "stages.0.lr_scale=0", steps=2)
    run = new_run(tmp_path / "run", config)
    train(run, config)
    for particle in range(config.n):
        before, after = scene_at(undisturbed, FIRST + SECOND, particle), scene_at(run, 2, particle)
        assert all(np.array_equal(before[name], after[name]) for name in FIELD[:3])


def test_what_cannot_follow_is_refused(tmp_path: Path, undisturbed: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"^stages\.0\.start: must not be previous"):
        two_stages("stages.0.start=previous")
    with pytest.raises(ValueError, match=r"^stages: must be one or more"):
        replace(two_stages(), stages=())
    with pytest.raises(ValueError, match=r"^branches: must be of different renders, got rgb, rgb"):
        replace(two_stages().stages[0], branches=(BranchConfig(), BranchConfig()))
    config = two_stages()
    scene = config.stages[1].scene
    other = replace(config.stages[1], scene=replace(scene, hidden_width=32))
    with pytest.raises(RunFailed, match=r"a scene of other sizes cannot go on in this one \(field"):
        train(new_run(tmp_path / "sizes", config), replace(config, stages=(config.stages[0], other)))
    many = small_config("n=4", f"stages.0.start={undisturbed.uri}", steps=2)
    with pytest.raises(ValueError, match=r"has 3 particles, this run has 4; give --n 3"):
        train(new_run(tmp_path / "many", many), many)


def test_a_run_to_start_from_is_looked_at_before_anything_is_loaded(tmp_path: Path, undisturbed: RunFolder) -> None:
    check_run(small_config(f"stages.0.start={undisturbed.uri}"))
    with pytest.raises(ValueError, match=r"has 3 particles, this run has 4; give --n 3"):
        check_run(small_config("n=4", f"stages.0.start={undisturbed.uri}"))
    with pytest.raises(ValueError, match="nowhere"):
        check_run(small_config(f"stages.0.start={tmp_path / 'nowhere'}"))
