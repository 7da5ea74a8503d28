"""kill -9 in the middle of generations: of the HTTP replica, the supervisor, particles and score models, the runner.

python tests/support/service_kills.py 20  that many generations, four deaths in each and in every fifth the
runner's too
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from service_cases import OVERRIDES

from raydream.store.run_folder import RunFolder
from serve.records import Records
from serve.schema import FINAL_STATES

ROOT = Path(__file__).resolve().parents[2]
REPLICA, ACTOR, SUPERVISOR, RUNNER = "ServeReplica:raydream", "ActorProcess", "SupervisorActor", "Runner"
VICTIMS = (REPLICA, ACTOR, SUPERVISOR, RUNNER)
NUM_STEPS = 180
LONG = {"prompt": "a chair", "n": 2, "method": "vsd", "steps": NUM_STEPS}
SPARSE = ("output.checkpoint_every=10", "output.preview_every=40", "cluster.max_restarts=100")
_PATIENCE_S = 300.0


@contextlib.contextmanager
def running_service(
    data: Path, *changes: str, overrides: Sequence[str] = (), behind_proxy: bool = False, address: str = ""
) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A service in a process of its own with quick generations; ``changes`` are ``NAME=value`` of its environment.

    Behind Ray Serve's proxy its port is 8000: `serve run` knows no other. With an ``address`` it joins that cluster.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 8000 if behind_proxy else 0))
        port = free.getsockname()[1]
    temporary = tempfile.mkdtemp(prefix="rd-")  # short: paths of sockets have to fit into 107 characters
    settings = dict(change.split("=", 1) for change in changes)
    settings |= {"DATA": str(data), "PORT": str(port), "OVERRIDES": json.dumps([*OVERRIDES, *SPARSE, *overrides])}
    environment = os.environ | {f"RAYDREAM_SERVE_{name}": value for name, value in settings.items()}
    environment |= {"RAY_TMPDIR": temporary, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    environment |= {"RAY_ADDRESS": address} if address else {}
    data.mkdir(parents=True, exist_ok=True)
    with open(data / "service.log", "wb") as log:
        command = [sys.executable, "-m", "serve"]
        if behind_proxy:
            command = [str(Path(sys.executable).with_name("serve")), "run", "serve.app:app"]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            _wait_until_ready(client, server, data / "service.log")
            yield client, psutil.Process(server.pid)
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        server.kill()


def look(client: httpx.Client, path: str) -> dict[str, Any]:
    """A generation as it stands, however long the replica takes to come back."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            response = client.get(path)
            if response.status_code < 500:
                return response.raise_for_status().json()
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, f"{path} is not answered"
        time.sleep(0.2)


