"""A service in little for the tests: quick generations, and clients that need no network."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from small_runs import SMALL

from raydream.store.run_folder import MESH, PREVIEW, REPORT, TURNTABLE, RunFolder, particle_file, preview_file
from serve.api import build_api
from serve.records import CheckedRequest, Quota, Records
from serve.settings import Settings

URL = "/v1/generations"
OWN = ("prompt=", "n=", "cluster.runtime=")  # what a client says, or the service
OVERRIDES = tuple(setting for setting in SMALL if not setting.startswith(OWN))
CHAIR = {"prompt": "a chair", "n": 2, "steps": 6}
CONTENT = {MESH: b"glTF" + bytes(500), TURNTABLE: bytes(range(256)), PREVIEW: b"\x89PNG picture"}
ROOMY = Quota(max_queued=1000, unfinished=1000, daily=1000)
REQUEST = CheckedRequest("a chair", 2, "exhibit", "vsd", 0, 6, 6)


def small_settings(folder: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {"data": str(folder), "overrides": OVERRIDES, "warm_particles": 0}
    return Settings(**values | changes)


@contextmanager
def client_of(settings: Settings, host: str = "127.0.0.1", name: str = "http://localhost") -> Iterator[TestClient]:
    """A client at an address, that calls the service by a name."""
    with TestClient(build_api(settings), base_url=name, client=(host, 50000)) as client:
        yield client


def records_of(settings: Settings) -> Records:
    return Records(settings.database_url)


def epoch_of(records: Records) -> int:
    """Of the lease, which the tests' own supervisor has."""
    epoch = records.leases.take("tests", "the tests")
    assert epoch is not None
    return epoch


def post(client: TestClient, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    return client.post(URL, json=CHAIR | changes, headers=headers)


def assert_problem(response: Any, status: int, field: str | None, words: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["field"]) == (status, field)
    assert words in body["detail"]
    assert body["title"]
    assert body["type"]


def finished(client: TestClient, records: Records, settings: Settings, num_rows: int = 3) -> str:
    """A generation that has ended, with files that are there to be told apart; the second particle has no mesh."""
    generation = post(client).json()["id"]
    record = records.get(generation)
    assert record is not None
    attempt = records.take_up(record, epoch_of(records))
    run = RunFolder.create(settings.run_uri(generation), "{}")
    run.append_metrics([{"step": step, "loss/rgb": 0.5 * step, "time/step_s": 1.0} for step in range(num_rows)])
    for index in range(2):
        for name, data in CONTENT.items():
            if (index, name) != (1, MESH):
                run.write_bytes(particle_file(index, name), data + bytes([index]))
    run.write_bytes(preview_file(3), b"grid")
    run.write_text(REPORT, "<!doctype html><title>report</title>")
    run.write_checkpoint_file(3, "score.safetensors", b"large")
    assert records.end(generation, attempt or 0, "finished", {"meshes": [0], "preview_step": 6, "step": 6})
    return generation
