"""What a finished particle leaves behind, as its settings ask."""

import io
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from finished_meshes import SMALL, color_of_place, fine_ball

from raydream.camera import orbit_cameras
from raydream.config.cluster import OutputConfig
from raydream.distill.artefacts import export_particle
from raydream.scene.finish import finish_mesh
from raydream.scene.isosurface import EmptyMeshError
from raydream.store.run_folder import RunFolder
from raydream.types import Cameras, Mesh

OUTPUT = replace(SMALL, turntable_frames=1, turntable_px=16)


def scene_with(surface: Callable[[OutputConfig], Mesh]) -> SimpleNamespace:
    """A scene of which export must ask no more than its surface."""
    others = ("render", "preview", "regularizers", "param_groups", "after_step", "state", "load_state", "box")
    return SimpleNamespace(surface=surface, **dict.fromkeys(others, pytest.fail))


def nothing(output: OutputConfig) -> Mesh:
    raise EmptyMeshError("the densest point of the field has density 0.25; output.mesh_threshold sets another")


def cameras_at(azimuths: list[float], elevation: float, image_px: int) -> Cameras:
    azimuth = torch.tensor(azimuths)
    each = torch.ones_like(azimuth)
    return orbit_cameras(azimuth, elevation * each, 2.5 * each, 45.0 * each, image_px, image_px)


def look_at(azimuths: list[float], elevation: float, image_px: int) -> np.ndarray:
    return np.zeros((len(azimuths), image_px, image_px, 4), np.uint8)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(str(tmp_path / "run"), "{}")


def test_levels_of_detail_and_formats_lie_beside_the_mesh(run):
    fine = fine_ball()
    ball = scene_with(lambda output: finish_mesh(fine, color_of_place, output))
    output = replace(OUTPUT, mesh_lods=(200, 60), mesh_formats=("stl", "obj"))
    stats = export_particle(ball, cameras_at, look_at, 3, output, False, run.uri)
    names = sorted(name.rpartition("/")[2] for name in run.list_files("particles"))
    assert names == [
        "mesh.glb", "mesh.mtl", "mesh.obj", "mesh.png", "mesh.stl", "mesh_lod1.glb", "mesh_lod2.glb", "mesh_normal.png",
        "preview.png", "turntable.mp4",
    ]  # fmt: skip
    counts = []
    for name in ("mesh", "mesh_lod1", "mesh_lod2"):
        data = run.read_bytes(f"particles/003/{name}.glb")
        (solid,) = trimesh.load_scene(io.BytesIO(data), file_type="glb").geometry.values()
        counts.append(len(solid.faces))
        assert solid.visual.material.normalTexture is not None
    assert 400 < counts[0] <= 500
    assert 150 < counts[1] <= 200
    assert 40 < counts[2] <= 60
    assert stats["faces"] == counts[0]
    assert (stats["watertight"], stats["components"], stats["non-manifold edges"]) == ("yes", 1, 0)
    assert stats["faces through others"] == 0
    assert stats["UV overlap"] == "0.0%"
    export_particle(ball, cameras_at, look_at, 3, replace(OUTPUT, mesh_formats=("stl",)), False, run.uri)
    left = {name.rpartition("/")[2] for name in run.list_files("particles")}
    assert not {"mesh.obj", "mesh.mtl", "mesh.png", "mesh_lod1.glb", "mesh_lod2.glb"} & left, "of the mesh before"
    assert {"mesh.glb", "mesh.stl", "preview.png"} <= left
    assert "note" not in stats


def test_nothing_is_told_and_leaves_a_film_alone(run):
    stats = export_particle(scene_with(nothing), cameras_at, look_at, 0, OUTPUT, False, run.uri)
    assert stats["vertices"] == 0
    assert "the densest point of the field has density 0.25" in stats["note"]
    assert "output.mesh_threshold" in stats["note"]
    assert sorted(run.list_files("particles")) == ["particles/000/preview.png", "particles/000/turntable.mp4"]
