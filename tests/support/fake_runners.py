"""Runners made of words, for supervisors in tests, and many callers at one moment."""

import threading
from collections.abc import Callable

from serve.records import Record
from serve.supervisor import Job, RunnerStatus, Supervisor

NUM_AT_ONCE = 8


class FakeRunners:
    """Runners that work for ever; ``room`` is for how many particles there is room beside what runs."""

    def __init__(self) -> None:
        self.by_slot: dict[int, RunnerStatus] = {}
        self.stopped: list[int] = []
        self.started: list[Job] = []
        self.room = 100
        self.refuses = False

    def statuses(self) -> dict[int, RunnerStatus]:
        return dict(self.by_slot)

    def open(self, slot: int) -> None:
        assert slot not in self.by_slot
        self.by_slot[slot] = RunnerStatus(None, is_ready=False)

    def has_room(self, slot: int, record: Record) -> bool:
        return record.n <= self.room

    def start(self, slot: int, job: Job) -> bool:
        assert self.by_slot[slot] == RunnerStatus(None, is_ready=True)
        if self.refuses:
            del self.by_slot[slot]
            return False
        self.by_slot[slot] = RunnerStatus(job, is_ready=False)
        self.started.append(job)
        return True

    def stop(self, slot: int) -> None:
        self.stopped.append(slot)

    def kill(self, slot: int) -> None:
        del self.by_slot[slot]

    def warm_up(self) -> None:
        for slot, status in self.by_slot.items():
            if status.job is None:
                self.by_slot[slot] = RunnerStatus(None, is_ready=True)

    def finish(self, slot: int) -> None:
        self.by_slot[slot] = RunnerStatus(None, is_ready=True)


def ticks(supervisor: Supervisor, runners: FakeRunners, times: int = 3) -> None:
    for _ in range(times):
        supervisor.tick()
        runners.warm_up()


class SharedRunners:
    """Runners that two supervisors command; each works on what it took until ``finish``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[int, Job | None] = {}

    def statuses(self) -> dict[int, RunnerStatus]:
        with self._lock:
            return {slot: RunnerStatus(job, job is None) for slot, job in self._jobs.items()}

    def open(self, slot: int) -> None:
        with self._lock:
            self._jobs.setdefault(slot, None)

    def has_room(self, slot: int, record: Record) -> bool:
        return True

    def start(self, slot: int, job: Job) -> bool:
        with self._lock:
            if self._jobs.get(slot, job) is not None:
                return False
            self._jobs[slot] = job
            return True

    def stop(self, slot: int) -> None:
        with self._lock:
            self._jobs[slot] = None

    def kill(self, slot: int) -> None:
        with self._lock:
            self._jobs.pop(slot, None)

    def finish(self, job: Job) -> None:
        with self._lock:
            self._jobs = {slot: None if at == job else at for slot, at in self._jobs.items()}


def at_once(deed: Callable[[int], None], times: int = NUM_AT_ONCE) -> None:
    """Does it that many times at the same moment; raises what any of them raised."""
    barrier, errors = threading.Barrier(times), []

    def run(place: int) -> None:
        barrier.wait()
        try:
            deed(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
