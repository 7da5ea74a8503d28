"""Many clients beside a generation: how long a status takes, and how much slower the generation becomes.

python tests/support/service_load.py  a service of its own, 200 polling clients, 100 event streams
python tests/support/service_load.py --clients 50 --every 1 --steps 100
python tests/support/service_load.py --behind-proxy  the same by `serve run`, where Ray Serve carries requests

The clients share the machine with the service, so they are made of next to nothing: one process, requests that are
written beforehand, answers told apart by their length. What they take of the processors is told with the rest.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from service_kills import look, running_service

from raydream.store.run_folder import RunFolder

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
REQUEST = {"prompt": "a chair", "n": 2}
GROUPS = {
    "answering": ("ray::ServeReplica", "ray::ServeController", "ray::ProxyActor"),
    "computing": ("ray::ActorProcess", "ray::Runner", "ray::SupervisorActor"),
}


@dataclass
class Seen:
    """What the clients saw: seconds of each status, number of events, and errors in words."""

    status_s: list[float] = field(default_factory=list)
    num_events: int = 0
    errors: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def connected(url: httpx.URL, offset_s: float, seen: Seen) -> AsyncIterator[Streams]:
    """A connection that is made after a while; whatever befalls it is an error that the clients saw."""
    await asyncio.sleep(offset_s)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield reader, writer
    except (OSError, asyncio.IncompleteReadError) as error:
        seen.errors.append(repr(error))
    finally:
        writer.close()


async def head(reader: asyncio.StreamReader, seen: Seen) -> int:
    """The length of the body that follows, 0 where the answer says nothing about it."""
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    if b" 200 " not in lines[0]:
        seen.errors.append(lines[0].decode())
    return next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)


async def poll(url: httpx.URL, path: str, every_s: float, offset_s: float, seen: Seen) -> None:
    """Asks for the status until the generation has ended."""
    request = f"GET {path} HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode()
    async with connected(url, offset_s, seen) as (reader, writer):
        has_ended = False
        while not has_ended:
            started = time.perf_counter()
            writer.write(request)
            body = await reader.readexactly(await head(reader, seen))
            seconds = time.perf_counter() - started
            seen.status_s.append(seconds)
            has_ended = json.loads(body)["ended_at"] is not None
            await asyncio.sleep(every_s - seconds)


async def listen(url: httpx.URL, path: str, offset_s: float, seen: Seen) -> None:
    """Takes events until the last."""
    request = f"GET {path}/events HTTP/1.1\r\nHost: {url.host}\r\nConnection: close\r\n\r\n".encode()
    async with connected(url, offset_s, seen) as (reader, writer):
        writer.write(request)
        await head(reader, seen)
        told = b""
        while line := await reader.readline():
            if line.startswith(b"data: "):
                seen.num_events += 1
                told = line[6:]
        if not told or json.loads(told)["ended_at"] is None:
            seen.errors.append("a stream ended before its generation did")


async def crowd(url: httpx.URL, path: str, args: argparse.Namespace) -> Seen:
    """All clients, who come one after the other within the time between two polls, until the generation has ended."""
    seen = Seen()
    polls, streams = (np.linspace(0, args.every, number, endpoint=False) for number in (args.clients, args.streams))
    await asyncio.gather(
        *(poll(url, path, args.every, float(offset), seen) for offset in polls),
        *(listen(url, path, float(offset), seen) for offset in streams),
    )
    return seen


def cpu_s(server: psutil.Process) -> dict[str, float]:
    """Seconds of processor time that each kind of process has taken so far."""
    seconds = dict.fromkeys([*GROUPS, "Ray itself"], 0.0) | {"the clients": time.process_time()}
    for process in [server, *server.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            name, times = " ".join(process.cmdline()), process.cpu_times()
            group = next((group for group, names in GROUPS.items() if name.startswith(names)), "Ray itself")
            seconds[group] += times.user + times.system
    return seconds


def step_s(data: Path, generation_id: str) -> float:
    """Median seconds of a step, without the first quarter, in which the clients come."""
    rows = RunFolder.open(str(data / "runs" / generation_id)).read_metrics()
    return float(np.median([float(row["time/step_s"] or 0) for row in rows[len(rows) // 4 :]]))


def measure(client: httpx.Client, server: psutil.Process, data: Path, args: argparse.Namespace) -> None:
    """One generation alone, one in the crowd, one alone again."""
    times, seen = {}, Seen()
    for name in ("alone", "in the crowd", "alone again"):
        request = REQUEST | {"steps": args.steps}
        path = client.post("/v1/generations", json=request).raise_for_status().headers["location"]
        started, before = time.perf_counter(), cpu_s(server)
        if name == "in the crowd":
            seen = asyncio.run(crowd(client.base_url, path, args))
        while look(client, path)["ended_at"] is None:
            time.sleep(2)
        seconds, after = time.perf_counter() - started, cpu_s(server)
        times[name] = step_s(data, path.rpartition("/")[2])
        used = ", ".join(f"{group} {(after[group] - before[group]) / seconds:.2f}" for group in after)
        print(f"{name}: {seconds:.0f} s, median step {1000 * times[name]:.1f} ms; cores in use: {used}", flush=True)
    p50, p99 = 1000 * np.percentile(seen.status_s, [50, 99])
    print(f"{len(seen.status_s)} statuses: p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {1000 * max(seen.status_s):.0f} ms")
    print(f"{seen.num_events} events in {args.streams} streams; {len(seen.errors)} errors {seen.errors[:3]}")
    slower = times["in the crowd"] / np.mean([times["alone"], times["alone again"]]) - 1
    print(f"the generation's steps: {100 * slower:+.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two polls of a client")
    parser.add_argument("--steps", type=int, default=400, help="of each of the three generations")
    parser.add_argument("--behind-proxy", action="store_true", help="start it by `serve run`, at port 8000")
    args = parser.parse_args()
    data = Path(tempfile.mkdtemp(prefix="rd-load-"))
    with running_service(data, "WARM_PARTICLES=2", behind_proxy=args.behind_proxy) as (client, server):
        measure(client, server, data, args)


if __name__ == "__main__":
    main()
