"""A database that does not answer for a while, and what only other databases than SQLite mind."""

import base64
from typing import Any

import pytest
import sqlalchemy
from service_cases import REQUEST, ROOMY, URL, assert_problem, client_of, epoch_of, post, records_of

from raydream.cluster.runtime import LocalRuntime
from serve.generation import GenerationRun
from serve.records import RecordsAway
from serve.settings import Settings


def test_whoever_asks_a_database_that_is_not_there_knows_it() -> None:
    url = sqlalchemy.URL.create("sqlite", database="/dev/null/records.sqlite3")
    with pytest.raises(RecordsAway):
        sqlalchemy.create_engine(url).connect()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["progress", "end"])
def test_a_record_that_is_away_for_a_while_fails_no_generation(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """News that are lost are lost; an end that cannot be told leaves the generation to the next attempt."""
    records, num_lost = records_of(settings), 3
    tell = getattr(records, method)

    def told(*args: Any) -> bool:
        nonlocal num_lost
        if num_lost > 0:
            num_lost -= 1
            raise RecordsAway("UPDATE", {}, ConnectionError("the server closed the connection"))
        return tell(*args)

    monkeypatch.setattr(records, method, told)
    record = records.add("ada", REQUEST, None, ROOMY)[0]
    attempts = 0
    while (now := records.get(record.id)) is not None and now.ended_at is None:
        assert now.error_title is None
        attempt = records.take_up(now, epoch_of(records))
        assert attempt is not None
        GenerationRun(records, settings, record.id, attempt).run(lambda *_: LocalRuntime())
        attempts += 1
    assert now is not None
    assert (now.state, num_lost, attempts) == ("finished", 0, 1 if method == "progress" else 4)
    records.close()


def test_a_cursor_holds_nothing_that_a_database_might_mind(settings: Settings) -> None:
    with client_of(settings) as client:
        post(client)
        for forged in ("1.0 \0", "1.0 ' OR 1=1 --", "1.0"):
            cursor = base64.urlsafe_b64encode(forged.encode()).decode()
            assert_problem(client.get(URL, params={"cursor": cursor}), 422, "cursor")
