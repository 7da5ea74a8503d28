"""The record: nothing is accepted twice, no state changes but by its owner of the moment, owners take turns."""

import dataclasses
import threading
from collections.abc import Iterator

import pytest
from service_cases import REQUEST, ROOMY, epoch_of

from serve.records import KeyUsedForOther, Quota, QuotaUsedUp, Record, Records


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(url: str, clock: Clock) -> Iterator[Records]:
    found = Records(url, clock)
    yield found
    found.close()


def add(records: Records, owner: str = "ada", key: str | None = None, quota: Quota = ROOMY) -> Record:
    return records.add(owner, REQUEST, key, quota)[0]


def started(records: Records, record: Record) -> int:
    attempt = records.take_up(record, epoch_of(records))
    assert attempt is not None
    return attempt


# --- accepting ------------------------------------------------------------------------------------------------------


def test_what_is_accepted_survives_the_process(url: str, records: Records) -> None:
    record = add(records)
    again = Records(url)
    assert again.get(record.id) == record
    assert (record.state, record.prompt, record.num_steps, record.attempt) == ("queued", "a chair", 6, 0)
    again.close()


def test_an_idempotency_key_means_one_generation(records: Records) -> None:
    first, is_new = records.add("ada", REQUEST, "k", ROOMY)
    same, is_new_again = records.add("ada", REQUEST, "k", ROOMY)
    assert (is_new, is_new_again, same.id) == (True, False, first.id)
    assert add(records, "bob", "k").id != first.id
    assert add(records, "ada", None).id != add(records, "ada", None).id


def test_an_idempotency_key_with_another_request_is_refused(records: Records) -> None:
    first = add(records, key="k")
    with pytest.raises(KeyUsedForOther, match=first.id):
        records.add("ada", dataclasses.replace(REQUEST, seed=1), "k", ROOMY)
    assert len(records.queue()) == 1


def test_many_at_once_with_one_key_are_one(records: Records) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(add(records, key="k").id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_many_at_once_keep_to_the_quota(records: Records) -> None:
    refused: list[QuotaUsedUp] = []

    def post() -> None:
        try:
            add(records, quota=Quota(100, 3, 100))
        except QuotaUsedUp as error:
            refused.append(error)

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(records.queue()), len(refused)) == (3, 5)


def test_quotas_are_told_apart(records: Records, clock: Clock) -> None:
    first = add(records)
    with pytest.raises(QuotaUsedUp, match="1 of yours have not ended yet"):
        add(records, quota=Quota(10, 1, 10))
    with pytest.raises(QuotaUsedUp, match="1 generations wait already"):
        add(records, "bob", quota=Quota(1, 1, 10))
    records.cancel(first.id)
    with pytest.raises(QuotaUsedUp, match="within 24 hours"):
        add(records, quota=Quota(10, 1, 1))
    clock.now_s += 86_400
    add(records, quota=Quota(10, 1, 1))


# --- states ---------------------------------------------------------------------------------------------------------


def test_only_one_takes_a_generation_up(records: Records) -> None:
    record = add(records)
    assert [records.take_up(record, epoch_of(records)), records.take_up(record, epoch_of(records))] == [1, None]
    running = records.get(record.id)
    assert running is not None
    assert (running.state, running.attempt) == ("running", 1)
    assert running.started_at is not None


def test_an_older_attempt_changes_nothing(records: Records) -> None:
    record = add(records)
    first = started(records, record)
    assert records.progress(record.id, first, {"step": 3, "losses": {"rgb": 0.5}})
    seen = records.get(record.id)
    assert seen is not None
    second = started(records, seen)
    before = records.get(record.id)
    assert not records.progress(record.id, first, {"step": 5})
    assert not records.end(record.id, first, "finished", {})
    assert records.get(record.id) == before
    assert before is not None
    assert (before.started_at, before.losses) == (seen.started_at, {"rgb": 0.5})
    assert records.end(record.id, second, "finished", {"meshes": [0]})


@pytest.mark.parametrize("state", ["finished", "failed", "cancelled"])
def test_what_has_ended_stays_as_it_is(records: Records, state: str) -> None:
    record = add(records)
    attempt = started(records, record)
    if state == "cancelled":
        assert records.cancel(record.id)
    else:
        assert records.end(record.id, attempt, state, {})
    ended = records.get(record.id)
    assert ended is not None
    assert ended.state == state
    assert ended.ended_at is not None
    assert not records.cancel(record.id)
    assert not records.progress(record.id, attempt, {"step": 1})
    assert not records.end(record.id, attempt, "failed", {})
    assert records.take_up(ended, epoch_of(records)) is None
    assert records.get(record.id) == ended


def test_attempts_that_come_no_further_are_counted(records: Records) -> None:
    """``step`` is where each attempt died; the first two came further than what was before them."""
    record, stalls = add(records), []
    for step in (3, 5, 4, 5, 6, 6):
        seen = records.get(record.id)
        assert seen is not None
        records.progress(record.id, started(records, seen), {"step": step})
        now = records.get(record.id)
        assert now is not None
        stalls.append(now.num_stalls)
    assert stalls == [0, 0, 0, 1, 2, 0]


# --- order ----------------------------------------------------------------------------------------------------------


def test_owners_take_turns(records: Records) -> None:
    ada = [add(records, "ada") for _ in range(3)]
    bob = [add(records, "bob") for _ in range(2)]
    expected = [ada[0], bob[0], ada[1], bob[1], ada[2]]
    assert [record.id for record in records.queue()] == [record.id for record in expected]


def test_whoever_has_something_running_waits_for_the_others(records: Records) -> None:
    ada = [add(records, "ada") for _ in range(3)]
    bob = add(records, "bob")
    started(records, ada[0])
    assert [record.id for record in records.queue()] == [bob.id, ada[1].id, ada[2].id]
    assert [record.id for record in records.running()] == [ada[0].id]
    assert records.counts() == {"queued": 3, "running": 1}


def test_pages_hold_everything_once_and_newest_first(records: Records) -> None:
    made = [add(records) for _ in range(5)]
    add(records, "bob")
    pages, before = [], None
    while page := records.newest("ada", 2, before):
        pages.append([record.id for record in page])
        before = (page[-1].created_at, page[-1].id)
    assert pages == [[made[4].id, made[3].id], [made[2].id, made[1].id], [made[0].id]]
