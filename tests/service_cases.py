"""A service in little for the tests: quick generations, and clients that need no network."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from httpx import Response
from small_runs import SMALL

from serve.api import build_api
from serve.records import Quota, Records, Wish
from serve.settings import Settings

URL = "/v1/generations"
OWN = ("prompt=", "n=", "cluster.runtime=")  # what a client says, or the service
OVERRIDES = tuple(setting for setting in SMALL if not setting.startswith(OWN))
CHAIR = {"prompt": "a chair", "n": 2, "steps": 6}
ROOMY = Quota(max_queued=1000, unfinished=1000, daily=1000)
WISH = Wish("a chair", 2, "exhibit", "vsd", 0, 6, 6)


def small_settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"data": str(folder), "overrides": OVERRIDES, "warm_particles": 0} | changes)


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


def post(client: TestClient, headers: dict[str, str] | None = None, **changes: Any) -> Response:
    return client.post(URL, json=CHAIR | changes, headers=headers)


def assert_problem(response: Response, status: int, field: str | None, words: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["field"]) == (status, field)
    assert words in body["detail"]
    assert body["title"]
    assert body["type"]
