"""Errors as problem details (RFC 9457) that name the field."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from raydream.store.faults import StorageError
from serve.keys import KeysAway
from serve.records import KeyUsedForOther, NotNow, QuotaUsedUp, RecordsAway
from serve.schema import TITLES, Problem

_log = logging.getLogger(__name__)


def problem(status: int, detail: str, field: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """The answer for an error."""
    body = Problem(type="about:blank", title=TITLES.get(status, "Error"), status=status, detail=detail, field=field)
    return JSONResponse(body.model_dump(), status, dict(headers or {}), media_type="application/problem+json")


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), headers=error.headers)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    is_syntax = first["type"] == "json_invalid"
    field = None if is_syntax else ".".join(where) or None
    detail = "the body is not valid JSON" if is_syntax else f"{field or 'body'}: {first['msg']}"
    return problem(422, detail, field)


async def _wrong_value(_request: Request, error: Exception) -> Response:
    """A user's mistake, in the words of the command line: ``field: what would be right``."""
    field, separator, _ = str(error).partition(":")
    if not separator or not field.replace(".", "").replace("_", "").isalnum():
        return await _failed(_request, error)
    return problem(422, str(error), field)


async def _used_up(_request: Request, error: Exception) -> Response:
    assert isinstance(error, QuotaUsedUp)
    return problem(429, str(error), headers={"Retry-After": str(error.retry_after_s)})


async def _conflict(_request: Request, error: Exception) -> Response:
    return problem(409, f"Idempotency-Key: {error}; send another one", "Idempotency-Key")


async def _not_now(_request: Request, error: Exception) -> Response:
    return problem(409, str(error))


async def _away(_request: Request, error: Exception) -> Response:
    """The database, the keys or the storage of the runs; only the keys' own words are for everybody."""
    _log.warning("a request was turned away: %s", error)
    what = "the storage of the runs" if isinstance(error, StorageError) else "the service's database"
    detail = str(error) if isinstance(error, KeysAway) else f"{what} does not answer"
    return problem(503, detail, headers={"Retry-After": "10"})


async def _failed(_request: Request, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    return problem(500, "the service failed; its log says why")


# what turns whatever a route raises into a problem
HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: _refused,
    RequestValidationError: _invalid,
    ValueError: _wrong_value,
    QuotaUsedUp: _used_up,
    KeyUsedForOther: _conflict,
    NotNow: _not_now,
    StorageError: _away,
    KeysAway: _away,
    RecordsAway: _away,
    Exception: _failed,
}
