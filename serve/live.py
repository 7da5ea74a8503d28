"""Generations as clients see them, read once for however many ask at the same time."""

import asyncio
import datetime
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from serve.records import Record, Records
from serve.schema import FINAL_STATES, Failure, Generation, Links, ParticleLinks, Progress

_MAX_AGE_S = 0.25
_LOOK_EVERY_S = 1.0
_HEARTBEAT_S = 15.0
_MAX_KEPT = 1000


def path_of(generation_id: str) -> str:
    """Where a generation is found."""
    return f"/v1/generations/{generation_id}"


def present(record: Record, queue_position: int | None) -> Generation:
    """A record for the wire; ``queue_position`` counts from 1."""
    path, has_ended = path_of(record.id), record.state in FINAL_STATES
    is_finished = record.state == "finished"
    particles = [
        ParticleLinks(
            index=index,
            preview=f"{path}/particles/{index}/preview.png" if record.preview_step is not None else None,
            turntable=f"{path}/particles/{index}/turntable.mp4" if is_finished else None,
            mesh=f"{path}/particles/{index}/mesh.glb" if index in record.meshes else None,
        )
        for index in range(record.n)
    ]
    error = Failure(title=record.error_title, detail=record.error_detail or "") if record.error_title else None
    archive = f"{path}/archive.zip" if has_ended and record.started_at else None
    links = {"self": path, "events": f"{path}/events", "metrics": f"{path}/metrics", "archive": archive}
    return Generation(
        id=record.id,
        prompt=record.prompt,
        n=record.n,
        preset=record.preset,
        method=record.method,  # type: ignore[arg-type]  # was a Method when it was accepted
        seed=record.seed,
        steps=record.steps,
        state=record.state,  # type: ignore[arg-type]
        queue_position=queue_position,
        created_at=_time(record.created_at) or "",
        started_at=_time(record.started_at),
        ended_at=_time(record.ended_at),
        progress=Progress(
            step=record.step,
            num_steps=record.num_steps,
            eta_s=record.eta_s,
            phase=record.phase,
            losses=record.losses,
        ),
        error=error,
        preview_step=record.preview_step,
        particles=particles,
        links=Links.model_validate(links | {"report": f"{path}/report.html" if is_finished else None}),
    )


@dataclass(frozen=True)
class Sight:
    """A generation at a moment, and its JSON text."""

    record: Record
    generation: Generation
    body: str


class Live:
    """Answers from memory what was read less than a quarter of a second ago; asks the record for the rest, once."""

    def __init__(self, records: Records, clock: Callable[[], float] = time.monotonic) -> None:
        self._records, self._clock = records, clock
        self._seen: dict[str, tuple[float, Sight | None]] = {}
        self._asked: dict[str, asyncio.Task[Sight | None]] = {}
        self._queue: tuple[float, dict[str, int]] = (float("-inf"), {})

    async def get(self, generation_id: str) -> Sight | None:
        """One generation, at most a quarter of a second old."""
        read_at, sight = self._seen.get(generation_id, (float("-inf"), None))
        if self._clock() - read_at < _MAX_AGE_S:
            return sight
        task = self._asked.get(generation_id)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self.read, generation_id))
            self._asked[generation_id] = task
            task.add_done_callback(lambda done: self._keep(generation_id, done))
        return await asyncio.shield(task)  # others wait for the same answer

    def read(self, generation_id: str) -> Sight | None:
        """One generation as it is now."""
        record = self._records.get(generation_id)
        return None if record is None else self.see(record)

    def see(self, record: Record) -> Sight:
        """How a record looks to clients."""
        generation = present(record, self._position(record))
        return Sight(record, generation, generation.model_dump_json())

    def forget(self, generation_id: str) -> None:
        """The next one who asks gets what is true now."""
        self._seen.pop(generation_id, None)

    async def events(self, generation_id: str, last_event: int) -> AsyncIterator[str]:
        """Server-sent events, one for each change, until the generation has ended."""
        number, told, told_at = last_event, "", self._clock()
        yield "retry: 2000\n\n"
        while (sight := await self.get(generation_id)) is not None:
            if sight.body != told:
                number, told, told_at = number + 1, sight.body, self._clock()
                yield f"id: {number}\nevent: generation\ndata: {told}\n\n"
            elif self._clock() - told_at > _HEARTBEAT_S:
                told_at = self._clock()
                yield ": still here\n\n"
            if sight.generation.state in FINAL_STATES:
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    def _keep(self, generation_id: str, done: "asyncio.Task[Sight | None]") -> None:
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
