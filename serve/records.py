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

__all__ = ["KeyUsedForOther", "Quota", "QuotaUsedUp", "Record", "Records", "RecordsAway", "Wish"]

_METADATA = sa.MetaData()
_OWNERS = sa.Table(
    "owners",
    _METADATA,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("num_posts", sa.Integer, nullable=False, default=0),
)
_GENERATIONS = sa.Table(
    "generations",
    _METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(100), sa.ForeignKey("owners.name"), nullable=False),
    sa.Column("idempotency_key", sa.String(200)),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("preset", sa.String(64), nullable=False),
    sa.Column("method", sa.String(16), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("steps", sa.Integer),
    sa.Column("num_steps", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("num_stalls", sa.Integer, nullable=False, default=0),
    sa.Column("furthest_step", sa.Integer, nullable=False, default=0),
    sa.Column("step", sa.Integer, nullable=False, default=0),
    sa.Column("phase", sa.Text, nullable=False, default=""),
    sa.Column("eta_s", sa.Float),
    sa.Column("losses", sa.JSON, nullable=False),
    sa.Column("preview_step", sa.Integer),
    sa.Column("meshes", sa.JSON, nullable=False),
    sa.Column("error_title", sa.Text),
    sa.Column("error_detail", sa.Text),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.UniqueConstraint("owner", "idempotency_key"),
    sa.Index("by_owner", "owner", "created_at", "id"),
    sa.Index("by_state", "state"),
)
_DAY_S = 86_400.0
_BUSY_S = 30  # how long a writer waits for another
_EVERYBODY = ""  # no owner's name


@dataclass(frozen=True)
class Record:
    """One generation as it stands. Times are seconds since 1970; ``meshes`` are the particles that have one."""

    id: str
    owner: str
    idempotency_key: str | None
    request_digest: str
    prompt: str
    n: int
    preset: str
    method: str
    seed: int
    steps: int | None
    num_steps: int
    state: str
    attempt: int
    num_stalls: int
    furthest_step: int
    step: int
    phase: str
    eta_s: float | None
    losses: dict[str, float]
    preview_step: int | None
    meshes: list[int]
    error_title: str | None
    error_detail: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True)
