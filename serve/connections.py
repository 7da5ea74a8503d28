"""Connections that nobody can hold for nothing: uvicorn's own, with limits to what a client may send, and to its time.

uvicorn waits for the rest of a request for as long as its client likes, and lets its head grow for ever.
"""

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024
MAX_REQUEST_BYTES = 2**20  # one that is refused for its length is read to here, so that its client sees why
REQUEST_S = 15.0  # from its first byte to its last, or from the connection on
_OTHER_FILES = 256  # of the process, beside connections
_MAX_CONNECTIONS = 2000
_SHARE_TO_DROP = 20


def room_for_connections() -> int:
    """How many there may be; lets the process open as many files, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(_MAX_CONNECTIONS, soft - _OTHER_FILES))


class Connection(HttpToolsProtocol):
    """One client's. Where all places are taken, those who have been silent for longest lose theirs: who asks is
    answered, whoever else only holds on.
    """

    _deadline: asyncio.TimerHandle | None = None
    _num_bytes = 0  # of the request that is coming
    _has_begun = _has_head = False
    _silent_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silent_since = self.loop.time()
        self._set_deadline()
        assert self.limit_concurrency is not None
        if len(self.connections) >= self.limit_concurrency:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_bytes > (MAX_REQUEST_BYTES if self._has_head else MAX_HEAD_BYTES):
            self._refuse(b"431 Request Header Fields Too Large")
        elif self._is_idle and self._deadline is None and self.timeout_keep_alive_task is None:
            self._set_deadline()  # what came was the beginning of nothing

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun, self._has_head = True, False
        self._set_deadline()

    def on_headers_complete(self) -> None:
        self._has_head = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._clear_deadline()
        self._num_bytes, self._has_begun = 0, False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._silent_since = self.loop.time()
        super().on_response_complete()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _set_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self._end_of_patience)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_of_patience(self) -> None:
        self._deadline = None
        if self._has_begun:
            self._refuse(b"408 Request Timeout")
        else:
            self.transport.close()

    def _refuse(self, status: bytes) -> None:
        if self._is_idle:
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
        self.transport.close()

    def _make_room(self) -> None:
        """Several at once: looking for them takes a look at all."""
        others = [each for each in self.connections if isinstance(each, Connection) and each is not self]
        silent = sorted((each for each in others if each._is_idle), key=lambda each: each._silent_since)
        for each in silent[: 1 + len(others) // _SHARE_TO_DROP]:
            each.transport.abort()
            self.connections.discard(each)
