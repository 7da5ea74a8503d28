"""The service at its own address, without Ray: it answers, says when it no longer does, and shares with its like
only.
"""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from service_cases import small_settings

from serve.__main__ import main
from serve.listener import Listener, open_socket
from serve.settings import Settings
from serve.supervisor import SupervisorHealth


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr("serve.listener.look_after_supervisor", lambda settings, owner: SupervisorHealth(0.0))
    monkeypatch.setattr("serve.pulse.end_with_node", lambda grace_s: None)
    monkeypatch.setattr("serve.pulse.of_worker", lambda: lambda: "")
    with socket.create_server(("127.0.0.1", 0)) as free:
        return small_settings(tmp_path, port=free.getsockname()[1])


@pytest.fixture
def listener(settings: Settings) -> Iterator[Listener]:
    listener = Listener(settings, "tests", False)
    yield listener
    listener.__del__()


def url_of(settings: Settings, path: str) -> str:
    return f"http://127.0.0.1:{settings.port}{path}"


@pytest.mark.usefixtures("listener")
def test_it_answers_from_when_it_is_made(settings: Settings) -> None:
    assert httpx.get(url_of(settings, "/healthz"), timeout=60).json()["status"] == "ok"


def test_it_is_healthy_until_it_ends(settings: Settings, listener: Listener) -> None:
    asyncio.run(listener.check_health())
    listener.__del__()
    with pytest.raises(RuntimeError, match="the HTTP server has ended"):
        asyncio.run(listener.check_health())
    with pytest.raises(httpx.ConnectError):
        httpx.get(url_of(settings, "/healthz"))


@pytest.mark.usefixtures("listener")
def test_another_replica_takes_over_at_the_same_address(settings: Settings) -> None:
    Listener(settings, "tests", False).__del__()
    assert httpx.get(url_of(settings, "/healthz"), timeout=60).status_code == 200


@pytest.mark.usefixtures("listener")
def test_another_service_finds_the_address_taken(settings: Settings) -> None:
    with pytest.raises(ValueError, match=f"^RAYDREAM_SERVE_PORT: cannot listen at 127.0.0.1, port {settings.port}: "):
        open_socket(settings, is_shared=False)


def test_a_port_that_is_taken_is_said_before_anything_starts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYDREAM_SERVE_DATA", settings.data)
    monkeypatch.setenv("RAYDREAM_SERVE_PORT", str(settings.port))
    with open_socket(settings, is_shared=False):
        assert main([]) == 2
    assert "end what listens there, or choose another port" in capsys.readouterr().err
