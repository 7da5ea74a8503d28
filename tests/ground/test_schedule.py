"""Schedules against their closed forms."""

import itertools

import pytest

from raydream.schedule import Constant, Linear, Polyline, Schedule, Steps, highest, lowest


def test_constant():
    assert {Constant(0.3).at(step) for step in (0, 1, 10**9)} == {0.3}


def test_linear_is_flat_straight_flat():
    schedule = Linear(start=1.0, end=-1.0, start_step=10, end_step=30)
    assert [schedule.at(step) for step in (0, 10, 15, 20, 30, 99)] == [1.0, 1.0, 0.5, 0.0, -1.0, -1.0]
    middle = [schedule.at(step) for step in range(10, 31)]
    assert [b - a for a, b in itertools.pairwise(middle)] == pytest.approx([-0.1] * 20)


def test_linear_of_no_length_is_a_jump():
    assert [Linear(2.0, 5.0, 4, 4).at(step) for step in (3, 4, 5)] == [2.0, 5.0, 5.0]


def test_steps_hold_the_last_value_reached():
    schedule = Steps(((0, 0.98), (5, 0.5), (8, 0.1)))
    assert [schedule.at(step) for step in (0, 4, 5, 7, 8, 1000)] == [0.98, 0.98, 0.5, 0.5, 0.1, 0.1]


def test_a_line_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match=r"^end_step:"):
        Linear(0.0, 1.0, 10, 9)


@pytest.mark.parametrize("points", [(), ((1, 0.5),), ((0, 1.0), (5, 0.5), (5, 0.1)), ((0, 1.0), (9, 0.5), (5, 0.1))])
def test_stairs_that_do_not_rise_from_zero_are_refused(points):
    with pytest.raises(ValueError, match=r"^points:"):
        Steps(points)


def test_schedules_are_values():
    assert Steps(((0, 1.0),)) == Steps(((0, 1.0),))
    assert hash(Linear(0.0, 1.0, 0, 5)) == hash(Linear(0.0, 1.0, 0, 5))


def test_a_polyline_is_straight_between_its_points_and_level_outside():
    line = Polyline(((2, 1.0), (4, 0.0), (8, 2.0)))
    assert [line.at(step) for step in (0, 2, 3, 4, 6, 8, 100)] == [1.0, 1.0, 0.5, 0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("points", [(), ((3, 1.0), (3, 2.0)), ((4, 1.0), (2, 0.0))])
def test_a_polyline_needs_rising_steps(points):
    with pytest.raises(ValueError, match="points"):
        Polyline(points)


def test_the_lowest_and_the_highest_value_are_those_of_any_step():
    schedules: list[Schedule] = [
        Constant(2.0),
        Linear(5.0, 3.0, 1, 4),
        Steps(((0, 9.0), (2, 7.0), (4, 8.0))),
        Polyline(((1, 4.0), (3, 6.0))),
    ]
    assert [lowest(s) for s in schedules] == [min(s.at(step) for step in range(6)) for s in schedules] == [2, 3, 7, 4]
    assert [highest(s) for s in schedules] == [max(s.at(step) for step in range(6)) for s in schedules] == [2, 5, 9, 6]
