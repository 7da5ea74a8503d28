"""The lease of the record: one service has it, whoever loses it changes nothing any more, and both learn of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_runners import FakeRunners, SharedRunners, at_once, ticks
from service_cases import REQUEST, ROOMY

from serve.__main__ import main
from serve.lease import TTL_S, Leases, Tenure, take_or_refuse
from serve.records import Records
from serve.supervisor import RunnerStatus, Supervisor


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(url: str, clock: Clock) -> Iterator[Records]:
    found = Records(url, clock)
    yield found
    found.close()


def test_one_has_it_until_it_gives_no_sign_of_life(records: Records, clock: Clock) -> None:
    leases = records.leases
    assert leases.look().is_free
    assert (leases.take("a", "service A"), leases.take("b", "service B")) == (1, None)
    clock.now_s += TTL_S - 1
    assert leases.take("a", "service A") == 1
    clock.now_s += TTL_S - 1
    assert leases.take("b", "service B") is None
    assert str(leases.look()) == "service A, since 1970-01-12 13:46:40 UTC, last sign of life 14 s ago"
    clock.now_s += 2
    assert leases.take("b", "service B") == 2
    assert leases.take("a", "service A") is None
    assert leases.look().holder == "service B"


def test_what_is_given_back_is_free_at_once(records: Records) -> None:
    leases = records.leases
    leases.take("a", "service A")
    leases.release("b")
    assert leases.take("b", "service B") is None
    leases.release("a")
    assert leases.take("b", "service B") == 2


def test_by_force_it_changes_hands_while_its_holder_lives(records: Records) -> None:
    leases = records.leases
    assert [leases.take("a", "A"), leases.take("b", "B", by_force=True), leases.take("a", "A")] == [1, 2, None]


def test_the_databases_own_clock_counts(url: str) -> None:
    """Two machines' own may be minutes apart."""
    records = [Records(url) for _ in range(2)]
    assert [each.leases.take(name, name) for each, name in zip(records, "ab")] == [1, None]
    assert 0 <= records[1].leases.look().silent_s < TTL_S
    for each in records:
        each.close()


def test_of_many_that_start_at_once_one_has_it(url: str) -> None:
    found: list[int] = []

    def start(place: int) -> None:
        records = Records(url)
        epoch = records.leases.take(f"service {place}", f"service {place}")
        if epoch is not None:
            found.append(epoch)
        records.close()

    at_once(start)
    assert found == [1]


def test_who_comes_second_is_refused_in_one_line(records: Records, clock: Clock) -> None:
    first, second = (Tenure(records.leases, name, f"service {name}") for name in "ab")
    take_or_refuse(first, False, clock.sleep)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        first.beat()

    with pytest.raises(ValueError, match=r"^RAYDREAM_SERVE_DATA: the record belongs to service a, since .*--take-over"):
        take_or_refuse(second, False, sleep)
    assert second.epoch is None
    take_or_refuse(second, True, sleep)
    assert (second.epoch, first.beat(), first.epoch) == (2, False, None)


def test_after_a_kill_the_next_one_waits_for_as_long_as_it_must(records: Records, clock: Clock) -> None:
    first, second = (Tenure(records.leases, name, f"service {name}") for name in "ab")
    first.beat()
    killed_at = clock.now_s
    take_or_refuse(second, False, clock.sleep)
    assert second.epoch == 2
    assert TTL_S < clock.now_s - killed_at < TTL_S + 2


def test_the_second_service_of_a_folder_ends_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYDREAM_SERVE_DATA", str(tmp_path))
    monkeypatch.setenv("RAYDREAM_SERVE_PORT", "8458")
    records = Records(f"sqlite:///{tmp_path / 'records.sqlite3'}")
    first = Tenure(records.leases, "a", "the service at http://127.0.0.1:8000")
    first.beat()
    monkeypatch.setattr("serve.lease.time.sleep", lambda seconds: first.beat())
    monkeypatch.setattr(take_or_refuse, "__defaults__", (lambda seconds: first.beat(),))
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RAYDREAM_SERVE_DATA: the record belongs to the service at http://127.0.0.1:8000,")
    assert error.count("\n") == 1
    records.close()


# --- fencing --------------------------------------------------------------------------------------------------------


