"""What clients see of a generation: read once for all of them, told as often as there is room for, the end at once."""

import asyncio
import json
from pathlib import Path

import pytest
from service_cases import REQUEST, ROOMY, epoch_of, records_of, small_settings

from serve.live import Live
from serve.records import Record, Records

LOOK_S = 0.5


class Day:
    """A clock that goes only while somebody sleeps; each time, the generation comes a step further, up to its end."""

    def __init__(self, records: Records, record: Record, last_step: int) -> None:
        self._records, self._id, self._last_step = records, record.id, last_step
        self._attempt, self._step, self.now_s = records.take_up(record, epoch_of(records)) or 0, 0, 0.0

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self._step += 1
        if self._step < self._last_step:
            assert self._records.progress(self._id, self._attempt, {"step": self._step})
        else:
            assert self._records.end(self._id, self._attempt, "finished", {"step": self._step})

    async def listen(self, live: Live) -> list[tuple[float, int]]:
        """When it is told of which steps."""
        told = []
        async for chunk in live.events(self._id, 0):
            if chunk.startswith(b"id: "):
                name, data = chunk.decode().split("\n")[1:3]
                assert name == "event: generation"
                told.append((self.now_s, json.loads(data.removeprefix("data: "))["progress"]["step"]))
        return told


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return records_of(small_settings(tmp_path))


@pytest.fixture
def record(records: Records) -> Record:
    return records.add("ada", REQUEST, None, ROOMY)[0]


@pytest.mark.parametrize(("num_streams", "pause_s"), [(1, 1.0), (50, 1.0), (100, 2.0), (10_000, 15.0)])
def test_changes_are_told_together_and_the_end_at_once(
    records: Records, record: Record, num_streams: int, pause_s: float
) -> None:
    looks = int(3 * pause_s / LOOK_S)
    day = Day(records, record, looks + 1)
    live = Live(records, day.clock, day.sleep)

    async def main() -> list[tuple[float, int]]:
        others = [live.events(record.id, 0) for _ in range(num_streams - 1)]
        for other in others:
            assert await anext(other) == b"retry: 2000\n\n"
        told = await day.listen(live)
        for other in others:
            await other.aclose()
        return told

    due = [look * LOOK_S for look in range(0, looks + 1, int(pause_s / LOOK_S))]
    assert asyncio.run(main()) == [(at_s, round(at_s / LOOK_S)) for at_s in [*due, due[-1] + LOOK_S]]


def test_streams_that_were_left_leave_room_for_the_others(records: Records, record: Record) -> None:
    day = Day(records, record, last_step=5)
    live = Live(records, day.clock, day.sleep)

    async def main() -> list[tuple[float, int]]:
        for _ in range(200):
            left = live.events(record.id, 0)
            await anext(left)
            await left.aclose()
        return await day.listen(live)

    assert [at_s for at_s, _ in asyncio.run(main())] == [0.0, 1.0, 2.0, 2.5]


def test_nothing_new_is_told_once_and_then_by_heartbeats(records: Records, record: Record) -> None:
    now_s, told = 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s > 40.0:
            records.cancel(record.id)

    async def main() -> None:
        async for chunk in Live(records, lambda: now_s, sleep).events(record.id, 7):
            told.append((now_s, chunk.partition(b"\n")[0]))

    asyncio.run(main())
    assert told == [
        (0.0, b"retry: 2000"),
        (0.0, b"id: 8"),
        (15.5, b": still here"),
        (31.0, b": still here"),
        (40.5, b"id: 9"),
    ]


def test_one_reading_is_for_all_who_ask(records: Records, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, read, get = 0.0, [], records.get

    def counted(generation_id: str) -> Record | None:
        read.append(generation_id)
        return get(generation_id)

    monkeypatch.setattr(records, "get", counted)
    live = Live(records, lambda: now_s)

    async def ask() -> set[int]:
        return {id(found) for found in await asyncio.gather(*(live.get(record.id) for _ in range(50)))}

    async def main() -> None:
        nonlocal now_s
        first = await ask()
        assert (len(first), len(read)) == (1, 1)
        assert await ask() == first
        assert len(read) == 1
        now_s = LOOK_S
        assert await ask() != first
        assert len(read) == 2

    asyncio.run(main())


def test_the_same_state_has_the_same_tag(records: Records, record: Record) -> None:
    live = Live(records)
    before, same = live.read(record.id), live.read(record.id)
    records.cancel(record.id)
    after = live.read(record.id)
    assert before is not None
    assert same is not None
    assert after is not None
    assert before.tag == same.tag != after.tag
    assert before.event == b"event: generation\ndata: " + before.body + b"\n\n"
