"""Distances, fronts, agreement and mesh checks against closed forms, and against real and glued assets."""

import math

import numpy as np
import pytest
import torch
import trimesh
from asset_cases import MINIPACK, needs_minipack

from raydream.assets.asset import Asset, turn_front
from raydream.assets.parts import Material, Part, build_asset
from raydream.assets.procedural import procedural_asset
from raydream.backend import load_backend
from raydream.config.evaluate import EvaluateConfig
from raydream.evaluate.agreement import ccm_agreement
from raydream.evaluate.diversity import feature_distances, measure_diversity, picture_distances
from raydream.evaluate.facing import Around, JudgeCheck, fit_same, fit_turned, judge_around, judge_facing, twin_ratio
from raydream.evaluate.glue import clip_faces, glue_two_fronts
from raydream.evaluate.references import check_references, load_references
from raydream.evaluate.results import is_trusted
from raydream.evaluate.turntable import Turntable, take_turntable

SETTINGS = EvaluateConfig()
BACKEND = load_backend("auto", "cpu")


def table_of(asset: Asset) -> Turntable:
    return take_turntable(asset, SETTINGS, BACKEND)


def asset_of(*meshes: trimesh.Trimesh) -> Asset:
    parts = [Part(np.asarray(m.vertices), np.asarray(m.faces), Material(np.ones(4))) for m in meshes]
    return build_asset("test", "", parts, [])


@pytest.fixture(scope="module")
def chair() -> Turntable:
    return table_of(procedural_asset("chair", 0))


# --- diversity ------------------------------------------------------------------------------------------------------


def squares(colour: float, first_column: int = 0) -> torch.Tensor:
    """Twelve views of a grey square, 4 of 8 columns wide."""
    image = torch.zeros(12, 8, 8, 4)
    image[:, :, first_column : first_column + 4, :3] = colour
    image[:, :, first_column : first_column + 4, 3] = 1
    return image


def test_the_picture_distance_is_what_it_says():
    """Same place, colours apart by .5: sqrt(3 * .25 / 4). Apart: half of the union differs by (1, 1, 1, 1) each."""
    distances = picture_distances([squares(0.25), squares(0.75), squares(1.0, 4), squares(1.0)])
    assert distances[0, 1].item() == pytest.approx(math.sqrt(3) / 4)
    assert distances[2, 3].item() == pytest.approx(1.0)
    assert torch.equal(distances, distances.T)
    assert torch.equal(distances.diagonal(), torch.zeros(4))


def test_turned_copies_are_no_diversity(chair):
    turned = chair.rgba.roll(5, 0)
    assert picture_distances([chair.rgba, turned])[0, 1] == 0
    diversity = measure_diversity("picture", picture_distances([chair.rgba, turned, chair.rgba]))
    assert diversity is not None
    assert diversity.mean == 0
    assert measure_diversity("picture", torch.zeros(1, 1)) is None


def test_the_order_of_particles_does_not_matter(chair):
    tables = [chair.rgba, squares_like(chair, 0.2), squares_like(chair, 0.9), chair.rgba.flip(2)]
    one = measure_diversity("picture", picture_distances(tables))
    other = measure_diversity("picture", picture_distances([tables[i] for i in (2, 0, 3, 1)]))
    assert one is not None
    assert other is not None
    assert one.mean == pytest.approx(other.mean, rel=1e-6)
    assert one.mean > 0.1


def squares_like(table: Turntable, colour: float) -> torch.Tensor:
    return torch.cat([torch.full_like(table.views.rgb, colour) * table.views.alpha, table.views.alpha], dim=-1)


def test_features_are_compared_by_their_angle():
    first = torch.eye(12)
    distances = feature_distances([first, 3 * first.roll(4, 0), -first])
    assert distances[0, 1].item() == pytest.approx(0.0, abs=1e-6)
    assert distances[0, 2].item() == pytest.approx(1.0)  # turned away from each other: at right angles, not opposite


# --- fronts ---------------------------------------------------------------------------------------------------------


def test_one_front_is_consistent_and_two_are_janus():
    azimuth = torch.deg2rad(torch.arange(12) * 30.0)
    one, two = torch.cos(azimuth - math.radians(60)) - 0.01, torch.cos(2 * azimuth) + 0.1
    facing = judge_facing("test", one)
    assert (facing.verdict, facing.turn_deg, facing.frontal_views) == ("consistent", 60.0, 0.0)
    assert facing.front == pytest.approx((1 + 2 * math.cos(math.pi / 6)) / 3 - 0.01, rel=1e-5)
    assert facing.back == pytest.approx(-facing.front - 0.02, rel=1e-5)
    assert judge_facing("test", two).verdict == "janus"
    assert judge_facing("test", two).frontal_views == pytest.approx(3 / 7)  # 150, 180 and 210 of 90 ... 270