def kill(server: psutil.Process, victim: str, draw: random.Random) -> None:
    """kill -9 of a process of that name among the service's own, as soon as there is one."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        found = []
        for process in server.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(f"ray::{victim}"):
                    found.append(process.pid)
        if found:
            return os.kill(draw.choice(found), signal.SIGKILL)
        assert time.monotonic() < deadline, f"there is no process of {victim}"
        time.sleep(0.05)


def wait_for_step(data: Path, generation_id: str, step: int) -> None:
    """Looks into the record itself: a replica that was killed takes longer to come back than a few steps do."""
    records = Records(f"sqlite:///{data / 'records.sqlite3'}")
    while (now := records.get(generation_id)) is not None and now.step < step:
        assert now.ended_at is None, now
        time.sleep(0.02)
    assert now is not None
    assert now.state == "running", f"too late: {now}"
    records.close()


@dataclass(frozen=True)
class Toll:
    """What the deaths in one generation came to. ``deaths``: of whom, as the loop called them where it noticed."""

    deaths: Counter[str]
    starts: int
    ends: int
    steps_doubled: int
    steps_missing: int


def generation_with_deaths(
    client: httpx.Client, server: psutil.Process, seed: int, data: Path, victims: Sequence[str] = VICTIMS
) -> Toll:
    """One generation in which all die, in an order and at steps that follow from the seed; it ends well, once, with
    every step in its metrics, once.
    """
    _keep_history(data)
    draw = random.Random(seed)
    path = client.post("/v1/generations", json=LONG | {"seed": seed}).raise_for_status().headers["location"]
    generation_id = path.rpartition("/")[2]
    span = NUM_STEPS // (len(victims) + 2)  # steps in which there is time to come back
    for place, victim in enumerate(draw.sample(victims, len(victims)), 1):
        wait_for_step(data, generation_id, place * span + draw.randrange(span // 2))
        kill(server, victim, draw)
    while (now := look(client, path))["ended_at"] is None:
        time.sleep(0.1)
    assert now["state"] == "finished", now["error"]
    toll = _toll(data, generation_id, Counter(victims))
    assert (toll.ends, toll.steps_doubled, toll.steps_missing) == (1, 0, 0), toll
    return toll


def _keep_history(data: Path) -> None:
    """Has the database itself write down how generations change, beside and unknown to the service."""
    with contextlib.closing(sqlite3.connect(data / "records.sqlite3", timeout=30)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS history (id, old_state, state, old_attempt, attempt, phase)")
        database.execute(
            "CREATE TRIGGER IF NOT EXISTS keep_history AFTER UPDATE ON generations BEGIN INSERT INTO history "
            "VALUES (NEW.id, OLD.state, NEW.state, OLD.attempt, NEW.attempt, NEW.phase); END"
        )


def _toll(data: Path, generation_id: str, victims: Counter[str]) -> Toll:
    with contextlib.closing(sqlite3.connect(data / "records.sqlite3", timeout=30)) as database:
        changes = database.execute("SELECT * FROM history WHERE id = ?", (generation_id,)).fetchall()
    lost = {
        match.group()
        for change in changes
        if (match := re.match(r"(particle|score) \d+ failed at step \d+", change[5]))
    }
    deaths = Counter({victim: count for victim, count in victims.items() if victim != ACTOR})
    deaths.update(words.split()[0] for words in lost)
    steps = Counter(row["step"] for row in RunFolder.open(str(data / "runs" / generation_id)).read_metrics())
    return Toll(
        deaths,
        starts=sum(old != new for _, _, _, old, new, _ in changes),
        ends=sum(new in FINAL_STATES for _, old, new, *_ in changes if old != new),
        steps_doubled=steps.total() - len(steps),
        steps_missing=len(set(range(NUM_STEPS)) - set(steps)),
    )


def _wait_until_ready(client: httpx.Client, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        assert server.poll() is None, f"it ended with {server.returncode}: {log.read_text()[-3000:]}"
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"the service is not ready: {log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=int)
    times = parser.parse_args().times
    data, tolls = Path(tempfile.mkdtemp(prefix="rd-kills-")), []
    with running_service(data, "WARM_PARTICLES=2") as (client, server):
        for number in range(1, times + 1):
            started = time.monotonic()
            victims = (REPLICA, SUPERVISOR, ACTOR, ACTOR, *((RUNNER,) if number % 5 == 0 else ()))
            tolls.append(generation_with_deaths(client, server, number, data, victims))
            print(f"{time.monotonic() - started:.0f} s; in all {_sum(tolls)}", flush=True)
        page = client.get("/v1/generations", params={"limit": 100}).json()
    states = Counter(item["state"] for item in page["items"])
    assert states == {"finished": times}, states


def _sum(tolls: Sequence[Toll]) -> str:
    deaths = sum((toll.deaths for toll in tolls), Counter[str]())
    figures = (sum(figure) for figure in zip(*((t.starts, t.ends, t.steps_doubled, t.steps_missing) for t in tolls)))
    words = zip(figures, ("starts of a runner", "ends", "steps doubled", "steps missing"))
    dead = ", ".join(f"{count} {who}" for who, count in sorted(deaths.items()))
    return f"{len(tolls)} accepted; dead {dead}; " + ", ".join(f"{figure} {word}" for figure, word in words)


if __name__ == "__main__":
    main()
