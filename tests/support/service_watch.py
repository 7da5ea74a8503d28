"""Watches one generation of a service that runs, and says how long each thing took.

python tests/support/service_watch.py http://127.0.0.1:8000 '{"prompt": "a chair", "n": 4, "steps": 40}'
"""

import json
import sys
import time
from typing import Any

import httpx


def watch(client: httpx.Client, request: dict[str, Any], limit_s: float = 600.0) -> dict[str, float]:
    """Seconds from the POST to the first step's preview, and so on; raises where it does not finish."""
    seconds: dict[str, float] = {}
    started, told = time.perf_counter(), None
    accepted = client.post("/v1/generations", json=request)
    accepted.raise_for_status()
    path = accepted.headers["location"]
    while time.perf_counter() - started < limit_s:
        now = client.get(path).raise_for_status().json()
        marks = {
            "accepted": True,
            "running": now["state"] != "queued",
            "first preview": now["preview_step"] is not None,
            "first trained preview": bool(now["preview_step"]),
            "last step": now["progress"]["step"] >= now["progress"]["num_steps"],
            "ended": now["ended_at"] is not None,
        }
        for name, is_there in marks.items():
            if is_there:
                seconds.setdefault(name, time.perf_counter() - started)
        if now["progress"]["phase"] != told:
            told = now["progress"]["phase"]
            print(f"{time.perf_counter() - started:7.2f} s  {now['state']}  {told}")
        if now["ended_at"] is not None:
            assert now["state"] == "finished", now["error"]
            return seconds
        time.sleep(0.05)
    raise TimeoutError(f"{path} has not ended within {limit_s:.0f} s")


def main() -> None:
    with httpx.Client(base_url=sys.argv[1], timeout=60.0) as client:
        for name, value in watch(client, json.loads(sys.argv[2])).items():
            print(f"{name}: {value:.2f} s")


if __name__ == "__main__":
    main()