def test_whoever_lost_it_takes_nothing_up(records: Records, clock: Clock) -> None:
    """Even where it has not learned of its loss: it was asleep for a while, as a machine that was paused is."""
    first, second = (Tenure(records.leases, name, f"service {name}") for name in "ab")
    first.beat()
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    clock.now_s += TTL_S + 1
    second.beat()
    assert (first.epoch, second.epoch) == (1, 2)
    assert records.take_up(record, 1) is None
    assert records.get(record.id) == record
    assert records.take_up(record, 2) == 1


def test_a_service_that_was_taken_over_stops_its_runners(records: Records, clock: Clock) -> None:
    """And the next one goes on with what they were at, once."""
    tenures = [Tenure(records.leases, name, f"service {name}") for name in "ab"]
    pools = [FakeRunners() for _ in tenures]
    old, new = (
        Supervisor(records, runners, 1, lambda tenure=tenure: tenure.epoch, clock=clock)
        for tenure, runners in zip(tenures, pools)
    )
    tenures[0].beat()
    first = records.add("ada", REQUEST, None, ROOMY)[0]
    clock.now_s += 1
    waiting = records.add("ada", REQUEST, None, ROOMY)[0]
    ticks(old, pools[0])
    ticks(new, pools[1])
    assert (pools[0].started, pools[1].by_slot) == ([(first.id, 1)], {}), "the other one only waits"
    tenures[1].beat(by_force=True)
    tenures[0].beat()
    ticks(new, pools[1])
    ticks(old, pools[0])
    assert pools[1].started == [(first.id, 2)]
    assert pools[0].stopped == [0]
    assert not records.progress(first.id, 1, {"step": 3})
    assert not records.end(first.id, 1, "finished", {})
    clock.now_s += 31
    ticks(old, pools[0])
    assert pools[0].by_slot == {}, "what does not stop is killed"
    records.end(first.id, 2, "finished", {})
    pools[1].finish(0)
    ticks(new, pools[1])
    ticks(old, pools[0])
    assert pools[1].started == [(first.id, 2), (waiting.id, 1)]
    assert pools[0].started == [(first.id, 1)]


def test_two_services_on_one_record_steal_nothing(url: str) -> None:
    """Each with runners of its own; without the lease each took for an orphan what the other's runner was at."""
    first, ended, attempts = Records(url), [], []
    ids = [first.add("ada", REQUEST, None, ROOMY)[0].id for _ in range(4)]

    def serve(place: int) -> None:
        records, runners = Records(url), SharedRunners()
        tenure = Tenure(Leases(records._engine), f"service {place}", f"service {place}")
        supervisor = Supervisor(records, runners, 2, lambda: tenure.epoch)
        for _ in range(500):
            tenure.beat()
            supervisor.tick()
            for status in runners.statuses().values():
                if status.job is not None:
                    attempts.append(status.job)
                    if records.end(*status.job, "finished", {}):
                        ended.append(status.job[0])
                    runners.finish(status.job)
            if records.counts() == {"finished": len(ids)}:
                break
        records.close()

    at_once(serve, times=2)
    assert sorted(ended) == sorted(ids)
    assert {attempt for _, attempt in attempts} == {1}
    first.close()


def test_what_a_dismissed_runner_still_holds_is_started_nowhere_else(records: Records) -> None:
    records.leases.take("a", "a")
    runners = FakeRunners()
    supervisor = Supervisor(records, runners, 2, lambda: 1)
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    ticks(supervisor, runners)
    records.cancel(record.id)
    ticks(supervisor, runners)
    records.retry(record.id, ROOMY)
    runners.by_slot[1] = RunnerStatus(None, is_ready=True)
    ticks(supervisor, runners)
    assert (runners.stopped, runners.started) == ([0], [(record.id, 1)])
    runners.finish(0)
    ticks(supervisor, runners)
    assert runners.started == [(record.id, 1), (record.id, 2)]


def test_while_the_disk_is_full_nothing_is_started_and_nothing_fails(records: Records) -> None:
    records.leases.take("a", "a")
    runners, full = FakeRunners(), "waiting for room on the service's disk"
    supervisor = Supervisor(records, runners, 1, lambda: 1, pause=lambda: full)
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    ticks(supervisor, runners, 5)
    assert (runners.started, supervisor.paused, records.counts()) == ([], full, {"queued": 1})
    full = ""
    ticks(supervisor, runners)
    assert (runners.started, supervisor.paused) == ([(record.id, 1)], "")
