"""Faults of a storage that pass by themselves, told apart from those that stay, and how long they are waited for.

A file that is not there, or that we may not read, is its own ``FileNotFoundError`` or ``PermissionError``. Everything
else that goes wrong says nothing about the file and is a ``StorageError``: who gets one must not take the file for
missing.
"""

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 240.0  # stores throttle and fail over for a minute or two

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED_STATUS = frozenset({401, 403})
_PASSING_ERRNO = frozenset(
    {errno.EAGAIN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EIO, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
     errno.ENOTCONN, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT}
)  # fmt: skip
# What pyarrow's S3, GCS and Azure say, for their errors have no class of their own.
_STATUS = re.compile(r"HTTP status (\d{3})\b")
_PASSING_WORDS = re.compile(
    r"SLOW_DOWN|SERVICE_UNAVAILABLE|THROTTLING|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode|"
    r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ServerBusy|OperationTimedOut|"
    r"[Tt]imed out|[Cc]onnection (?:reset|refused|closed|aborted)|[Ss]erver disconnected"
)
_DENIED_WORDS = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH|"
    r"PERMISSION_DENIED|UNAUTHENTICATED|AuthorizationFailure"
)
_ABOUT_THE_FILE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)

# The same for readers that we do not call ourselves: regular expressions for messages.
PASSING_MESSAGES = (_PASSING_WORDS.pattern, f"HTTP status ({'|'.join(map(str, sorted(_PASSING_STATUS)))})")

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


class StorageError(OSError):
    """The storage did not do what it was asked; whether the file is there is not known."""


def patiently(ask: Callable[[], _Answer], what: str, patience_s: float) -> _Answer:
    """The answer of ``ask``, which is asked again for ``patience_s`` while it fails of something that passes.

    It must do the same when it is called twice. What it raises at last is a ``StorageError`` unless it tells of the
    file (see above) or the caller's mistake (``ValueError``). pyarrow itself asks an S3 store for six seconds, so a
    hiccup does not come so far.
    """
    deadline, delay_s = time.monotonic() + patience_s, _FIRST_DELAY_S
    while True:
        try:
            return ask()
        except Exception as error:
            left_s = deadline - time.monotonic()
            if not is_passing(error) or left_s <= 0:
                raise _named(error, what) from error
            _log.warning("%s: %s; asking again for up to %.0f s", what, _short(error), left_s)
        # not all workers at once; no result depends on it, so it needs no seed
        time.sleep(min(left_s, delay_s * random.uniform(0.5, 1.5)))
        delay_s = min(2 * delay_s, _LONGEST_DELAY_S)


def is_passing(error: BaseException | None) -> bool:
    """Whether an error tells of the network, or of a store that is busy, rather than of what it was asked for."""
    if error is None:
        return False
    status = _http_status(error)
    if status is not None:
        return status in _PASSING_STATUS
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in _PASSING_ERRNO:
        return True
    if not isinstance(error, _ABOUT_THE_FILE) and _PASSING_WORDS.search(str(error)):
        return True
    return is_passing(error.__cause__)  # HTTP by fsspec turns every failure into a FileNotFoundError


def _named(error: Exception, what: str) -> Exception:
    """The error to raise instead of one that stayed."""
    if is_passing(error):
        return StorageError(f"{what} does not answer: {_short(error)}")
    if isinstance(error, (ValueError, *_ABOUT_THE_FILE)) or getattr(error, "errno", None):
        return error
    status = _http_status(error)
    if status in _DENIED_STATUS or _DENIED_WORDS.search(str(error)):
        return PermissionError(errno.EACCES, f"{what} is denied: {_short(error)}")
    if status is not None or isinstance(error, OSError):
        return StorageError(f"{what} cannot be had: {_short(error)}")
    return error


def _http_status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, or tells in pyarrow's words."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def _short(error: Exception) -> str:
    return f"{error}"[:300] or type(error).__name__
