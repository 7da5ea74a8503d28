"""Words for the person at the terminal, who may have left: what cannot be written there ends no run."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, runtime_checkable

_GONE = frozenset({errno.EPIPE, errno.EIO, errno.ENXIO})  # a reader that ended, a terminal that was closed


@runtime_checkable
class Stream(Protocol):
    """What is needed of a text stream such as ``sys.stderr``."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...

    def fileno(self) -> int: ...


class LastingStream:
    """A text stream for writers that must go on when nobody reads any more, or when a log's disk is full.

    Once the reader is gone, the file behind the stream becomes the null device for the whole process: other writers
    (warnings, Ray's threads, the interpreter at its end) would stumble over it too.
    """

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream  # None: the process was started without one

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            with _lasting(self._stream):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with _lasting(self._stream):
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()


def say(message: str) -> None:
    """One message on stderr."""
    print(message, file=LastingStream(sys.stderr), flush=True)


def settle() -> None:
    """For the end of a process: what stdout and stderr still hold, and nobody takes, must not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            _give_up(stream)


@contextmanager
def _lasting(stream: Stream) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            _give_up(stream)


def _give_up(stream: Stream) -> None:
    with suppress(OSError):  # a stream without a file behind it
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
