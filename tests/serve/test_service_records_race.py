"""Replicas and supervisors at once on one record: each with connections of its own, as processes have them."""

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runners import NUM_AT_ONCE, SharedRunners, at_once
from service_cases import REQUEST, epoch_of

from serve.records import Quota, QuotaUsedUp, Record, Records
from serve.supervisor import Supervisor


def in_replicas(url: str, deed: Callable[[int, Records], None], times: int = NUM_AT_ONCE) -> None:
    replicas = [Records(url) for _ in range(times)]
    at_once(lambda place: deed(place, replicas[place]), times)
    for records in replicas:
        records.close()


def test_all_start_at_once_on_an_empty_database(url: str) -> None:
    counts: list[dict[str, int]] = []

    def start(_place: int) -> None:
        records = Records(url)
        counts.append(records.counts())
        records.close()

    at_once(start)
    assert counts == [{}] * NUM_AT_ONCE


def test_start_waits_for_one_who_writes(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite3"
    writer = sqlite3.connect(path, check_same_thread=False)
    writer.execute("CREATE TABLE other (id)")
    writer.execute("BEGIN IMMEDIATE")
    threading.Timer(0.5, writer.commit).start()
    records = Records(f"sqlite:///{path}")
    assert records.counts() == {}
    records.close()
    writer.close()


@pytest.mark.parametrize("num_owners", [1, NUM_AT_ONCE])
def test_all_posts_keep_to_the_limit_of_the_queue(url: str, num_owners: int) -> None:
    accepted: list[Record] = []
    refused: list[QuotaUsedUp] = []

    def post(place: int, records: Records) -> None:
        try:
            accepted.append(records.add(f"owner {place % num_owners}", REQUEST, None, Quota(3, 100, 100))[0])
        except QuotaUsedUp as error:
            refused.append(error)

    in_replicas(url, post)
    assert (len(accepted), len(refused)) == (3, NUM_AT_ONCE - 3)


def test_a_key_that_comes_to_all_replicas_means_one_generation(url: str) -> None:
    found: list[tuple[Record, bool]] = []
    in_replicas(url, lambda _, records: found.append(records.add("ada", REQUEST, "k", Quota(100, 100, 100))))
    assert len({record.id for record, _ in found}) == 1
    assert [is_new for _, is_new in found].count(True) == 1


def test_what_all_would_take_up_one_does(url: str) -> None:
    first = Records(url)
    waiting = [first.add("ada", REQUEST, None, Quota(100, 100, 100))[0] for _ in range(5)]
    taken: list[str] = []

    def take_all(_place: int, records: Records) -> None:
        taken.extend(record.id for record in waiting if records.take_up(record, epoch_of(records)) == 1)

    in_replicas(url, take_all)
    assert sorted(taken) == sorted(record.id for record in waiting)
    assert {record.attempt for record in first.running()} == {1}
    first.close()


def test_two_supervisors_end_every_generation_once(url: str) -> None:
    """They act on the same runners with stale looks; whoever comes second finds the fence of the attempt."""
    first, runners, ended = Records(url), SharedRunners(), []
    ids = [first.add("ada", REQUEST, None, Quota(100, 100, 100))[0].id for _ in range(6)]

    def supervise(_place: int, records: Records) -> None:
        supervisor = Supervisor(records, runners, num_slots=2, epoch=lambda: epoch_of(records))
        for _ in range(500):
            supervisor.tick()
            for status in runners.statuses().values():
                if status.job is not None:
                    if records.end(*status.job, "finished", {}):
                        ended.append(status.job[0])
                    runners.finish(status.job)
            if records.counts() == {"finished": len(ids)}:
                return

    in_replicas(url, supervise, times=2)
    assert sorted(ended) == sorted(ids)
    first.close()
