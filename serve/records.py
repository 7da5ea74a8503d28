"""The durable record of generations: SQLite by default, any database that SQLAlchemy reaches by URL.

A generation changes its state by compare-and-set only. ``attempt`` is the fence: it grows whenever a runner takes the
generation up, and what an older runner still writes changes nothing.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import OperationalError as RecordsAway  # the database does not answer

from serve.lease import Leases, fence
from serve.tables import GENERATIONS, METADATA, OWNERS, Record

__all__ = ["CheckedRequest", "KeyUsedForOther", "NotNow", "Quota", "QuotaUsedUp", "Record", "Records", "RecordsAway"]

ENDED = ("finished", "failed", "cancelled")
UNFINISHED = ("queued", "running")
# What was deleted stays a row for a day, lest deleting be a way around the daily quota; nobody sees it.
_DELETING, _DELETED = "deleting", "deleted"  # its files are still there; they are gone
_SEEN = (*UNFINISHED, *ENDED)
_DAY_S = 86_400.0
_BUSY_S = 30  # how long a writer waits for another
_EVERYBODY = ""  # no owner's name


@dataclass(frozen=True)
class CheckedRequest:
    """What a client asked for, checked."""

    prompt: str
    n: int
    preset: str
    method: str
    seed: int
    steps: int | None
    num_steps: int


@dataclass(frozen=True)
class Quota:
    """How many generations may wait in all, be unfinished for one owner, and be accepted of him within 24 hours."""

    max_queued: int
    unfinished: int
    daily: int


class QuotaUsedUp(Exception):
    """``retry_after_s``: when it may be worth another try."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotNow(Exception):
    """A generation's state does not allow it."""


class KeyUsedForOther(Exception):
    """An idempotency key came back with another request."""


