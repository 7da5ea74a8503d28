"""A GLB opens in Blender (its bpy wheel, in an environment of its own: it wants an older numpy)."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from finished_meshes import fine_ball, finished_ball

from raydream.scene.export import to_uint8, write_glb
from raydream.scene.tangents import vertex_tangents
from raydream.scene.texture import vertex_normals

ROOT = Path(__file__).parents[2]
BLENDER = Path(os.environ.get("RAYDREAM_BLENDER", ROOT / ".venv" / "blender" / "bin" / "python"))
HOW = "no Blender to open the asset: python3 -m venv .venv/blender && .venv/blender/bin/pip install bpy==4.5.15"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BLENDER.exists(), reason=HOW)]


def test_a_glb_opens_in_blender_as_it_was_meant(tmp_path):
    mesh = finished_ball(fine_ball())
    (tmp_path / "mesh.glb").write_bytes(write_glb(mesh))
    words = [str(BLENDER), str(ROOT / "tests" / "support" / "open_in_blender.py"), str(tmp_path / "mesh.glb")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])

    vertices, faces, uv = mesh.vertices.numpy(), mesh.faces.numpy(), mesh.uv.numpy()
    corners = vertices[faces].reshape(-1, 3)
    x, y, z = np.array(found["corners"]).T  # z up, the front towards -y
    np.testing.assert_allclose(np.stack([x, z, -y], axis=-1), corners, atol=1e-5)
    np.testing.assert_allclose(found["uv"], uv[faces].reshape(-1, 2), atol=1e-6)
    assert found["bad_edges"] == 0
    assert (found["roughness"], found["metallic"]) == (0.5, 0.25)
    assert {"NORMAL_MAP", "TEX_IMAGE", "BSDF_PRINCIPLED"} <= set(found["nodes"])

    height, width, _ = mesh.texture.shape
    assert (found["image_px"], found["colour_space"]) == ([width, height], "sRGB")
    picture = np.array(found["image"]).reshape(height, width, 3)[::-1]  # Blender's rows begin at the bottom
    np.testing.assert_array_equal(picture, to_uint8(mesh.texture))

    ours = vertex_tangents(vertices, vertex_normals(vertices, faces), faces, uv)[faces].reshape(-1, 4)
    x, y, z, sign = np.array(found["tangents"]).T
    cosine = (np.stack([x, z, -y], axis=-1) * ours[:, :3]).sum(-1)
    assert (sign == ours[:, 3]).mean() > 0.99
    assert np.degrees(np.arccos(np.quantile(cosine.clip(-1, 1), 0.05))) < 2
