"""Mesh checks against planted defects whose size is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from raydream.assets.asset import Asset
from raydream.assets.parts import Material, Part, build_asset
from raydream.backend import load_backend
from raydream.scene.crossings import crossing_faces
from raydream.scene.mesh_checks import check_mesh

BACKEND = load_backend("auto", "cpu")


def asset_of(*meshes: trimesh.Trimesh) -> Asset:
    parts = [Part(np.asarray(m.vertices), np.asarray(m.faces), Material(np.ones(4))) for m in meshes]
    return build_asset("test", "", parts, [])


def box_at(x: float, y: float = 0.0, z: float = 0.0, side: float = 1.0) -> trimesh.Trimesh:
    box = trimesh.creation.box(extents=(side, side, side))
    box.apply_translation([x, y, z])
    return box


def sheet_of(uv: list[list[float]]) -> Asset:
    """The unit square of two faces, textured by 8 x 8 texels; its corners have the given places in it."""
    positions = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    material = Material(np.ones(4), image=np.full((8, 8, 4), 255, np.uint8))
    part = Part(positions, np.array([[0, 1, 2], [0, 2, 3]]), material, uv=np.array(uv))
    return build_asset("test", "", [part], [])


SQUARE = [[0.0, 0], [1, 0], [1, 1], [0, 1]]


def test_a_box_is_closed_and_a_box_without_a_face_is_not():
    box = trimesh.creation.box(extents=(1, 2, 4))
    checks = check_mesh(asset_of(box), 100, BACKEND)
    assert (checks.watertight, checks.components, checks.degenerate_faces, checks.faces) == (True, 1, 0, 12)
    assert (checks.size, checks.uv, checks.file_bytes) == ((1.0, 2.0, 4.0), None, 100)
    box.update_faces(np.arange(12) != 3)
    checks = check_mesh(asset_of(box), 100, BACKEND)
    assert (checks.watertight, checks.boundary_edges, checks.crossed_edges) == (False, 3, 0)


def test_split_seams_are_no_holes_and_parts_are_counted():
    big, small = trimesh.creation.box(extents=(2, 2, 2)), trimesh.creation.box(extents=(1, 1, 1))
    small.apply_translation([5, 0, 0])
    for mesh in (big, small):
        mesh.unmerge_vertices()
    checks = check_mesh(asset_of(big, small), 1, BACKEND)
    assert (checks.watertight, checks.components, checks.vertices) == (True, 2, 16)
    assert checks.largest_share == pytest.approx(24 / 30)


def test_edges_that_touch_and_faces_without_area_are_told():
    left, right = trimesh.creation.box(extents=(1, 1, 1)), trimesh.creation.box(extents=(1, 1, 1))
    right.apply_translation([1, 1, 0])  # they share one edge
    checks = check_mesh(asset_of(left, right), 1, BACKEND)
    assert (checks.watertight, checks.boundary_edges, checks.crossed_edges, checks.components) == (False, 0, 1, 1)
    asset = asset_of(left)
    flat = replace(asset, vertices=asset.vertices.clone())
    flat.vertices[flat.faces[0, 0]] = flat.vertices[flat.faces[0, 1]]
    assert check_mesh(flat, 1, BACKEND).degenerate_faces >= 1


def test_edges_of_three_and_four_faces_are_not_manifold():
    left, right = box_at(0), box_at(1, 1)
    assert check_mesh(asset_of(left, right), 1, BACKEND).non_manifold_edges == 1  # four faces along one edge
    fin = trimesh.Trimesh([[0.5, 0.5, -0.5], [0.5, 0.5, 0.5], [2, 2, 0]], [[0, 1, 2]], process=False)
    checks = check_mesh(asset_of(left, fin), 1, BACKEND)
    assert (checks.non_manifold_edges, checks.boundary_edges, checks.crossed_edges) == (1, 3, 0)


def test_shells_inside_are_hidden_and_shells_beside_are_not():
    outer, cavity, pebble, beside = box_at(0, side=4), box_at(0, side=2), box_at(0), box_at(9)
    cavity.invert()
    checks = check_mesh(asset_of(outer, cavity, pebble, beside), 1, BACKEND)
    assert checks.inner_share == pytest.approx((24 + 6) / (96 + 24 + 6 + 6), abs=1e-3)
    assert check_mesh(asset_of(outer, beside), 1, BACKEND).inner_share == 0
    half_out = check_mesh(asset_of(box_at(0, side=2), box_at(1, 0.05, 0.05)), 1, BACKEND)
    assert half_out.inner_share > 0  # of the face that is sunk in, and of half of its neighbours


@pytest.mark.parametrize("turn", [0.0, 0.3])
def test_faces_that_cross_are_counted_and_touching_ones_are_not(turn):
    """A long bar through two opposite sides of a cube: its eight long faces, and those of the cube that it hits."""
    cube, bar = box_at(0), trimesh.creation.box(extents=(3, 0.2, 0.1))
    bar.apply_translation([0, 0.2, 0.07])
    for mesh in (cube, bar):
        mesh.apply_transform(trimesh.transformations.rotation_matrix(turn, [1, 2, 3]))
    both = trimesh.util.concatenate(cube, bar)
    assert isinstance(both, trimesh.Trimesh)
    crossed = crossing_faces(both.vertices, both.faces)
    normal = np.abs(
        np.linalg.inv(trimesh.transformations.rotation_matrix(turn, [1, 2, 3]))[:3, :3] @ both.face_normals.T
    )
    assert crossed[12:].sum() == 8
    assert not crossed[12:][normal[0, 12:] > 0.9].any()  # its ends are outside
    assert 2 <= crossed[:12].sum() <= 4
    assert (normal[0, :12][crossed[:12]] > 0.9).all()
    assert check_mesh(asset_of(cube, bar), 1, BACKEND).crossing_faces == crossed.sum()
    for fine in (trimesh.creation.icosphere(3), trimesh.creation.torus(1, 0.4), cube):
        assert not crossing_faces(fine.vertices, fine.faces).any()


def test_faces_upon_each_other_cross_and_neighbours_in_a_plane_do_not():
    stacked = check_mesh(asset_of(box_at(0), box_at(0.3, 0.2, 1, side=1)), 1, BACKEND)
    assert 4 <= stacked.crossing_faces <= 8  # the halves of both sides in contact, and walls whose rims cross theirs
    points = np.array(
        [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.6, 0.3, 0], [0.5, 0.5, 1], [2, 0, 0], [0, 0.9, 1]]
    )
    assert not crossing_faces(points, np.array([[0, 1, 2], [0, 2, 3], [1, 6, 2]])).any()
    assert crossing_faces(points, np.array([[0, 1, 2], [0, 1, 4]])).all()  # folded back along a shared edge
    assert crossing_faces(points, np.array([[0, 1, 2], [0, 1, 2]])).all()
    assert not crossing_faces(points, np.array([[0, 1, 2], [4, 5, 7]])).any()  # a corner stands on it
    both = trimesh.util.concatenate(
        trimesh.creation.icosphere(2), trimesh.creation.icosphere(2).apply_translation([1, 0, 0])
    )
    assert isinstance(both, trimesh.Trimesh)
    assert crossing_faces(both.vertices, both.faces).any()  # mirror images: they meet in their rims alone


def test_a_crossing_is_found_as_by_trying_all_pairs():
    """Random triangles cross where an edge of one meets the other, found by solving for the point."""
    draw = np.random.default_rng(0)
    corners = draw.normal(size=(60, 1, 3)) + 0.5 * draw.normal(size=(60, 3, 3))

    def hits(one, two):
        for i in range(3):
            start, end = one[i], one[(i + 1) % 3]
            matrix = np.stack([end - start, two[0] - two[1], two[0] - two[2]], axis=1)
            along, s, t = np.linalg.solve(matrix, two[0] - start)
            if 0 < along < 1 and s > 0 and t > 0 and s + t < 1:
                return True
        return False

    expected = np.zeros(60, dtype=bool)
    for i in range(60):
        for j in range(i):
            if hits(corners[i], corners[j]) or hits(corners[j], corners[i]):
                expected[i] = expected[j] = True
    assert 10 < expected.sum() < 60
    np.testing.assert_array_equal(crossing_faces(corners.reshape(-1, 3), np.arange(180).reshape(-1, 3)), expected)


def test_uv_measures_of_a_square_are_those_of_its_texture():
    checks = check_mesh(sheet_of(SQUARE), 1, BACKEND).uv
    assert (checks.coverage, checks.overlap, checks.flat_faces) == (1.0, 0.0, 0)
    assert checks.stretch == pytest.approx(1.0)
    half = check_mesh(sheet_of([[0.0, 0], [0.5, 0], [0.5, 1], [0, 1]]), 1, BACKEND).uv
    assert half.coverage == pytest.approx(0.5, abs=0.01)
    assert half.stretch == pytest.approx(np.sqrt((4 + 1) / 2 * 0.5))  # singular values 2 and 1, half of the room
    folded = check_mesh(sheet_of([[0.0, 0], [1, 0], [1, 1], [1, 0]]), 1, BACKEND).uv
    assert folded.overlap == pytest.approx(1.0, abs=0.02)  # one half lies upon the other
    assert folded.coverage == pytest.approx(0.5, abs=0.01)
    flat = check_mesh(sheet_of([[0.0, 0], [1, 0], [1, 1], [0.5, 0.5]]), 1, BACKEND).uv
    assert (flat.flat_faces, flat.stretch) == (1, pytest.approx(1.0))


def test_textures_of_one_asset_do_not_overlap_each_other():
    asset = asset_of(trimesh.creation.box())
    uv = torch.zeros(12, 3, 2)
    uv[0] = uv[1] = torch.tensor([[0.0, 0], [1, 0], [0, 1]])  # half of it; the other faces have no place
    one = sheet_of(SQUARE).textures
    textures = replace(one, levels=one.levels.repeat(2, 1, 1), wrap=one.wrap.repeat(2, 1), smooth=one.smooth.repeat(2))
    sheets = torch.tensor([0, 1] + [0] * 10)
    apart = replace(asset, corner_uv=uv, face_texture=sheets.to(asset.face_texture.dtype), textures=textures)
    checks = check_mesh(apart, 1, BACKEND).uv
    assert (checks.overlap, checks.flat_faces) == (0.0, 10)
    assert checks.coverage == pytest.approx(0.5, abs=0.01)
    together = replace(apart, face_texture=torch.zeros_like(apart.face_texture))
    assert check_mesh(together, 1, BACKEND).uv.overlap == pytest.approx(1.0, abs=0.02)
