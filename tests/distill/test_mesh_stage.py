"""A run whose later stages are of meshes: what they take over, how they are resumed, what is exported."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from small_runs import Watch, assert_same_end, new_run, small_config, train

from raydream.cluster.runtime import LocalRuntime
from raydream.config import strict_json
from raydream.config.branches import BranchConfig
from raydream.config.presets import embedded
from raydream.config.run import PREVIOUS, RunConfig
from raydream.config.scene import HashGridConfig, LossConfig, MeshConfig, NerfConfig, ShadingConfig
from raydream.distill.loop import RunFailed
from raydream.distill.pipeline import run_pipeline
from raydream.runs import check_run
from raydream.scene.mesh import MeshScene
from raydream.schedule import Constant
from raydream.store.run_folder import RunFolder
from raydream.store.tensors import unpack

NERF, SHAPE, TEXTURE = 4, 3, 2
SURFACE = ("scene/values", "scene/deformation", "scene/extent")


def three_stages(*overrides: str) -> RunConfig:
    """A NeRF; a mesh that starts from it and moves; that mesh, frozen. Checkpoints at 3, 4, 6, 7 and 9."""
    config = small_config("n=2", *overrides, steps=NERF)
    nerf = replace(config.stages[0], num_steps=NERF)
    scene = MeshConfig(resolution=12, grid=nerf.scene.grid, hidden_width=nerf.scene.hidden_width)
    losses = LossConfig(normal_consistency=Constant(1.0), laplacian=Constant(1.0))
    camera = replace(nerf.camera, image_px=Constant(24.0))
    shape = replace(
        nerf, name="shape", num_steps=SHAPE, start=PREVIOUS, scene=scene, losses=losses, camera=camera
    ).with_method("sds")
    frozen = replace(scene, lr_values=0.0, lr_deformation=0.0)
    texture = replace(shape, name="texture", num_steps=TEXTURE, scene=frozen, losses=LossConfig())
    return replace(config, stages=(nerf, shape, texture), output=replace(config.output, keep_checkpoints=9))


def scene_at(run: RunFolder, step: int, particle: int = 0) -> dict[str, np.ndarray]:
    return unpack(run.read_checkpoint_file(step, f"particle_{particle:03d}.safetensors"))[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config, watch = three_stages(), Watch()
    run = new_run(tmp_path_factory.mktemp("meshes") / "run", config)
    assert run_pipeline(config, run, LocalRuntime, watch, watch.stop) == NERF + SHAPE + TEXTURE
    assert strict_json.loads(RunConfig, run.read_config()) == config
    return run


def test_the_surface_moves_in_one_stage_and_stays_in_the_next(undisturbed: RunFolder) -> None:
    before, moved, after = (scene_at(undisturbed, step) for step in (NERF, NERF + SHAPE, NERF + SHAPE + TEXTURE))
    assert not set(SURFACE) & set(before)
    assert all(np.array_equal(moved[name], after[name]) for name in SURFACE)
    assert np.abs(moved["scene/deformation"]).max() > 0
    assert not np.array_equal(moved["scene/field.head"], after["scene/field.head"])
    rows = undisturbed.read_metrics()
    assert ["loss/laplacian" in row for row in rows] == [False] * NERF + [True] * SHAPE + [False] * TEXTURE


def test_the_finished_mesh_is_closed(undisturbed: RunFolder) -> None:
    mesh = trimesh.load_mesh(Path(undisturbed.uri) / "particles/000/mesh.glb")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    assert mesh.volume > 0


@pytest.mark.parametrize("stop_after", [NERF - 1, NERF + 1, NERF + SHAPE - 1])
def test_it_resumes_to_the_bit_wherever_it_was_stopped(tmp_path: Path, undisturbed: RunFolder, stop_after: int) -> None:
    config = three_stages()
    run = new_run(tmp_path / "run", config)
    assert train(run, config, watch=Watch(stop_after=stop_after)) < config.num_steps
    assert train(run, config) == config.num_steps
    assert_same_end(run, undisturbed)


def test_a_mesh_starts_from_another_run_of_a_nerf_or_of_a_mesh(tmp_path: Path, undisturbed: RunFolder) -> None:
    nerf = small_config("n=2", steps=2)
    first = new_run(tmp_path / "nerf", nerf)
    train(first, nerf)
    for number, uri in enumerate((first.uri, undisturbed.uri)):
        whole = three_stages()
        config = replace(whole, stages=(replace(whole.stages[2], start=uri),))
        run = new_run(tmp_path / str(number), config)
        train(run, config)
        assert scene_at(run, TEXTURE)["scene/values"].shape == (13, 13, 13)
    assert np.array_equal(
        scene_at(run, TEXTURE)["scene/values"], scene_at(undisturbed, config.num_steps + 7)["scene/values"]
    )


def test_what_cannot_follow_is_refused(tmp_path: Path) -> None:
    config = three_stages()
    back = replace(config.stages[0], start=PREVIOUS)
    with pytest.raises(RunFailed, match="a scene of other sizes cannot go on in this one"):
        train(new_run(tmp_path / "back", config), replace(config, stages=(*config.stages, back)))


def test_a_surface_that_vanishes_ends_the_run_and_leaves_the_stage_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(scene: MeshScene, step: int) -> None:
        if step == 2:
            scene.values.data.fill_(-1.0)

    monkeypatch.setattr(MeshScene, "after_step", vanish)
    config = three_stages("n=1")
    run = new_run(tmp_path / "run", config)
    with pytest.raises(
        RunFailed, match=r"raised EmptyMeshError at step \d+ \(.*vanished.*lower lr_values.*cannot change that"
    ):
        train(run, config)
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.step == NERF


def test_normals_are_guided_as_latents_and_then_as_pictures(tmp_path: Path) -> None:
    """From an ellipsoid, with the shipped prior: geometry moves, colours do not, and a resumed run is the same."""
    base = embedded(1)
    nerf = base.stages[0]
    assert isinstance(nerf.scene, NerfConfig)
    scene = MeshConfig(resolution=12, radii=(0.4, 0.5, 0.4), grid=HashGridConfig(num_levels=2, log2_table_size=6))
    normals = BranchConfig("normal", "sds", scale=100.0, t_max=Constant(0.5), latent_steps=2)
    stage = replace(nerf, num_steps=4, scene=scene, losses=LossConfig(), branches=(normals,), shading=ShadingConfig())
    output = replace(base.output, checkpoint_every=1, preview_px=16, keep_checkpoints=9)
    config = replace(base, prompt="a red barrel", n=1, stages=(stage,), output=output)
    run, again = new_run(tmp_path / "run", config), new_run(tmp_path / "again", config)
    train(run, config)
    rows = run.read_metrics()
    assert all(float(str(row["loss/normal"])) > 0 for row in rows)
    start, end = scene_at(run, 1), scene_at(run, 4)
    assert not np.array_equal(start["scene/values"], end["scene/values"])
    assert np.array_equal(start["scene/field.head"], end["scene/field.head"])
    train(again, config, watch=Watch(stop_after=0))
    assert train(again, config) == 4
    assert_same_end(again, run)


def test_normals_are_not_for_an_exhibit() -> None:
    config = three_stages()
    normals = replace(config.stages[1], branches=(BranchConfig("normal", "sds", scale=1.0),))
    with pytest.raises(ValueError, match=r"^stages\.1\.branches\.0\.render: must not be normal for an exhibit"):
        check_run(replace(config, stages=(config.stages[0], normals)))
