"""Who sees to it that every accepted generation ends: starts what waits, and what lost its runner, again.

Plain classes; ``actors.py`` puts them onto Ray. All that must outlive the supervisor is in the record, so that another
one can go on at any moment: it finds the runners at their work by their names.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from serve.records import Record, Records

_log = logging.getLogger(__name__)
_MAX_STALLS = 5  # attempts in a row that came no further than those before
_STOP_PATIENCE_S = 30.0

Job = tuple[str, int]  # generation and attempt


@dataclass(frozen=True)
class SupervisorHealth:
    """How a supervisor is: for how long it has not come round, in words why it runs nothing at all (the record is
    another service's), and why what waits is not started (the disk is full); empty where all is well.
    """

    silent_s: float
    refused: str = ""
    paused: str = ""


@dataclass(frozen=True)
class RunnerStatus:
    """A runner that answers. ``is_ready``: it has nothing to do and has loaded what it keeps; ``is_outdated``: it was
    started with other settings; ``is_new``: its job has yet to ask for its places.
    """

    job: Job | None
    is_ready: bool
    is_outdated: bool = False
    is_new: bool = False


@runtime_checkable
class Runners(Protocol):
    """What the supervisor asks of the runners; each has a slot, counted from 0."""

    def statuses(self) -> dict[int, RunnerStatus]:
        """All runners that are alive."""

    def open(self, slot: int) -> None:
        """Starts a runner where there is none."""

    def has_room(self, slot: int, record: Record) -> bool:
        """Whether a generation's actors would find their places now, with what the runner holds already."""

    def start(self, slot: int, job: Job) -> bool:
        """Gives work to a runner; False where it did not take it."""

    def stop(self, slot: int) -> None:
        """Asks a runner to come to an end with its work."""

    def kill(self, slot: int) -> None:
        """Ends a runner and all that it holds."""


class Supervisor:
    """Compares what should run with what does, and does something about it; ``tick`` is called again and again."""

    def __init__(
        self,
        records: Records,
        runners: Runners,
        num_slots: int,
        epoch: Callable[[], int | None],
        pause: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``epoch`` of the lease, None while it is another's; ``pause`` says why nothing may be started now."""
        self._records, self._runners, self._num_slots, self._clock = records, runners, num_slots, clock
        self._epoch, self._pause = epoch, pause
        self._dismissed_at: dict[int, float] = {}
        self.paused = ""
        self.busy: frozenset[str] | None = None  # generations that runners work at; None before the first look

    def tick(self) -> None:
        """One look at everything."""
        statuses, epoch = self._runners.statuses(), self._epoch()
        self.busy = frozenset(status.job[0] for status in statuses.values() if status.job is not None)
        running = {record.id: record for record in self._records.running()} if epoch is not None else {}
        at_work = set()
        for slot, status in statuses.items():
            if status.job is None:
                self._dismissed_at.pop(slot, None)
                continue
            record = running.get(status.job[0])
            if record is None or record.attempt != status.job[1]:
                self._dismiss(slot)
            else:
                at_work.add(record.id)
        if epoch is None:  # what its runners were at is another service's now
            return
        statuses = self._renew(statuses)
        self.paused = self._pause()
        orphans = [record for record in running.values() if record.id not in at_work]
        for record in [] if self.paused else [*orphans, *self._records.queue()]:
            if record.id in self.busy:  # a runner that was dismissed has yet to let go of it
                continue
            if not self._assign(record, statuses, epoch):
                break

    def _renew(self, statuses: Mapping[int, RunnerStatus]) -> dict[int, RunnerStatus]:
        """Without runners of old settings that have nothing to do; with at least one, so that there is a warm one."""
        left = {}
        for slot, status in statuses.items():
            if status.is_outdated and status.job is None:
                self._runners.kill(slot)
            else:
                left[slot] = status
        if not left:
            self._open(left)
        return left

    def _assign(self, record: Record, statuses: dict[int, RunnerStatus], epoch: int) -> bool:
        """False where nothing more can be started now."""
        if record.num_stalls >= _MAX_STALLS:
            detail = f"{_MAX_STALLS} attempts ended without a word before they came beyond step {record.furthest_step}"
            values = {"phase": "failed", "error_title": "The run keeps dying", "error_detail": detail}
            self._records.end(record.id, record.attempt, "failed", values)
            return True
        slot = next((slot for slot, status in statuses.items() if status.job is None and status.is_ready), None)
        if slot is None:
            if all(status.job is not None for status in statuses.values()):
                self._open(statuses)
            return False
        if any(status.is_new or (status.job is None and not status.is_ready) for status in statuses.values()):
            return False  # nobody knows yet what room these leave
        if not self._runners.has_room(slot, record):
            self._release_others(slot, statuses)
            return False
        attempt = self._records.take_up(record, epoch)
        if attempt is not None and self._runners.start(slot, (record.id, attempt)):
            _log.info("generation %s, attempt %d, starts in slot %d", record.id, attempt, slot)
            statuses[slot] = RunnerStatus((record.id, attempt), is_ready=False, is_new=True)
        return True

    def _open(self, statuses: dict[int, RunnerStatus]) -> None:
        slot = next((slot for slot in range(self._num_slots) if slot not in statuses), None)
        if slot is not None:
            self._runners.open(slot)
            statuses[slot] = RunnerStatus(None, is_ready=False)

    def _release_others(self, slot: int, statuses: dict[int, RunnerStatus]) -> None:
        """What idle runners hold is needed elsewhere."""
        for other, status in list(statuses.items()):
            if other != slot and status.job is None and status.is_ready:
                self._runners.kill(other)
                del statuses[other]

    def _dismiss(self, slot: int) -> None:
        if slot not in self._dismissed_at:
            self._dismissed_at[slot] = self._clock()
            self._runners.stop(slot)
        elif self._clock() - self._dismissed_at[slot] > _STOP_PATIENCE_S:
            del self._dismissed_at[slot]
            self._runners.kill(slot)
