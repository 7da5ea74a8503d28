"""Many clients beside a generation: how long a status takes, and how much slower the generation becomes.

PYTHONPATH=. python tests/service_load.py     a service of its own, 200 polling clients, 100 event streams
PYTHONPATH=. python tests/service_load.py --clients 50 --every 1
"""

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from service_kills import look, running_service

from raydream.store import RunFolder

REQUEST = {"prompt": "a chair", "n": 2}


@dataclass
class Seen:
    """What the clients saw: seconds of each status, number of events, and errors in words."""

    status_s: list[float] = field(default_factory=list)
    num_events: int = 0
    errors: list[str] = field(default_factory=list)


async def poll(client: httpx.AsyncClient, path: str, every_s: float, offset_s: float, seen: Seen) -> None:
    """Asks for the status until the generation has ended."""
    await asyncio.sleep(offset_s)
    has_ended = False
    while not has_ended:
        started = time.perf_counter()
        try:
            response = (await client.get(path)).raise_for_status()
            seen.status_s.append(time.perf_counter() - started)
            has_ended = response.json()["ended_at"] is not None
        except httpx.HTTPError as error:
            seen.errors.append(repr(error))
        await asyncio.sleep(every_s)


async def listen(client: httpx.AsyncClient, path: str, seen: Seen) -> None:
    """Takes events until the last."""
    try:
        async with client.stream("GET", f"{path}/events") as stream:
            async for line in stream.aiter_lines():
                seen.num_events += line.startswith("data: ")
    except httpx.HTTPError as error:
        seen.errors.append(repr(error))


async def crowd(base_url: str, path: str, args: argparse.Namespace) -> Seen:
    """All clients at once, until the generation has ended."""
    seen, limits = Seen(), httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=base_url, timeout=300, limits=limits) as client:
        offsets = np.linspace(0, args.every, args.clients, endpoint=False)
        await asyncio.gather(
            *(poll(client, path, args.every, float(offset), seen) for offset in offsets),
            *(listen(client, path, seen) for _ in range(args.streams)),
        )
    return seen


def step_s(data: Path, generation_id: str) -> float:
    """Median seconds of a step."""
    rows = RunFolder.open(str(data / "runs" / generation_id)).read_metrics()
    return float(np.median([float(row["time/step_s"] or 0) for row in rows[10:]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two polls of a client")
    parser.add_argument("--steps", type=int, default=400, help="of each of the three generations")
    args = parser.parse_args()
    data = Path(tempfile.mkdtemp(prefix="rd-load-"))
    with running_service(data, "WARM_PARTICLES=2") as (client, _):
        times, seen = {}, Seen()
        for name in ("alone", "in the crowd", "alone again"):
            path = (
                client.post("/v1/generations", json=REQUEST | {"steps": args.steps})
                .raise_for_status()
                .headers["location"]
            )
            if name == "in the crowd":
                seen = asyncio.run(crowd(str(client.base_url), path, args))
            while look(client, path)["ended_at"] is None:
                time.sleep(2)
            times[name] = step_s(data, path.rpartition("/")[2])
    p50, p99 = np.percentile(seen.status_s, [50, 99])
    print(f"{len(seen.status_s)} statuses: p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms")
    print(f"{seen.num_events} events in {args.streams} streams; {len(seen.errors)} errors {seen.errors[:3]}")
    print("median step: " + ", ".join(f"{1000 * seconds:.1f} ms {name}" for name, seconds in times.items()))


if __name__ == "__main__":
    main()
