"""What a plan is made of, sorted on disk: a library may have a million assets, and the driver holds none of them."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from raydream.assets.libraries import AssetRecord
from raydream.views.schema import record_to_json


class PlanRows:
    """The records of a library in any order, each kept or left out for a reason; read back by uid."""

    def __init__(self, database: sqlite3.Connection) -> None:
        """Not for callers: use ``plan_rows``."""
        self._database = database
        database.execute("CREATE TABLE rows (uid TEXT, reason TEXT, record TEXT)")

    def add(self, record: AssetRecord, reason: str | None) -> None:
        """``reason`` says why it is left out, None keeps it."""
        line = record_to_json(record) if reason is None else None
        self._database.execute("INSERT INTO rows VALUES (?, ?, ?)", (record.uid, reason, line))

    def keep_first(self, number: int) -> None:
        """Leaves out what comes after the first so many by uid."""
        row = self._database.execute(
            "SELECT uid FROM rows WHERE reason IS NULL ORDER BY uid LIMIT 1 OFFSET ?", (number - 1,)
        ).fetchone()
        if row is not None:
            self._database.execute("UPDATE rows SET reason = 'max_objects', record = NULL WHERE uid > ?", row)

    def doubled(self) -> str | None:
        """A uid that stands twice in it, None where there is none."""
        row = self._database.execute("SELECT uid FROM rows GROUP BY uid HAVING count(*) > 1 LIMIT 1").fetchone()
        return None if row is None else row[0]

    def kept(self) -> Iterator[tuple[str, str]]:
        """uid and JSON of each record that is kept, by uid."""
        yield from self._database.execute("SELECT uid, record FROM rows WHERE reason IS NULL ORDER BY uid")

    def left_out(self) -> Iterator[tuple[str, str]]:
        """uid and reason of each record that is not, by uid."""
        yield from self._database.execute("SELECT uid, reason FROM rows WHERE reason IS NOT NULL ORDER BY uid")

    def reasons(self) -> Counter[str | None]:
        """How many are left out for which reason; None counts those that are kept."""
        return Counter(dict(self._database.execute("SELECT reason, count(*) FROM rows GROUP BY reason")))


@contextmanager
def plan_rows() -> Iterator[PlanRows]:
    """Rows in the temporary folder until the end of the block; OSError where it is full."""
    database = sqlite3.connect("")  # a file without a name, which goes with its connection
    try:
        yield PlanRows(database)
    except sqlite3.OperationalError as error:
        raise OSError(f"the list of assets does not fit into the temporary folder: {error}") from error
    finally:
        database.close()
