"""Objects of any size anywhere: the same shape as near the origin, and a reason where nothing can be seen of one."""

import numpy as np
import pytest
import torch
from gltf_writer import GltfWriter

from raydream.assets.asset import AssetError, normalise_asset
from raydream.assets.libraries import AssetRecord
from raydream.assets.load import load_asset
from raydream.backend import load_backend
from raydream.config.render import ViewConfig
from raydream.views.render import render_record

CORNERS = np.float32([[-1, -1, -1], [2, -1, -1], [0, 1, -1], [0, 0, 1]])
FACES = np.uint16([0, 2, 1, 0, 1, 3, 1, 2, 3, 2, 0, 3])
BACKEND = load_backend("auto", "cpu")
VIEWS = ViewConfig(num_views=3, image_px=24, distance=(1.4, 1.6), images=("alpha", "depth", "normal", "ccm"))
PLACES = {
    "a millimetre at a million": {"translation": [1e6, -2e6, 1e6], "scale": [1e-3] * 3},
    "far along one axis": {"translation": [0, 0, 1e7], "scale": [1.0] * 3},
    "tiny": {"scale": [1e-30] * 3},
    "smaller than float32": {"scale": [1e-60] * 3},
    "huge": {"scale": [1e15] * 3},
    "huge and far": {"translation": [1e17, 0, 0], "scale": [1e12] * 3},
}


def placed(path, nodes):
    """A solid below so many nodes, each in the next."""
    writer = GltfWriter(CORNERS, FACES)
    writer.root["nodes"] = [node | {"children": [index + 1]} for index, node in enumerate(nodes)] + [{"mesh": 0}]
    return writer.save(path)


@pytest.mark.parametrize("name", PLACES)
def test_an_object_looks_the_same_anywhere(tmp_path, name):
    here = placed(tmp_path / "here.glb", [])
    there = placed(tmp_path / "there.glb", [PLACES[name]])
    tables = [render_record(AssetRecord("solid", path), VIEWS, BACKEND) for path in (here, there)]
    for kind in VIEWS.images:
        first, second = (table[kind].combine_chunks().to_numpy_ndarray().astype(float) for table in tables)
        assert (np.abs(first - second) > 0.02 * max(1.0, np.abs(first).max())).mean() < 0.005, kind
    for path in (here, there):
        assert normalise_asset(load_asset(path)).vertices.dtype == torch.float32


def test_scales_of_nested_nodes_multiply_without_loss(tmp_path):
    nodes = [{"scale": [1e-4] * 3}] * 10 + [{"scale": [1e4] * 3, "translation": [3, 0, 0]}] * 10
    here, there = load_asset(placed(tmp_path / "a.glb", [])), load_asset(placed(tmp_path / "b.glb", nodes))
    assert torch.allclose(normalise_asset(here).vertices, normalise_asset(there).vertices, atol=1e-6)


def test_normals_outlive_a_small_scale(tmp_path):
    leaning = np.tile(np.float32([0.6, 0, 0.8]), (3, 1))
    for scale in (1.0, 1e-4, 1e-20, 1e12):
        writer = GltfWriter()
        writer.attribute("NORMAL", leaning)
        writer.root["nodes"][0]["scale"] = [scale] * 3
        asset = load_asset(writer.save(tmp_path / "a.glb"))
        assert torch.allclose(asset.corner_normals[0], torch.from_numpy(leaning), atol=1e-6)


def test_ordinary_places_are_the_files_own(tmp_path):
    asset = load_asset(placed(tmp_path / "a.glb", [{"translation": [100, 5, 0]}]))
    assert torch.equal(asset.vertices, torch.from_numpy(CORNERS) + torch.tensor([100.0, 5.0, 0.0]))


def test_an_object_that_no_view_shows_is_refused(tmp_path):
    thread = np.float32([[0, 0, 0], [1, 0, 0], [0, 1e-7, 0]])
    path = GltfWriter(thread).save(tmp_path / "thread.glb")
    with pytest.raises(AssetError) as caught:
        render_record(AssetRecord("thread", path), VIEWS, BACKEND)
    assert caught.value.reason == "blank"
    assert "3 views" in caught.value.detail
