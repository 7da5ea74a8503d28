"""kill -9 in the middle of generations: of the HTTP replica, of the supervisor, of a particle, of a runner.

PYTHONPATH=. python tests/service_kills.py 20   that many generations, all four deaths in each
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from service_cases import OVERRIDES

from raydream.store import RunFolder
from serve.records import Records

ROOT = Path(__file__).resolve().parents[1]
VICTIMS = ("ServeReplica:raydream", "_Host", "SupervisorActor", "Runner")
NUM_STEPS = 400
LONG = {"prompt": "a chair", "n": 2, "method": "vsd", "steps": NUM_STEPS}
SPARSE = ("output.checkpoint_every=10", "output.preview_every=40", "cluster.max_restarts=100")
_PATIENCE_S = 300.0


@contextlib.contextmanager
def running_service(data: Path, *changes: str) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A service in a process of its own with quick generations; ``changes`` are ``NAME=value`` of its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tempfile.mkdtemp(prefix="rd-")  # short: paths of sockets have to fit into 107 characters
    settings = dict(change.split("=", 1) for change in changes)
    settings |= {"DATA": str(data), "PORT": str(port), "OVERRIDES": json.dumps([*OVERRIDES, *SPARSE])}
    environment = os.environ | {f"RAYDREAM_SERVE_{name}": value for name, value in settings.items()}
    environment |= {"RAY_TMPDIR": temporary, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    data.mkdir(parents=True, exist_ok=True)
    with open(data / "service.log", "wb") as log:
        command = [sys.executable, "-m", "serve"]
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


def kill(server: psutil.Process, victim: str) -> int:
    """kill -9 of one process of that name among the service's own; its pid."""
    for process in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(f"ray::{victim}"):
                os.kill(process.pid, signal.SIGKILL)
                return process.pid
    raise AssertionError(f"there is no process of {victim}")


def wait_for_step(data: Path, generation_id: str, step: int) -> None:
    """Looks into the record itself: a replica that was killed takes longer to come back than a few steps do."""
    records = Records(f"sqlite:///{data / 'records.sqlite3'}")
    while (now := records.get(generation_id)) is not None and now.step < step:
        assert now.ended_at is None, now
        time.sleep(0.02)
    assert now is not None
    assert now.state == "running", f"too late: {now}"
    records.close()


def generation_with_deaths(client: httpx.Client, server: psutil.Process, seed: int, data: Path) -> dict[str, Any]:
    """One generation in which all die, one after the other; every step is in its metrics, once."""
    path = client.post("/v1/generations", json=LONG | {"seed": seed}).raise_for_status().headers["location"]
    for place, victim in enumerate(VICTIMS, 1):
        wait_for_step(data, path.rpartition("/")[2], place * NUM_STEPS // (len(VICTIMS) + 2))
        kill(server, victim)
    while (now := look(client, path))["ended_at"] is None:
        time.sleep(0.1)
    assert now["state"] == "finished", now["error"]
    run = RunFolder.open(str(data / "runs" / now["id"]))
    assert [row["step"] for row in run.read_metrics()] == list(range(NUM_STEPS))
    return now


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("times", type=int)
    times = parser.parse_args().times
    data = Path(tempfile.mkdtemp(prefix="rd-kills-"))
    with running_service(data, "WARM_PARTICLES=2") as (client, server):
        for seed in range(times):
            started = time.monotonic()
            generation_with_deaths(client, server, seed, data)
            print(f"{seed + 1}: all {len(VICTIMS)} died, it finished; {time.monotonic() - started:.0f} s", flush=True)
        page = client.get("/v1/generations", params={"limit": 100}).json()
    states = [item["state"] for item in page["items"]]
    assert states == ["finished"] * times, states
    print(f"{times} accepted, {times} finished, none twice")


if __name__ == "__main__":
    main()
