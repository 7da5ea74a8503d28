"""A replica that answers at the service's own address: Ray Serve starts it, watches it and replaces it, but carries no
request. Its proxy, and what it wraps around an application, take more than ten times what the application itself takes.
"""

import asyncio
import socket
import threading
from functools import partial

import uvicorn

from serve import pulse
from serve.actors import look_after_supervisor
from serve.api import build_api
from serve.connections import Connection, room_for_connections
from serve.settings import Settings

_KEEP_ALIVE_S = 75  # longer than any page waits between two questions
GRACE_S = 3  # for answers under way when it ends


class Listener:
    """Listens from when it is made until it is deleted. ``ValueError`` where it cannot."""

    def __init__(self, settings: Settings, owner: str, is_closed: bool) -> None:
        """``owner`` holds the record's lease; ``is_closed``: there were API keys when the service was started."""
        pulse.end_with_node(GRACE_S)
        config = uvicorn.Config(
            build_api(settings, partial(look_after_supervisor, settings, owner), pulse.of_worker(), is_closed),
            http=Connection,
            access_log=False,  # a line for each poll is no news; /metrics counts them
            log_config=None,
            limit_concurrency=room_for_connections(),
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
        self._server, self._loop = uvicorn.Server(config), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        # Shared: other replicas of this machine listen there too, and one may come before the one it replaces has gone.
        self._socket = open_socket(settings, is_shared=True)
        self._thread.start()

    async def check_health(self) -> None:
        """Raises where nobody answers any more, and does not return while nobody does. Ray Serve calls it."""
        if not self._thread.is_alive():
            raise RuntimeError("the HTTP server has ended")
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop))

    def __del__(self) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(GRACE_S + 1)

    def _serve(self) -> None:
        with self._socket, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._server.serve([self._socket]))


def open_socket(settings: Settings, is_shared: bool) -> socket.socket:
    """Listens at the service's address; ``ValueError`` where that cannot be, as when somebody else does already."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, reuse_port=is_shared)
    except OSError as error:
        raise ValueError(
            f"RAYDREAM_SERVE_PORT: cannot listen at {settings.host}, port {settings.port}: {error.strerror}; "
            "end what listens there, or choose another port"
        ) from error
