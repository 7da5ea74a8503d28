"""``RAY_ADDRESS`` with nobody behind it, or somebody else, or a cluster that asks for a token: one line, at once."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)
from ray.util import get_node_ip_address

import raydream.cluster.connection
from raydream.cluster.connection import check_address, connect

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that belongs to no cluster yet, in a place where few seconds are enough."""
    ray.shutdown()  # whatever tests before these left running in this process
    monkeypatch.setattr(raydream.cluster.connection, "_ANSWER_S", 2.0)


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nobody listens, for as long as the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


class Strict(NodeInfoGcsServiceServicer):
    """A head that lets nobody in."""

    def CheckAlive(self, request: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_listens(closed: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", scheme + closed)
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS={scheme}{closed}: no Ray cluster answers there .*refused"):
        connect()
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1", "nonsense", "host.invalid:6379", "127.0.0.1:x", "127.0.0.1:99999"])
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS={address}: no Ray cluster answers there"):
        connect()


def test_somebody_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer((get_node_ip_address(), 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"{get_node_ip_address()}:{server.server_port}")
        with pytest.raises(ValueError, match=r"no Ray cluster answers there \((UNAVAILABLE|DEADLINE_EXCEEDED)\); "):
            connect()
        server.shutdown()


@pytest.mark.parametrize("stale", [False, True])
def test_auto_finds_nobody(closed: str, stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {closed} if stale else set())
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: closed if stale else None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS=auto: no Ray cluster answers there \("):
        connect()


def test_a_cluster_that_asks_for_a_token_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(Strict(), server)
    host = get_node_ip_address()  # what Ray makes of 127.0.0.1: heads listen there
    monkeypatch.setenv("RAY_ADDRESS", f"{host}:{server.add_insecure_port(f'{host}:0')}")
    server.start()
    try:
        with pytest.raises(ValueError, match=r"^RAY_ADDRESS=.*: the cluster asks for a token .*RAY_AUTH_MODE=token"):
            connect()
    finally:
        server.stop(None)


@pytest.mark.parametrize("address", ["", "local"])
def test_without_an_address_nobody_is_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert check_address() == ""


@pytest.mark.parametrize(
    "command",
    [
        ["jobs/vsd_particles.py", "--n", "1", "--set", "prior.exhibit.assets=procedural", "--out", "{out}"],
        ["jobs/render_ccm.py", "--assets", "procedural", "--set", "library.max_objects=1", "--out", "{out}"],
        ["jobs/finetune_agp.py", "--views", "{out}", "--prior", "embedded", "--out", "{out}"],
        ["-m", "serve"],
        ["-c", "import serve.app; serve.app.app({})"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_says_so_in_one_line(command: list[str], closed: str, tmp_path: Path) -> None:
    words = [word.replace("{out}", str(tmp_path / "out")) for word in command]
    settings = {"RAY_ADDRESS": closed, "PYTHONPATH": str(ROOT), "RAYDREAM_SERVE_DATA": str(tmp_path / "data")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings["RAYDREAM_SERVE_PORT"] = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == (1 if "-c" in command else 2), done.stderr  # `serve run` knows one code only
    assert done.stderr.splitlines()[-1].startswith(f"error: RAY_ADDRESS={closed}: no Ray cluster answers there")
    assert "Traceback" not in done.stderr