class Records:
    """The table of generations. Any number of processes may use one database."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._engine = sa.create_engine(url, pool_pre_ping=True)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            _write_ahead(self._engine)
        for table in METADATA.sorted_tables:
            try:
                table.create(self._engine, checkfirst=True)
            except DBAPIError:  # another process was making it at the same moment
                table.create(self._engine, checkfirst=True)
        self._make_owner(_EVERYBODY)
        self.leases = Leases(self._engine, None if clock is time.time else clock)

    def close(self) -> None:
        self._engine.dispose()

    def add(
        self, owner: str, request: CheckedRequest, idempotency_key: str | None, quota: Quota
    ) -> tuple[Record, bool]:
        """The new generation and True, or the one that the key stands for already and False.

        Raises ``QuotaUsedUp`` or ``KeyUsedForOther``.
        """
        fingerprint = hashlib.sha256(json.dumps(vars(request), sort_keys=True).encode()).hexdigest()
        self._make_owner(owner)
        with self._engine.begin() as connection:
            self._queue_up(connection)
            known = self._by_idempotency_key(connection, owner, idempotency_key)
            if known is not None:
                if known.request_digest != fingerprint:
                    raise KeyUsedForOther(f"it stands for generation {known.id}, which was asked for differently")
                return known, False
            self._check_quota(connection, owner, quota)
            row: dict[str, Any] = {
                "id": uuid.uuid4().hex,
                "owner": owner,
                "idempotency_key": idempotency_key,
                "request_digest": fingerprint,
                "state": "queued",
                "phase": "waiting",
                "losses": {},
                "meshes": [],
                "created_at": self._clock(),
            } | dict.fromkeys(("attempt", "num_stalls", "furthest_step", "step"), 0)
            row |= vars(request)
            connection.execute(sa.insert(GENERATIONS).values(row))
            found = connection.execute(sa.select(GENERATIONS).where(GENERATIONS.c.id == row["id"])).one()
        return _record(found), True

    def get(self, generation_id: str) -> Record | None:
        found = self._all(_seen().where(GENERATIONS.c.id == generation_id))
        return found[0] if found else None

    def newest(self, owner: str, limit: int, before: tuple[float, str] | None = None) -> list[Record]:
        """An owner's generations, newest first, from after the one that was created at ``before`` (time, id)."""
        columns = GENERATIONS.c
        query = _seen().where(columns.owner == owner)
        if before is not None:
            created_at, last_id = before
            is_twin = (columns.created_at == created_at) & (columns.id < last_id)
            query = query.where((columns.created_at < created_at) | is_twin)
        return self._all(query.order_by(columns.created_at.desc(), columns.id.desc()).limit(limit))

    def running(self) -> list[Record]:
        """What should have a runner, the oldest first."""
        query = sa.select(GENERATIONS).where(GENERATIONS.c.state == "running")
        return self._all(query.order_by(GENERATIONS.c.started_at))

    def queue(self) -> list[Record]:
        """What waits, in the order in which it will be started: owners take turns, whoever has less running first."""
        mine = GENERATIONS.alias("mine")
        is_mine = (mine.c.owner == GENERATIONS.c.owner, mine.c.state == "running")
        num_running = sa.select(sa.func.count()).where(*is_mine).scalar_subquery()
        age = (GENERATIONS.c.created_at, GENERATIONS.c.id)
        turn = sa.func.row_number().over(partition_by=GENERATIONS.c.owner, order_by=age) + num_running
        return self._all(sa.select(GENERATIONS).where(GENERATIONS.c.state == "queued").order_by(turn, *age))

    def counts(self) -> dict[str, int]:
        columns = GENERATIONS.c
        query = sa.select(columns.state, sa.func.count()).where(columns.state.in_(_SEEN)).group_by(columns.state)
        with self._engine.connect() as connection:
            return {state: count for state, count in connection.execute(query)}

    def ended(self) -> list[Record]:
        """What has ended, the oldest end first."""
        return self._all(_seen().where(GENERATIONS.c.state.in_(ENDED)).order_by(GENERATIONS.c.ended_at))

    def take_up(self, seen: Record, epoch: int) -> int | None:
        """Makes a queued or orphaned generation a runner's: its new attempt, or None where somebody was faster, or
        where the lease is in another epoch by now.
        """
        stalls = seen.num_stalls + 1 if seen.attempt > 0 and seen.step <= seen.furthest_step else 0
        values = {
            "state": "running",
            "attempt": seen.attempt + 1,
            "num_stalls": stalls,
            "furthest_step": max(seen.furthest_step, seen.step),
            "started_at": seen.started_at or self._clock(),
        }
        is_mine = self._set(seen.id, values, GENERATIONS.c.attempt == seen.attempt, fence(epoch), states=UNFINISHED)
        return seen.attempt + 1 if is_mine else None

    def progress(self, generation_id: str, attempt: int, values: Mapping[str, Any]) -> bool:
        """A runner's news; False where the generation is no longer this attempt's."""
        return self._set(generation_id, values, GENERATIONS.c.attempt == attempt, states=("running",))

    def end(self, generation_id: str, attempt: int, state: str, values: Mapping[str, Any]) -> bool:
        """A runner's last word; False where the generation is no longer this attempt's."""
        final = {**values, "state": state, "ended_at": self._clock(), "eta_s": None}
        return self._set(generation_id, final, GENERATIONS.c.attempt == attempt, states=("running",))

    def cancel(self, generation_id: str) -> bool:
        """Cancels what has not ended; its runner learns of it by its next news. False where there is nothing to do."""
        values = {"state": "cancelled", "ended_at": self._clock(), "phase": "cancelled", "eta_s": None}
        return self._set(generation_id, values, states=UNFINISHED)

    def put_back(self, generation_id: str, attempt: int, phase: str) -> bool:
        """Has a runner's generation wait again, for a reason that is not its own: it counts as no stall."""
        values = {"state": "queued", "phase": phase, "eta_s": None, "num_stalls": GENERATIONS.c.num_stalls - 1}
        return self._set(generation_id, values, GENERATIONS.c.attempt == attempt, states=("running",))

    def retry(self, generation_id: str, quota: Quota) -> None:
        """Has a generation that failed or was cancelled wait again; its attempts go on being counted, so that what an
        older runner still writes changes nothing. Raises ``NotNow`` or ``QuotaUsedUp``.
        """
        with self._engine.begin() as connection:
            self._queue_up(connection)
            row = connection.execute(_seen().where(GENERATIONS.c.id == generation_id)).first()
            if row is None or row.state not in ("failed", "cancelled"):
                state = "is not there" if row is None else f"is {row.state}"
                raise NotNow(f"it {state}; what failed or was cancelled can be tried again")
            self._check_quota(connection, row.owner, quota, is_new=False)
            values: dict[str, Any] = {"state": "queued", "phase": "waiting", "num_stalls": 0, "furthest_step": 0}
            values |= dict.fromkeys(("error_title", "error_detail", "ended_at"))
            change = sa.update(GENERATIONS).where(GENERATIONS.c.id == generation_id, GENERATIONS.c.state == row.state)
            if connection.execute(change.values(values)).rowcount != 1:
                raise NotNow("it was deleted just now")

    def delete(self, generation_id: str) -> bool:
        """Lets nobody see any more what has ended; its files go next. False where it has not ended."""
        values = {"state": _DELETING, "prompt": "", "idempotency_key": None}
        return self._set(generation_id, values, states=ENDED)

    def deleting(self) -> list[str]:
        """What was deleted and may still have files."""
        with self._engine.connect() as connection:
            return list(connection.scalars(sa.select(GENERATIONS.c.id).where(GENERATIONS.c.state == _DELETING)))

    def forget(self, generation_id: str) -> None:
        """Its files are gone."""
        self._set(generation_id, {"state": _DELETED}, states=(_DELETING,))

    def forget_old(self) -> None:
        """The last trace of what was deleted goes."""
        columns = GENERATIONS.c
        old = sa.delete(GENERATIONS).where(columns.state == _DELETED, columns.created_at <= self._clock() - _DAY_S)
        with self._engine.begin() as connection:
            connection.execute(old)

    def _set(
        self, generation_id: str, values: Mapping[str, Any], *conditions: sa.ColumnElement[bool], states: Sequence[str]
    ) -> bool:
        columns = GENERATIONS.c
        change = sa.update(GENERATIONS).where(columns.id == generation_id, columns.state.in_(states), *conditions)
        with self._engine.begin() as connection:
            return connection.execute(change.values(dict(values))).rowcount == 1

    def _all(self, query: sa.Select[Any]) -> list[Record]:
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query)]

    def _queue_up(self, connection: sa.Connection) -> None:
        """First of all a write to one row: posts come one after the other on every kind of database."""
        touch = sa.update(OWNERS).where(OWNERS.c.name == _EVERYBODY).values(num_posts=OWNERS.c.num_posts + 1)
        connection.execute(touch)

    def _make_owner(self, owner: str) -> None:
        with self._engine.connect() as connection:
            known = connection.execute(sa.select(OWNERS).where(OWNERS.c.name == owner)).first()
        if known is None:
            try:
                with self._engine.begin() as connection:
                    connection.execute(sa.insert(OWNERS).values(name=owner))
            except IntegrityError:  # another process was faster
                return

    def _by_idempotency_key(self, connection: sa.Connection, owner: str, key: str | None) -> Record | None:
        if key is None:
            return None
        query = sa.select(GENERATIONS).where(GENERATIONS.c.owner == owner, GENERATIONS.c.idempotency_key == key)
        row = connection.execute(query).first()
        return None if row is None else _record(row)

    def _check_quota(self, connection: sa.Connection, owner: str, quota: Quota, is_new: bool = True) -> None:
        columns = GENERATIONS.c

        def count(*conditions: sa.ColumnElement[bool]) -> int:
            query = sa.select(sa.func.count()).select_from(GENERATIONS).where(*conditions)
            return connection.execute(query).scalar_one()

        if count(columns.state == "queued") >= quota.max_queued:
            raise QuotaUsedUp(f"{quota.max_queued} generations wait already, which is all that may", 60)
        if count(columns.owner == owner, columns.state.in_(UNFINISHED)) >= quota.unfinished:
            raise QuotaUsedUp(
                f"{quota.unfinished} of yours have not ended yet, which is all that may be so at once", 60
            )
        if is_new and count(columns.owner == owner, columns.created_at > self._clock() - _DAY_S) >= quota.daily:
            raise QuotaUsedUp(f"{quota.daily} of yours were accepted within 24 hours, which is all that may be", 3600)


def _seen() -> sa.Select[Any]:
    return sa.select(GENERATIONS).where(GENERATIONS.c.state.in_(_SEEN))


def _record(row: sa.Row[Any]) -> Record:
    return Record(**row._mapping)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    """Writers wait for each other. What is accepted is on the disk."""
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={_BUSY_S * 1000}", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _write_ahead(engine: sa.Engine) -> None:
    """Readers of the database, from now on, go on while one process writes.

    The one change for which SQLite does not wait by itself where others do the same.
    """
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            return
        except RecordsAway as error:
            if getattr(error.orig, "sqlite_errorname", "") != "SQLITE_BUSY" or time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
