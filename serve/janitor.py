"""Who sees to it that what was deleted, and what has been kept for long enough, leaves the disk."""

import logging
import time
from collections.abc import Callable

from serve.files import GenerationFiles
from serve.records import Record, Records
from serve.settings import Settings

_log = logging.getLogger(__name__)
_DAY_S = 86_400.0
_GIB = 2**30
_RETRY_DAYS = 7  # for so long a generation that failed or was cancelled goes on from its checkpoint
_ROUND_EVERY_S = 300.0


class Janitor:
    """``sweep`` is called again and again; what somebody works at, or has yet to end, it leaves alone."""

    def __init__(
        self, records: Records, settings: Settings, files: GenerationFiles, clock: Callable[[], float] = time.time
    ) -> None:
        self._records, self._settings, self._files, self._clock = records, settings, files, clock
        self._sizes: dict[str, int] = {}
        self._without_checkpoints: set[str] = set()
        self._round_at = float("-inf")

    def sweep(self, busy: frozenset[str]) -> None:
        """Deletes what was deleted; every five minutes, what is to go by the operator's settings too."""
        if self._clock() - self._round_at >= _ROUND_EVERY_S:
            self._round_at = self._clock()
            self._records.forget_old()
            ended = [record for record in self._records.ended() if record.id not in busy]
            if not self._settings.keep_checkpoints:
                self._drop_checkpoints(ended)
            for record in self._expired(ended):
                _log.info("generation %s of %s is not kept any longer", record.id, record.owner)
                self._records.delete(record.id)
        for generation_id in self._records.deleting():
            if generation_id not in busy and self._tried(self._files.delete, generation_id):
                self._sizes.pop(generation_id, None)
                self._records.forget(generation_id)

    def _expired(self, ended: list[Record]) -> list[Record]:
        """What is too old, and from the oldest end on what is too much."""
        days, gib = self._settings.keep_days, self._settings.keep_gib
        oldest = self._clock() - days * _DAY_S
        expired = [record for record in ended if days and (record.ended_at or 0.0) < oldest]
        if gib:
            left = [record for record in ended if record not in expired]
            sizes = [self._size_bytes(record) for record in left]
            total = sum(sizes) + sum(self._files.size_bytes(record.id) for record in self._records.running())
            for record, size in zip(left, sizes):
                if total <= gib * _GIB:
                    break
                expired.append(record)
                total -= size
        return expired

    def _drop_checkpoints(self, ended: list[Record]) -> None:
        week_ago = self._clock() - _RETRY_DAYS * _DAY_S
        for record in ended:
            is_due = record.state == "finished" or (record.ended_at or 0.0) < week_ago
            if not is_due or record.id in self._without_checkpoints:
                continue
            if self._tried(self._files.delete_checkpoints, record.id):
                self._without_checkpoints.add(record.id)
                self._sizes.pop(record.id, None)

    def _size_bytes(self, record: Record) -> int:
        if record.id not in self._sizes:
            self._sizes[record.id] = self._files.size_bytes(record.id)
        return self._sizes[record.id]

    def _tried(self, delete: Callable[[str], None], generation_id: str) -> bool:
        try:
            delete(generation_id)
        except (OSError, ValueError) as error:  # somebody works in it, or the storage is away: the next round tries
            _log.warning("generation %s cannot be cleared away: %s", generation_id, error)
            return False
        return True
