"""The whole service: Ray Serve, supervisor, runner and actors, each a process of its own that may die."""

import contextlib
import io
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trimesh
from service_cases import CHAIR
from service_kills import ROOT, generation_with_deaths, look, running_service

from raydream.store.run_folder import MESH, PREVIEW, TURNTABLE
from serve.__main__ import main
from serve.app import app

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def service(data: Path) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # its cluster's, for who joins it
        with running_service(data, "WARM_PARTICLES=2") as found:
            yield found


def test_a_prompt_becomes_files(service: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = service
    path = client.post("/v1/generations", json=CHAIR).raise_for_status().headers["location"]
    with client.stream("GET", f"{path}/events", timeout=300) as stream:
        told = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert told[-1]["state"] == "finished", told[-1]["error"]
    steps = [generation["preview_step"] for generation in told if generation["preview_step"] is not None]
    assert steps == sorted(steps)
    assert steps[-1] == CHAIR["steps"]
    for particle in told[-1]["particles"]:
        assert client.get(particle["preview"]).content.startswith(b"\x89PNG")
        assert client.get(particle["turntable"]).content[4:8] == b"ftyp"
        if particle["mesh"] is not None:
            scene = trimesh.load_scene(io.BytesIO(client.get(particle["mesh"]).content), file_type="glb")
            assert sum(len(mesh.faces) for mesh in scene.geometry.values()) > 0
    names = {particle[name.split(".")[0]] for particle in told[-1]["particles"] for name in (PREVIEW, TURNTABLE, MESH)}
    assert f"{path}/particles/1/{PREVIEW}" in names
    assert client.get(told[-1]["links"]["archive"]).content[:2] == b"PK"


def test_what_runs_can_be_cancelled(service: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = service
    path = client.post("/v1/generations", json=CHAIR | {"steps": 5000}).raise_for_status().headers["location"]
    while look(client, path)["progress"]["step"] < 2:
        pass
    assert client.delete(path).json()["state"] == "cancelled"
    after = client.post("/v1/generations", json=CHAIR).raise_for_status().headers["location"]
    while (now := look(client, after))["ended_at"] is None:
        pass
    assert now["state"] == "finished"
    assert look(client, path)["state"] == "cancelled"


def test_a_generation_ends_once_whoever_dies(service: tuple[httpx.Client, psutil.Process], data: Path) -> None:
    """kill -9 of the replica, a particle or the score model, the supervisor and the runner, in one generation."""
    client, server = service
    generation_with_deaths(client, server, 1, data)
    assert client.get("/v1/generations").json()["items"][0]["state"] == "finished"


def test_two_services_in_one_cluster_know_nothing_of_each_other(
    service: tuple[httpx.Client, psutil.Process], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one ends its own application only; one with the first one's folder does not begin."""
    client, server = service
    raylet = next(process.cmdline() for process in server.children() if process.name() == "raylet")
    address = next(word for word in raylet if word.startswith("--gcs-address=")).partition("=")[2]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with running_service(tmp_path / "other", "WARM_PARTICLES=0", address=address) as (other, _):
        assert [each.get("/readyz").status_code for each in (client, other)] == [200, 200]
        path = client.post("/v1/generations", json=CHAIR).raise_for_status().headers["location"]
        assert other.get(path).status_code == 404
        monkeypatch.setenv("RAYDREAM_SERVE_DATA", str(data))
        monkeypatch.setenv("RAYDREAM_SERVE_PORT", "8456")
        refused = subprocess.run([sys.executable, "-m", "serve"], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert f"the record belongs to the service at {str(client.base_url).rstrip('/')}" in refused.stderr
    assert client.get("/readyz").status_code == 200
    while (now := look(client, path))["ended_at"] is None:
        pass
    assert now["state"] == "finished"


def test_without_ray_it_accepts_nothing_and_ends(tmp_path: Path) -> None:
    with running_service(tmp_path / "service", "WARM_PARTICLES=0") as (client, server):
        next(process for process in server.children() if process.name() == "raylet").kill()
        with contextlib.suppress(httpx.TransportError):  # refused connections are fine, too
            while (told := client.get("/readyz")).status_code == 200:
                pass
            assert told.status_code == 503
            assert client.post("/v1/generations", json=CHAIR).status_code == 503
        assert server.wait(120) == 1


def test_an_address_that_others_reach_needs_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYDREAM_SERVE_DATA", str(tmp_path))
    monkeypatch.setenv("RAYDREAM_SERVE_HOST", "0.0.0.0")
    assert main([]) == 2
    assert "RAYDREAM_SERVE_HOST: 0.0.0.0 is reachable by others, which needs API keys" in capsys.readouterr().err


def test_whoever_starts_it_is_patient_with_its_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "7")
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "")  # so that it is put back as it was
    monkeypatch.delenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S")
    app({"data": str(tmp_path), "max_n": "4"})
    assert os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] == "60"
    assert os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] == "7", "what the operator says, holds"