def test_half_a_face_is_cut_off_exactly():
    """A unit right triangle cut at x = .25 from either side; parts keep area, side and orientation."""
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    for height, area in ((corners[:, 0] - 0.25, 0.5 * 0.75**2), (0.25 - corners[:, 0], 0.5 - 0.5 * 0.75**2)):
        weights, source = clip_faces(height[None])
        parts = weights @ corners
        cross = torch.linalg.cross(parts[:, 1] - parts[:, 0], parts[:, 2] - parts[:, 0])
        assert (cross[:, 2] > 0).all()
        assert cross[:, 2].sum().item() / 2 == pytest.approx(area)
        assert torch.equal(source, torch.zeros(len(parts), dtype=torch.long))
        assert ((weights @ height) > -1e-6).all()


def test_a_glued_asset_looks_the_same_from_behind():
    for cut in (0.5, 0.8):
        table = table_of(glue_two_fronts(procedural_asset("chair", 0), cut))
        assert torch.allclose(table.rgba[0], table.rgba[6].flip(1), atol=1e-5)
        assert twin_ratio(table) < 1e-3
    sphere = trimesh.creation.icosphere(3)
    glued = glue_two_fronts(asset_of(sphere))
    assert glued.vertices.amax(0)[2] == pytest.approx(1.0)
    corners = glued.vertices[glued.faces]
    volume = (corners[:, 0] * torch.linalg.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert volume.item() == pytest.approx(sphere.volume, rel=1e-5)  # outside stays outside, nothing is lost


@needs_minipack
def test_real_assets_are_consistent_and_glued_ones_are_janus():
    references = load_references("a blue dog", MINIPACK, SETTINGS, BACKEND)
    check = check_references(references)
    assert check.num_assets >= 5  # whatever their colour
    assert check.consistent_on_real >= 0.8
    assert check.janus_on_middle >= 0.8
    assert is_trusted(check)
    twins = [twin_ratio(reference.real) for reference in references]
    assert sorted(twins)[len(twins) // 2] > 0.3


def test_an_object_is_judged_by_all_its_views_however_it_is_turned():
    chairs = [procedural_asset("chair", index) for index in range(4)]
    real = [Around.of(table_of(chair)) for chair in chairs]
    glued = [Around.of(table_of(glue_two_fronts(chair))) for chair in chairs]
    turned = table_of(turn_front(chairs[0], "+X"))
    distance, turn_deg = fit_turned(Around.of(turned), real[0])
    assert distance < 0.02 * fit_turned(real[0], real[1])[0]
    assert turn_deg == 270.0  # +X came to the front, so the old front is where -X is
    for own in (real[0], Around.of(turned)):
        assert judge_around(own, real[1:], glued[1:])[0] == "consistent"
    assert judge_around(glued[0], real[1:], glued[1:])[0] == "janus"
    one_side = Around(real[0].views[2].expand(12, -1), real[0].mirrored[2].expand(12, -1))
    assert judge_around(one_side, real[1:], glued[1:])[0] == "round"
    ball = Around.of(table_of(asset_of(trimesh.creation.icosphere(3))))
    assert judge_around(ball, real, glued)[0] == "round"
    assert fit_same(ball, ball) < 0.05 * fit_same(ball, real[0])
    assert judge_around(Around.of(turned), real, glued) == ("consistent", turn_deg)


def test_a_judge_must_tell_both_kinds():
    assert is_trusted(JudgeCheck("a", 10, 0.9, 0.9, 0.5))
    assert not is_trusted(JudgeCheck("always consistent", 10, 1.0, 0.0, 0.0))
    assert not is_trusted(JudgeCheck("always janus", 10, 0.0, 1.0, 1.0))


# --- agreement ------------------------------------------------------------------------------------------------------


def test_the_views_of_one_object_agree(chair):
    views = chair.views
    assert ccm_agreement(views.ccm, views.alpha, chair.cameras, chair.box) > 0.98


def test_views_that_do_not_belong_together_contradict_each_other(chair):
    views, cameras, box = chair.views, chair.cameras, chair.box
    shifted = ccm_agreement(views.ccm.roll(2, 0), views.alpha.roll(2, 0), cameras, box)
    other = table_of(procedural_asset("tree", 0))
    every_second = (torch.arange(12) % 2 == 0)[:, None, None, None]
    mixed_ccm = torch.where(every_second, views.ccm, other.views.ccm)
    mixed_alpha = torch.where(every_second, views.alpha, other.views.alpha)
    assert shifted < 0.9
    assert ccm_agreement(mixed_ccm, mixed_alpha, cameras, box) < 0.9
    with pytest.raises(ValueError, match="opacity"):
        ccm_agreement(views.ccm, torch.zeros_like(views.alpha), cameras, box)
