"""The supervisor against runners made of words: whatever dies, each accepted generation has one runner in the end."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runners import FakeRunners, ticks
from service_cases import REQUEST, ROOMY, epoch_of

from serve.records import Record, Records
from serve.supervisor import Runners, RunnerStatus, Supervisor


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(f"sqlite:///{tmp_path / 'records.sqlite3'}")


@pytest.fixture
def runners() -> FakeRunners:
    return FakeRunners()


def add(records: Records) -> Record:
    return records.add("ada", REQUEST, None, ROOMY)[0]


def supervisor_of(
    records: Records, runners: Runners, num_slots: int, clock: Callable[[], float] = time.monotonic
) -> Supervisor:
    return Supervisor(records, runners, num_slots, lambda: epoch_of(records), clock=clock)


def test_the_fakes_are_what_the_supervisor_asks_for(runners: FakeRunners) -> None:
    assert isinstance(runners, Runners)


def test_a_runner_is_warm_before_anybody_asks(records: Records, runners: FakeRunners) -> None:
    ticks(supervisor_of(records, runners, num_slots=3), runners)
    assert runners.by_slot == {0: RunnerStatus(None, is_ready=True)}


def test_what_waits_is_started_in_its_order_as_far_as_there_are_slots(records: Records, runners: FakeRunners) -> None:
    waiting, supervisor = (
        [add(records).id for _ in range(3)],
        supervisor_of(records, runners, num_slots=2),
    )
    ticks(supervisor, runners, 6)
    assert runners.started == [(waiting[0], 1), (waiting[1], 1)]
    records.end(waiting[0], 1, "finished", {})
    runners.finish(0)
    ticks(supervisor, runners)
    assert runners.started[2:] == [(waiting[2], 1)]


def test_nobody_is_admitted_while_it_is_unknown_what_room_the_last_one_leaves(
    records: Records, runners: FakeRunners
) -> None:
    supervisor = supervisor_of(records, runners, num_slots=3)
    runners.by_slot = {slot: RunnerStatus(None, is_ready=True) for slot in range(3)}
    first, second = add(records), add(records)
    supervisor.tick()
    assert runners.started == [(first.id, 1)], "one in each look"
    runners.by_slot[0] = RunnerStatus((first.id, 1), is_ready=False, is_new=True)
    ticks(supervisor, runners)
    assert len(runners.started) == 1, "it has yet to ask for its places"
    runners.by_slot |= {0: RunnerStatus((first.id, 1), is_ready=False), 2: RunnerStatus(None, is_ready=False)}
    supervisor.tick()
    assert len(runners.started) == 1, "another one is about to take some"
    runners.warm_up()
    supervisor.tick()
    assert runners.started[1:] == [(second.id, 1)]


def test_a_generation_whose_runner_died_is_taken_up_again_before_all_that_wait(
    records: Records, runners: FakeRunners
) -> None:
    first, second, supervisor = (
        add(records),
        add(records),
        supervisor_of(records, runners, num_slots=1),
    )
    ticks(supervisor, runners)
    runners.kill(0)
    ticks(supervisor, runners)
    assert runners.started == [(first.id, 1), (first.id, 2)]
    assert records.get(second.id).state == "queued"  # type: ignore[union-attr]


def test_another_supervisor_finds_the_runners_at_their_work(records: Records, runners: FakeRunners) -> None:
    add(records)
    ticks(supervisor_of(records, runners, num_slots=1), runners)
    started = list(runners.started)
    ticks(supervisor_of(records, runners, num_slots=1), runners, 5)
    assert runners.started == started


def test_after_the_whole_cluster_was_gone_everything_goes_on(records: Records, runners: FakeRunners) -> None:
    running = add(records)
    ticks(supervisor_of(records, runners, num_slots=1), runners)
    again = FakeRunners()
    ticks(supervisor_of(records, again, num_slots=1), again)
    assert again.started == [(running.id, 2)]


def test_what_was_cancelled_is_stopped_and_in_the_end_killed(records: Records, runners: FakeRunners) -> None:
    record, clock = add(records), Clock()
    supervisor = supervisor_of(records, runners, num_slots=1, clock=clock)
    ticks(supervisor, runners)
    records.cancel(record.id)
    ticks(supervisor, runners)
    assert runners.stopped == [0]
    assert runners.by_slot[0].job == (record.id, 1)
    clock.now_s = 31.0
    supervisor.tick()
    assert runners.by_slot == {}
    ticks(supervisor, runners)
    assert runners.by_slot == {0: RunnerStatus(None, is_ready=True)}


def test_a_runner_that_is_lost_as_it_starts_is_replaced(records: Records, runners: FakeRunners) -> None:
    record, supervisor = add(records), supervisor_of(records, runners, num_slots=1)
    ticks(supervisor, runners, 1)
    runners.refuses = True
    ticks(supervisor, runners, 1)
    runners.refuses = False
    ticks(supervisor, runners)
    assert runners.started == [(record.id, 2)]


def test_what_keeps_dying_fails_in_words(records: Records, runners: FakeRunners) -> None:
    record, supervisor = add(records), supervisor_of(records, runners, num_slots=1)
    for _ in range(20):
        ticks(supervisor, runners)
        for slot in [slot for slot, status in runners.by_slot.items() if status.job]:
            runners.kill(slot)
    ended = records.get(record.id)
    assert ended is not None
    assert (ended.state, ended.error_title) == ("failed", "The run keeps dying")
    assert len(runners.started) == 6


def test_without_room_it_waits_and_takes_what_idle_runners_hold(records: Records, runners: FakeRunners) -> None:
    supervisor = supervisor_of(records, runners, num_slots=2)
    runners.by_slot = {0: RunnerStatus(None, is_ready=True), 1: RunnerStatus(None, is_ready=True)}
    record, runners.room = add(records), 1
    supervisor.tick()
    assert runners.by_slot == {0: RunnerStatus(None, is_ready=True)}
    assert runners.started == []
    runners.room = 2
    supervisor.tick()
    assert runners.started == [(record.id, 1)]


def test_runners_of_old_settings_go_once_they_have_nothing_to_do(records: Records, runners: FakeRunners) -> None:
    record = add(records)
    attempt = records.take_up(record, epoch_of(records))
    runners.by_slot = {
        0: RunnerStatus((record.id, attempt or 0), False, is_outdated=True),
        1: RunnerStatus(None, True, is_outdated=True),
    }
    supervisor = supervisor_of(records, runners, num_slots=2)
    supervisor.tick()
    assert list(runners.by_slot) == [0]
    records.end(record.id, attempt or 0, "finished", {})
    runners.by_slot[0] = RunnerStatus(None, is_ready=True, is_outdated=True)
    ticks(supervisor, runners)
    assert runners.by_slot == {0: RunnerStatus(None, is_ready=True)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_everything_ends_once_whatever_dies(records: Records, seed: int) -> None:
    """Runners die, supervisors are replaced, runners finish, in any order."""
    draw, runners = random.Random(seed), FakeRunners()
    ids, finished = [add(records).id for _ in range(6)], []
    supervisor = supervisor_of(records, runners, num_slots=2)
    for turn in range(400):
        ticks(supervisor, runners, 1)
        at_work = {slot: status.job for slot, status in runners.by_slot.items() if status.job}
        current = {(r.id, r.attempt) for r in records.running()}
        assert len({job[0] for job in at_work.values()}) == len(at_work), "two runners for one generation"
        for slot, job in at_work.items():
            what = draw.random()
            if what < 0.1:
                runners.kill(slot)
            elif what < 0.2 and turn > 20:
                if records.end(*job, "finished", {}):
                    assert job in current
                    finished.append(job[0])
                runners.finish(slot)
            else:
                record = records.get(job[0])
                assert record is not None
                records.progress(*job, {"step": record.step + 1})
        if draw.random() < 0.1:
            supervisor = supervisor_of(records, runners, num_slots=2)
        if records.counts() == {"finished": 6}:
            break
    assert sorted(finished) == sorted(ids)
