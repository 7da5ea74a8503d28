"""Pictures of finished meshes under a lamp, against the light of a sphere in closed form and a flag with two halves."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from small_runs import new_run, small_config

from raydream.backend import load_backend
from raydream.camera import orbit_cameras
from raydream.config.actors import particle_config
from raydream.distill.particle import make_particle
from raydream.scene.film import lit_pictures, mesh_asset
from raydream.store.run_folder import MESH, PREVIEW, particle_file
from raydream.types import Cameras, Mesh

SIDE_PX = 65


def cameras(*azimuths_deg: float) -> Cameras:
    each = torch.ones(len(azimuths_deg))
    return orbit_cameras(torch.tensor(azimuths_deg), 0 * each, 4 * each, 40 * each, SIDE_PX, SIDE_PX)


def pictures(mesh: Mesh, *azimuths_deg: float) -> np.ndarray:
    return lit_pictures(mesh_asset(mesh), cameras(*azimuths_deg), load_backend("auto", "cpu"))


def test_a_sphere_shines_by_the_cosine() -> None:
    ball = trimesh.creation.icosphere(4)
    vertices, faces = torch.from_numpy(ball.vertices).float(), torch.from_numpy(ball.faces.copy())
    color = torch.tensor([0.8, 0.4, 0.2])
    mesh = Mesh(vertices, faces, uv=torch.full((len(vertices), 2), 0.5), texture=color.expand(4, 4, 3))
    picture = pictures(mesh, 70.0)[0]
    assert picture[32, 32, 3] == 255
    assert not picture[0, 0, 3]
    lamp = torch.tensor([0.4, 0.6, 1.0]) / torch.tensor([0.4, 0.6, 1.0]).norm()
    middle = lamp[2]  # the middle of the ball looks at the camera
    np.testing.assert_allclose(picture[32, 32, :3] / 255, color * (0.5 + 0.5 * middle), atol=0.01)
    rows = (torch.arange(SIDE_PX) - 32).abs() < 12
    lit = picture[rows][:, rows]
    assert lit[0, -1, 0] > lit[-1, 0, 0] + 20, "the lamp stands above and to the right"


def test_the_texture_is_upright() -> None:
    vertices = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    texture = torch.tensor([[[1.0, 0, 0]], [[0, 0, 1.0]]]).repeat_interleave(8, 0).expand(16, 16, 3)
    flag = Mesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), uv=(vertices[:, :2] + 1) / 2, texture=texture)
    picture = pictures(flag, 0.0)[0]
    assert picture[20, 32, 0] > 100
    assert picture[20, 32, 2] < 10
    assert picture[44, 32, 2] > 100
    assert picture[44, 32, 0] < 10


def test_a_mesh_without_texture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^mesh\.texture"):
        mesh_asset(Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]])))


@pytest.fixture
def export(tmp_path: Path) -> Callable[[str], tuple[bytes, np.ndarray]]:
    """The mesh and the picture of one and the same particle, exported with a material."""

    def run_of(material: str) -> tuple[bytes, np.ndarray]:
        config = small_config(f"output.material={material}", "output.turntable_frames=2", steps=4)
        run = new_run(tmp_path / material, config)
        particle = make_particle(particle_config(config, 0, 0))
        stats = particle.export(run.uri)
        assert stats["faces"] > 0
        picture = Image.open(io.BytesIO(run.read_bytes(particle_file(0, PREVIEW))))
        return run.read_bytes(particle_file(0, MESH)), np.asarray(picture).astype(int)

    return run_of


def test_a_lit_run_shows_its_mesh_under_the_lamp(export: Callable[[str], tuple[bytes, np.ndarray]]) -> None:
    (lit_glb, lit), (unlit_glb, unlit), (auto_glb, auto) = export("lit"), export("unlit"), export("auto")
    assert b"KHR_materials_unlit" in unlit_glb
    assert b"KHR_materials_unlit" not in lit_glb
    assert auto_glb == unlit_glb, "a run that was never shaded has its light in the albedo"
    np.testing.assert_array_equal(auto, unlit)
    inside = lit[128, 128]
    assert (inside < unlit[128, 128]).all(), "what does not face the lamp is darker"
    assert (lit[128, 128] >= 0.45 * unlit[128, 128]).all()
    np.testing.assert_array_equal(lit[0, 0], unlit[0, 0])
