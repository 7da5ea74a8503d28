"""Clean geometry, on planted faults."""

import math
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
import trimesh

from raydream.config.cluster import OutputConfig
from raydream.scene.cleaning import close_mesh, decimate_mesh, drop_unseen_pieces, keep_largest_piece, mend_edges
from raydream.scene.crossings import crossing_faces
from raydream.scene.finish import finish_mesh
from raydream.scene.isosurface import extract_surface
from raydream.scene.memory import free_bytes, texture_that_fits
from raydream.types import Mesh


def mesh_of(*solids: trimesh.Trimesh) -> Mesh:
    first = np.cumsum([0, *(len(solid.vertices) for solid in solids)])
    vertices = np.concatenate([solid.vertices for solid in solids]).astype(np.float64)
    faces = np.concatenate([solid.faces + offset for solid, offset in zip(solids, first)]).astype(np.int64)
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(faces))


def ball(x: float = 0.0, radius: float = 1.0, inside_out: bool = False) -> trimesh.Trimesh:
    sphere = trimesh.creation.icosphere(3, radius=radius)
    sphere.apply_translation([x, 0, 0])
    if inside_out:
        sphere.invert()
    return sphere


def solid_of(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


def faces_at_edges(mesh: Mesh) -> set[int]:
    """How many faces meet at an edge, once vertices in one place are one."""
    points, place = np.unique(mesh.vertices.numpy(), axis=0, return_inverse=True)
    solid = trimesh.Trimesh(points, place.reshape(-1)[mesh.faces.numpy()], process=False)
    return set(np.bincount(solid.edges_unique_inverse).tolist())


def blobs(seed: int):
    """A density of twelve blobs with holes and handles."""
    draw = torch.Generator().manual_seed(seed)
    centre = (torch.rand(12, 3, generator=draw) - 0.5) * 1.2
    radius, weight = 0.08 + 0.25 * torch.rand(12, generator=draw), 1 + torch.rand(12, generator=draw)

    def density(points: torch.Tensor) -> torch.Tensor:
        squared = ((points[:, None] - centre) ** 2).sum(-1)
        ripple = 1 + 0.5 * torch.sin(20 * points).prod(-1)
        return (weight * 60 * torch.exp(-squared / radius**2)).sum(-1) * ripple

    return density


def test_what_lies_inside_another_piece_is_dropped():
    shells = [ball(), ball(radius=0.7, inside_out=True), ball(radius=0.4), ball(3.0, radius=0.5)]
    mesh = mesh_of(*shells)
    kept = drop_unseen_pieces(mesh.vertices.numpy(), mesh.faces.numpy(), 0.0)
    middle = mesh.vertices.numpy()[kept].mean(1)
    assert len(kept) == 2 * len(shells[0].faces)
    assert np.all(np.linalg.norm(middle, axis=-1) > 0.9)
    overlapping = mesh_of(ball(), ball(1.0))  # each sticks out of the other: both are seen
    assert len(drop_unseen_pieces(overlapping.vertices.numpy(), overlapping.faces.numpy(), 0.0)) == len(kept)


def test_the_largest_piece_alone():
    mesh = keep_largest_piece(mesh_of(ball(3.0, radius=0.5), ball(), ball(-3.0, radius=0.9)))
    np.testing.assert_allclose(mesh.vertices.norm(dim=-1), 1.0, atol=1e-6)


def test_decimation_leaves_no_edge_of_more_than_two_faces():
    """Seed 1 at 500 faces is one of those where it does: two sheets come to lie upon each other."""
    import fast_simplification

    surface = extract_surface(blobs(1), 64)
    torn, faces = fast_simplification.simplify(surface.vertices.numpy(), surface.faces.numpy(), target_count=500)
    assert faces_at_edges(Mesh(torch.from_numpy(torn), torch.from_numpy(faces.astype(np.int64)))) == {2, 4}
    for count in (4000, 500):
        mesh = decimate_mesh(surface, count)
        assert faces_at_edges(mesh) == {2}
        assert abs(len(mesh.faces) - count) < 10
        assert solid_of(mesh).volume == pytest.approx(solid_of(surface).volume, rel=0.02)


def test_what_is_well_is_not_touched():
    vertices, faces = np.asarray(ball().vertices), np.asarray(ball().faces).astype(np.int64)
    mended = mend_edges(vertices, faces)
    assert mended[0] is vertices
    assert mended[1] is faces
    open_fin = np.concatenate([faces, [[faces[0, 0], faces[0, 1], faces[9, 2]]]])  # bounds no solid: stays
    assert mend_edges(vertices, open_fin)[1] is open_fin


def test_pieces_that_overlap_become_one_solid():
    both = mesh_of(ball(), ball(1.0))
    assert crossing_faces(both.vertices.numpy(), both.faces.numpy()).any()
    closed = close_mesh(both)
    assert closed is not None
    solid = solid_of(closed)
    assert solid.is_watertight
    assert faces_at_edges(closed) == {2}
    assert not crossing_faces(*(np.asarray(part) for part in (solid.vertices, solid.faces))).any()
    lens = 2 * np.pi * 0.5**2 / 3 * (3 - 0.5)  # two caps of height 1/2
    assert solid.volume == pytest.approx(2 * 4 / 3 * np.pi - lens, rel=0.02)
    hollow = close_mesh(mesh_of(ball(), ball(radius=0.5, inside_out=True)))
    assert hollow is not None
    assert solid_of(hollow).volume == pytest.approx(4 / 3 * np.pi, rel=0.02)


def test_a_sheet_bounds_no_solid_and_the_note_says_so():
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    assert close_mesh(mesh_of(sheet)) is None
    wanted = OutputConfig(texture_px=32, mesh_watertight=True)
    finished = finish_mesh(mesh_of(sheet), lambda points, normals: points * 0 + 0.5, wanted)
    assert finished.note == "not made watertight: its surface bounds no solid"
    assert len(finished.faces) == 2
    closed = finish_mesh(mesh_of(ball(), ball(1.0)), lambda points, normals: points * 0 + 0.5, wanted)
    assert closed.note == ""
    assert faces_at_edges(closed) == {2}
    one = replace(wanted, mesh_watertight=False, mesh_pieces="largest", mesh_max_faces=100)
    finished = finish_mesh(mesh_of(ball(), ball(4.0, 0.5)), lambda points, normals: points * 0 + 0.5, one)
    assert len(finished.faces) <= 100
    assert finished.vertices[:, 0].max() < 1.1


def test_a_texture_that_memory_does_not_hold_is_halved_and_the_note_says_so(monkeypatch):
    monkeypatch.setattr("raydream.scene.finish.free_bytes", lambda: 3e8)
    wanted = OutputConfig(texture_px=1024)
    finished = finish_mesh(mesh_of(ball()), lambda points, normals: points * 0 + 0.5, wanted)
    assert finished.texture.shape == (256, 256, 3)  # .2 GB and 260 bytes for each texel, of four fifths of .3 GB
    assert finished.note == "its texture has 256 px, not 1024: 0.3 GB of memory are free"
    assert texture_that_fits(8192, 24e9) == 8192
    assert texture_that_fits(8192, 16e9) == 4096
    assert texture_that_fits(64, 0.0) == 16


def test_free_memory_is_the_systems_or_the_containers(tmp_path):
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:  100 kB\nMemFree:  3 kB\nMemAvailable:     40 kB\n")
    assert free_bytes(memory, tmp_path) == 40 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(memory, tmp_path) == 40 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.current").write_text("10000\n")
    assert free_bytes(memory, tmp_path) == 20_000
    assert free_bytes(tmp_path / "none", tmp_path) == math.inf
    assert 0 < free_bytes(group=tmp_path / "none") / psutil.virtual_memory().available < 2


def test_two_boxes_that_share_an_edge_are_parted_for_good() -> None:
    """Not only by the numbers of their vertices: whoever welds what lies in one place finds two boxes still."""
    first, second = trimesh.creation.box(), trimesh.creation.box()
    second.apply_translation([1, 1, 0])
    corners = np.concatenate([first.vertices, second.vertices])
    both = trimesh.Trimesh(corners, np.concatenate([first.faces, second.faces + len(first.vertices)]))
    both.merge_vertices()
    assert len(both.vertices) == 14
    vertices, faces = mend_edges(np.asarray(both.vertices, np.float64), np.asarray(both.faces, np.int64))
    welded = trimesh.Trimesh(vertices.astype(np.float32), faces, process=True)
    assert (len(welded.split()), welded.is_watertight) == (2, True)
    assert abs(welded.volume - 2) < 1e-3