class Wish:
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
        for table in _METADATA.sorted_tables:
            try:
                table.create(self._engine, checkfirst=True)
            except DBAPIError:  # another process was making it at the same moment
                table.create(self._engine, checkfirst=True)
        self._make_owner(_EVERYBODY)

    def close(self) -> None:
        """Gives all connections back."""
        self._engine.dispose()

    def add(self, owner: str, wish: Wish, idempotency_key: str | None, quota: Quota) -> tuple[Record, bool]:
        """The new generation and True, or the one that the key stands for already and False.

        Raises ``QuotaUsedUp`` or ``KeyUsedForOther``.
        """
        fingerprint = hashlib.sha256(json.dumps(vars(wish), sort_keys=True).encode()).hexdigest()
        self._make_owner(owner)
        with self._engine.begin() as connection:
            # first of all a write to one row: posts come one after the other on every kind of database
            touch = sa.update(_OWNERS).where(_OWNERS.c.name == _EVERYBODY).values(num_posts=_OWNERS.c.num_posts + 1)
            connection.execute(touch)
            known = self._by_idempotency_key(connection, owner, idempotency_key)
            if known is not None:
                if known.request_digest != fingerprint:
                    raise KeyUsedForOther(f"it stands for generation {known.id}, which was asked for differently")
                return known, False
            self._check_quota(connection, owner, quota)
            row = {
                "id": uuid.uuid4().hex,
                "owner": owner,
                "idempotency_key": idempotency_key,
                "request_digest": fingerprint,
                "state": "queued",
                "phase": "waiting",
                "losses": {},
                "meshes": [],
                "created_at": self._clock(),
            } | vars(wish)
            connection.execute(sa.insert(_GENERATIONS).values(row))
            found = connection.execute(sa.select(_GENERATIONS).where(_GENERATIONS.c.id == row["id"])).one()
        return _record(found), True

    def get(self, generation_id: str) -> Record | None:
        """One generation, if there is one."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(_GENERATIONS).where(_GENERATIONS.c.id == generation_id)).first()
        return None if row is None else _record(row)

    def newest(self, owner: str, limit: int, before: tuple[float, str] | None = None) -> list[Record]:
        """An owner's generations, newest first, from after the one that was created at ``before`` (time, id)."""
        columns = _GENERATIONS.c
        query = sa.select(_GENERATIONS).where(columns.owner == owner)
        if before is not None:
            created_at, last_id = before
            query = query.where(
                (columns.created_at < created_at) | ((columns.created_at == created_at) & (columns.id < last_id))
            )
        return self._all(query.order_by(columns.created_at.desc(), columns.id.desc()).limit(limit))

    def running(self) -> list[Record]:
        """What should have a runner, the oldest first."""
        return self._all(
            sa.select(_GENERATIONS).where(_GENERATIONS.c.state == "running").order_by(_GENERATIONS.c.started_at)
        )

    def queue(self) -> list[Record]:
        """What waits, in the order in which it will be started: owners take turns, whoever has less running first."""
        mine = _GENERATIONS.alias("mine")
        num_running = (
            sa.select(sa.func.count())
            .where(mine.c.owner == _GENERATIONS.c.owner, mine.c.state == "running")
            .scalar_subquery()
        )
        age = (_GENERATIONS.c.created_at, _GENERATIONS.c.id)
        turn = sa.func.row_number().over(partition_by=_GENERATIONS.c.owner, order_by=age) + num_running
        return self._all(sa.select(_GENERATIONS).where(_GENERATIONS.c.state == "queued").order_by(turn, *age))

    def counts(self) -> dict[str, int]:
        """How many generations are in each state."""
        query = sa.select(_GENERATIONS.c.state, sa.func.count()).group_by(_GENERATIONS.c.state)
        with self._engine.connect() as connection:
            return {state: count for state, count in connection.execute(query)}

    def take_up(self, seen: Record) -> int | None:
        """Makes a queued or orphaned generation a runner's: its new attempt, or None where somebody was faster."""
        stalls = seen.num_stalls + 1 if seen.attempt > 0 and seen.step <= seen.furthest_step else 0
        values = {
            "state": "running",
            "attempt": seen.attempt + 1,
            "num_stalls": stalls,
            "furthest_step": max(seen.furthest_step, seen.step),
            "started_at": seen.started_at or self._clock(),
        }
        is_mine = self._set(seen.id, values, _GENERATIONS.c.attempt == seen.attempt, states=("queued", "running"))
        return seen.attempt + 1 if is_mine else None

    def progress(self, generation_id: str, attempt: int, values: Mapping[str, Any]) -> bool:
        """A runner's news; False where the generation is no longer this attempt's."""
        return self._set(generation_id, values, _GENERATIONS.c.attempt == attempt, states=("running",))

    def end(self, generation_id: str, attempt: int, state: str, values: Mapping[str, Any]) -> bool:
        """A runner's last word; False where the generation is no longer this attempt's."""
        final = {**values, "state": state, "ended_at": self._clock(), "eta_s": None}
        return self._set(generation_id, final, _GENERATIONS.c.attempt == attempt, states=("running",))

    def cancel(self, generation_id: str) -> bool:
        """Cancels what has not ended; its runner learns of it by its next news. False where there is nothing to do."""
        values = {"state": "cancelled", "ended_at": self._clock(), "phase": "cancelled", "eta_s": None}
        return self._set(generation_id, values, states=("queued", "running"))

    def _set(
        self, generation_id: str, values: Mapping[str, Any], *conditions: sa.ColumnElement[bool], states: Sequence[str]
    ) -> bool:
        columns = _GENERATIONS.c
        change = sa.update(_GENERATIONS).where(columns.id == generation_id, columns.state.in_(states), *conditions)
        with self._engine.begin() as connection:
            return connection.execute(change.values(dict(values))).rowcount == 1

    def _all(self, query: sa.Select[Any]) -> list[Record]:
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query)]

    def _make_owner(self, owner: str) -> None:
        with self._engine.connect() as connection:
            known = connection.execute(sa.select(_OWNERS).where(_OWNERS.c.name == owner)).first()
        if known is None:
            try:
                with self._engine.begin() as connection:
                    connection.execute(sa.insert(_OWNERS).values(name=owner))
            except IntegrityError:  # another process was faster
                return

    def _by_idempotency_key(self, connection: sa.Connection, owner: str, key: str | None) -> Record | None:
        if key is None:
            return None
        query = sa.select(_GENERATIONS).where(_GENERATIONS.c.owner == owner, _GENERATIONS.c.idempotency_key == key)
        row = connection.execute(query).first()
        return None if row is None else _record(row)

    def _check_quota(self, connection: sa.Connection, owner: str, quota: Quota) -> None:
        columns = _GENERATIONS.c

        def count(*conditions: sa.ColumnElement[bool]) -> int:
            return connection.execute(
                sa.select(sa.func.count()).select_from(_GENERATIONS).where(*conditions)
            ).scalar_one()

        if count(columns.state == "queued") >= quota.max_queued:
            raise QuotaUsedUp(f"{quota.max_queued} generations wait already, which is all that may", 60)
        if count(columns.owner == owner, columns.state.in_(("queued", "running"))) >= quota.unfinished:
            raise QuotaUsedUp(
                f"{quota.unfinished} of yours have not ended yet, which is all that may be so at once", 60
            )
        if count(columns.owner == owner, columns.created_at > self._clock() - _DAY_S) >= quota.daily:
            raise QuotaUsedUp(f"{quota.daily} of yours were accepted within 24 hours, which is all that may be", 3600)


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
