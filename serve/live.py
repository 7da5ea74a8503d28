"""Generations as clients see them, read and written out once for however many ask or listen."""

import asyncio
import datetime
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from serve.records import Record, Records
from serve.schema import FINAL_STATES, Generation, ParticleLinks

_MAX_AGE_S = 0.5  # a run tells its news no more often
_EVENT_EVERY_S = 1.0  # a stream's events, at most
_EVENTS_PER_S = 50.0  # those of all streams: the more listen, the less often each one hears of a change
_HEARTBEAT_S = 15.0
_MAX_KEPT = 1000


def path_of(generation_id: str) -> str:
    """Where a generation is found."""
    return f"/v1/generations/{generation_id}"


def present(record: Record, queue_position: int | None, paused: str) -> Generation:
    """A record for the wire; ``queue_position`` counts from 1, ``paused`` says why what waits is not started."""
    path, is_finished = path_of(record.id), record.state == "finished"
    has_archive = record.state in FINAL_STATES and record.started_at
    particles = [
        ParticleLinks(
            index=index,
            preview=f"{path}/particles/{index}/preview.png" if record.preview_step is not None else None,
            turntable=f"{path}/particles/{index}/turntable.mp4" if is_finished else None,
            mesh=f"{path}/particles/{index}/mesh.glb" if index in record.meshes else None,
        )
        for index in range(record.n)
    ]
    links = {
        "self": path,
        "events": f"{path}/events",
        "metrics": f"{path}/metrics",
        "archive": f"{path}/archive.zip" if has_archive else None,
        "report": f"{path}/report.html" if is_finished else None,
    }
    values = vars(record) | {
        "queue_position": queue_position,
        "progress": vars(record) | ({"phase": paused} if paused and record.state == "queued" else {}),
        "error": {"title": record.error_title, "detail": record.error_detail or ""} if record.error_title else None,
        "particles": particles,
        "links": links,
    }
    times = {name: _time(values[name]) for name in ("created_at", "started_at", "ended_at")}
    return Generation.model_validate(values | times)


@dataclass(frozen=True)
class Representation:
    """A generation at a moment: its JSON text, the tag by which clients know it again, and the event that tells it."""

    record: Record
    generation: Generation
    body: bytes
    tag: str
    event: bytes


class Live:
    """Answers from memory what was read less than half a second ago; asks the record for the rest, once."""

    def __init__(
        self,
        records: Records,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._records, self._clock, self._sleep = records, clock, sleep
        self._num_streams = 0
        self.paused = ""
        self._seen: dict[str, tuple[float, Representation | None]] = {}
        self._asked: dict[str, asyncio.Task[Representation | None]] = {}
        self._queue: tuple[float, dict[str, int]] = (float("-inf"), {})

    async def get(self, generation_id: str) -> Representation | None:
        """One generation, at most half a second old."""
        read_at, representation = self._seen.get(generation_id, (float("-inf"), None))
        if self._clock() - read_at < _MAX_AGE_S:
            return representation
        task = self._asked.get(generation_id)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self.read, generation_id))
            self._asked[generation_id] = task
            task.add_done_callback(lambda done: self._keep(generation_id, done))
        return await asyncio.shield(task)  # others wait for the same answer

    def read(self, generation_id: str) -> Representation | None:
        record = self._records.get(generation_id)
        return None if record is None else self.represent(record)

    def represent(self, record: Record) -> Representation:
        """How a record looks to clients."""
        generation = present(record, self._position(record), self.paused)
        body = generation.model_dump_json().encode()
        tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        return Representation(record, generation, body, tag, b"event: generation\ndata: %b\n\n" % body)

    def forget(self, generation_id: str) -> None:
        """The next one who asks gets what is true now."""
        self._seen.pop(generation_id, None)

    async def events(self, generation_id: str, last_event: int) -> AsyncGenerator[bytes, None]:
        """Server-sent events until the generation has ended: the end at once, other changes as often as there is room
        for this stream among all; each tells how things stand then.
        """
        number, sent, sent_at = last_event, b"", float("-inf")
        self._num_streams += 1
        try:
            yield b"retry: 2000\n\n"
            while (representation := await self.get(generation_id)) is not None:
                has_ended, silent_s = representation.generation.state in FINAL_STATES, self._clock() - sent_at
                pause_s = min(max(_EVENT_EVERY_S, self._num_streams / _EVENTS_PER_S), _HEARTBEAT_S)
                if representation.body != sent and (has_ended or silent_s >= pause_s):
                    number, sent, sent_at = number + 1, representation.body, self._clock()
                    yield b"id: %d\n%b" % (number, representation.event)
                elif silent_s > _HEARTBEAT_S:
                    sent_at = self._clock()
                    yield b": still here\n\n"
                if has_ended:
                    return
                await self._sleep(_MAX_AGE_S)
        finally:
            self._num_streams -= 1

    def _keep(self, generation_id: str, done: "asyncio.Task[Representation | None]") -> None:
        del self._asked[generation_id]
        if done.cancelled() or done.exception() is not None:
            return
        self._seen.pop(generation_id, None)
        self._seen[generation_id] = (self._clock(), done.result())
        while len(self._seen) > _MAX_KEPT:
            del self._seen[next(iter(self._seen))]

    def _position(self, record: Record) -> int | None:
        if record.state != "queued":
            return None
        read_at, positions = self._queue
        if self._clock() - read_at >= _MAX_AGE_S or record.id not in positions:
            positions = {waiting.id: place for place, waiting in enumerate(self._records.queue(), 1)}
            self._queue = (self._clock(), positions)
        return positions.get(record.id)


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
