"""Clients who only hold on, silent, slow or without end, lose their place; the others are answered meanwhile."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve import connections
from serve.connections import MAX_HEAD_BYTES, Connection, room_for_connections

Address = tuple[str, int]
LONG_S = 3600.0
MAX_CONNECTIONS = 20


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


@contextmanager
def listening(keep_alive_s: float = LONG_S) -> Iterator[Address]:
    config = uvicorn.Config(
        echo, http=Connection, lifespan="off", log_config=None, limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=int(keep_alive_s), timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([door])), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield door.getsockname()
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """Where nobody's patience ends."""
    monkeypatch.setattr(connections, "REQUEST_S", LONG_S)
    with listening() as found:
        yield found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """Where it ends soon."""
    monkeypatch.setattr(connections, "REQUEST_S", 0.5)
    with listening() as found:
        yield found


def opened(address: Address, said: bytes = b"") -> socket.socket:
    client = socket.create_connection(address, timeout=60)
    client.sendall(said)
    return client


def heard(client: socket.socket) -> bytes:
    """All that comes until the other side ends it."""
    with client:
        found = []
        try:
            while part := client.recv(65536):
                found.append(part)
        except ConnectionResetError:
            pass
        return b"".join(found)


def test_who_asks_is_answered_while_others_only_hold_on(address: Address) -> None:
    """Silent ones, and such as never come to the end of their head, far more than there are places."""
    with ExitStack() as stack:
        for number in range(5 * MAX_CONNECTIONS):
            said = (b"", b"GET / HTTP/1.1\r\nHost: a\r\nX: ")[number % 2]
            stack.enter_context(opened(address, said))
            if number % MAX_CONNECTIONS == 0:
                assert httpx.get(f"http://127.0.0.1:{address[1]}", timeout=60).text == "0"
        assert httpx.post(f"http://127.0.0.1:{address[1]}", content=b"abc", timeout=60).text == "3"


def test_who_is_being_answered_keeps_his_place(address: Address) -> None:
    """His body is still coming while the silent ones come and go."""
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    client = opened(address, head)
    assert client.recv(1024).startswith(b"HTTP/1.1 100 "), "it has begun"
    client.sendall(b"ab")
    with ExitStack() as stack:
        for _ in range(3 * MAX_CONNECTIONS):
            stack.enter_context(opened(address))
        assert httpx.get(f"http://127.0.0.1:{address[1]}", timeout=60).text == "0"
        client.sendall(b"cd")
        assert heard(client).endswith(b"\r\n\r\n4")


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT",
    ],
)
def test_what_does_not_come_to_its_end_is_ended(hasty: Address, said: bytes) -> None:
    answer = heard(opened(hasty, said))
    assert (b"408 Request Timeout" in answer) == said.endswith((b"a\r\n", b"HT")), answer


def test_the_beginning_of_nothing_is_ended(hasty: Address) -> None:
    client = opened(hasty, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    client.sendall(b"\r\n")
    heard(client)


def test_a_connection_is_kept_for_the_next_request(hasty: Address) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{hasty[1]}", timeout=60) as client:
        first = client.get("/")
        time.sleep(1.0)  # longer than a request may take
        again = client.post("/", content=b"abc")
    assert (first.text, again.text) == ("0", "3")
    assert first.extensions["network_stream"] is again.extensions["network_stream"]


def sent_until_refused(address: Address, start: bytes, endless: bytes) -> int:
    """Bytes; what the kernel holds on its own is among them."""
    num_bytes = 0
    with opened(address, start) as client:
        try:
            while num_bytes < 300 * 2**20:
                client.sendall(endless)
                num_bytes += len(endless)
        except (BrokenPipeError, ConnectionResetError):
            pass
    return num_bytes


@pytest.mark.parametrize(
    ("start", "endless"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: " + b"a" * 50_000 + b"\r\n"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 50_000),
        (b"GET /", b"a" * 50_000),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10_000),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a" * 50_000),
    ],
    ids=["headers", "one header", "a path", "a body", "a trailer"],
)
def test_a_request_has_an_end(address: Address, start: bytes, endless: bytes) -> None:
    assert sent_until_refused(address, start, endless) < 50 * 2**20


def test_a_head_that_is_too_long_is_told_so(address: Address) -> None:
    client = opened(address, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * MAX_HEAD_BYTES)
    assert heard(client).startswith(b"HTTP/1.1 431 ")


def test_there_are_as_many_places_as_the_process_may_open_files() -> None:
    assert 1 <= room_for_connections() <= 2000
