"""Whose the record is: of all the services that share one, a single one starts generations at a time.

A row tells who it is, since when, and the last sign of life by the database's own clock. ``epoch`` is the fence: it
grows whenever the row changes hands, and what an older holder would still take up, it does not get.
"""

import datetime
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from serve.tables import LEASES

TTL_S = 15.0  # without a sign of life for so long, others may take it
BEAT_EVERY_S = 3.0
_POLL_S = 0.5
_ROW = "record"


@dataclass(frozen=True)
class Lease:
    """The row as it stands. ``holder`` is the owner in words; ``silent_s`` is how old its last sign of life is."""

    owner: str
    holder: str
    epoch: int
    since: float
    beat_at: float
    silent_s: float

    @property
    def is_free(self) -> bool:
        return not self.owner or self.silent_s > TTL_S

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(self.since, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"{self.holder}, since {since}, last sign of life {self.silent_s:.0f} s ago"


def fence(epoch: int) -> sa.ColumnElement[bool]:
    """A condition for changes of the record: the lease is still in this epoch."""
    return sa.exists().where(LEASES.c.name == _ROW, LEASES.c.epoch == epoch)


class Leases:
    """The row; every change of it is one statement that compares and sets."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] | None = None) -> None:
        """``clock`` in the place of the database's own."""
        self._engine, self._clock = engine, clock
        try:
            with engine.begin() as connection:
                if connection.execute(sa.select(LEASES.c.name)).first() is None:
                    row = {"name": _ROW, "owner": "", "holder": "", "epoch": 0, "since": 0.0, "beat_at": 0.0}
                    connection.execute(sa.insert(LEASES).values(row))
        except IntegrityError:  # another process was faster
            return

    def look(self) -> Lease:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(LEASES).where(LEASES.c.name == _ROW)).one()
            now = self._now(connection)
        return Lease(row.owner, row.holder, row.epoch, row.since, row.beat_at, now - row.beat_at)

    def take(self, owner: str, holder: str, by_force: bool = False) -> int | None:
        """A sign of life, or a new epoch where it was free (or ``by_force``): the epoch; None where it is another's."""
        seen = self.look()
        now, columns = seen.beat_at + seen.silent_s, LEASES.c
        is_unchanged = (columns.name == _ROW) & (columns.epoch == seen.epoch) & (columns.owner == seen.owner)
        if seen.owner == owner:
            change, epoch = sa.update(LEASES).where(is_unchanged).values(beat_at=now), seen.epoch
        elif seen.is_free or by_force:
            epoch = seen.epoch + 1
            values = {"owner": owner, "holder": holder, "epoch": epoch, "since": now, "beat_at": now}
            is_silent = sa.true() if by_force else columns.beat_at == seen.beat_at
            change = sa.update(LEASES).where(is_unchanged, is_silent).values(values)
        else:
            return None
        with self._engine.begin() as connection:
            is_changed = connection.execute(change).rowcount == 1
        if is_changed:
            return epoch
        now_seen = self.look()
        return now_seen.epoch if now_seen.owner == owner else None  # another process of the same service was faster

    def release(self, owner: str) -> None:
        """Lets it go, where it is still this owner's."""
        change = sa.update(LEASES).where(LEASES.c.name == _ROW, LEASES.c.owner == owner)
        with self._engine.begin() as connection:
            connection.execute(change.values(owner="", holder=""))

    def _now(self, connection: sa.Connection) -> float:
        if self._clock is not None:
            return self._clock()
        if connection.dialect.name == "sqlite":
            return float(connection.exec_driver_sql("SELECT (julianday('now') - 2440587.5) * 86400.0").scalar_one())
        return float(connection.execute(sa.select(sa.extract("epoch", sa.func.now()))).scalar_one())


class Tenure:
    """One service's hold of the lease, as far as it knows; ``beat`` renews it, or takes it where it has become free."""

    def __init__(self, leases: Leases, owner: str, holder: str) -> None:
        self.owner = owner
        self._leases, self._holder = leases, holder
        self.epoch: int | None = None  # where another has it

    def beat(self, by_force: bool = False) -> bool:
        """A sign of life; whether the lease is ours."""
        self.epoch = self._leases.take(self.owner, self._holder, by_force)
        return self.epoch is not None

    def look(self) -> Lease:
        return self._leases.look()

    def release(self) -> None:
        """Lets it go, so that another need not wait."""
        self.epoch = None
        self._leases.release(self.owner)


def holder_at(address: str) -> str:
    """This service in words that lead to it."""
    return f"the service at {address} (pid {os.getpid()} on {socket.gethostname()})"


def take_or_refuse(tenure: Tenure, by_force: bool, sleep: Callable[[float], object] = time.sleep) -> None:
    """Takes the lease: at once where nobody has it, after its time where its holder gives no sign of life any more.

    ``ValueError`` as soon as its holder gives one: two services would steal each generation from each other.
    """
    first = tenure.look()
    while not tenure.beat(by_force):
        now = tenure.look()
        if (now.epoch, now.beat_at) != (first.epoch, first.beat_at) and not now.is_free:
            raise ValueError(
                f"RAYDREAM_SERVE_DATA: the record belongs to {now}; end that service and this one can start "
                f"(at once; {TTL_S:.0f} s after a kill), take it over by `python -m serve --take-over`, or choose "
                "another folder"
            )
        sleep(_POLL_S)
