"""What every request passes before any route sees it, and the headers that every answer carries."""

from typing import Annotated

from fastapi import HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import Keys
from serve.problems import problem
from serve.settings import is_loopback

MAX_BODY_BYTES = 16 * 1024
LOCAL_OWNER = "local"

API_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# A run's report is a page of its own: no origin, so that nothing in it can ask this service for anything.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = {
    "Content-Security-Policy": API_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_bearer = HTTPBearer(auto_error=False, description="needed where the service has keys")


class Guard:
    """Refuses what is too large or comes from elsewhere where there are no keys.

    Without keys only this machine may ask, and only under its own name: a page of another site whose name was made to
    point here (DNS rebinding) is refused by its Host, and cannot send JSON without a preflight that nobody answers.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, num_bytes = Headers(scope=scope), 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"a body may have {MAX_BODY_BYTES} bytes")
            return message

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    answer.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, detail = refusal
            await problem(status, detail)(scope, receive, send_guarded)
            return
        await self._app(scope, receive_limited, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return 413, f"a body may have {MAX_BODY_BYTES} bytes"
        if self._keys.are_needed:
            return None
        client = scope.get("client")
        if client is not None and not is_loopback(client[0]):
            return 403, "without API keys only this machine may ask; add one by `python -m serve.keys add NAME`"
        if not is_loopback(_host_name(headers.get("host", ""))):
            return 421, "without API keys the service answers to localhost and 127.0.0.1 only"
        return None


async def owner_of(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> str:
    """Who asks: the name of the API key, or everybody's one name where there are no keys."""
    keys: Keys = request.app.state.keys
    if not keys.are_needed:
        return LOCAL_OWNER
    owner = keys.owner_of(credentials.credentials) if credentials is not None else None
    if owner is None:
        raise HTTPException(401, "send `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})
    return owner


def _host_name(host: str) -> str:
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
