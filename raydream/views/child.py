"""A process of its own for strangers' files: whatever one of them does to it, the worker that asked stays alive.

``python -m raydream.views.child`` answers at its end of a pipe, one reply for each record that comes. When an asset
takes too long the kernel itself ends the process (SIGALRM needs no cooperation of whatever hangs), so it cannot outlive
its parent by more than that either.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pyarrow as pa

from raydream.assets.error import AssetError
from raydream.assets.libraries import AssetRecord
from raydream.config import strict_json
from raydream.config.render import PoolConfig, ViewConfig
from raydream.store.faults import StorageError, is_passing

_ROWS, _REFUSED, _AWAY = b"V", b"R", b"A"
_CRASHES = 2  # of its own: the file does it
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT})
_PAUSES_S = (1.0, 10.0)  # after the first kill and the second: who was short of memory may have it by then
_MAX_DETAIL = 300


class ChildKilled(Exception):
    """The child was killed from outside over an asset, again and again; nothing is known of the asset."""


class RenderProcess:
    """The parent's end: one child at a time, started when it is first needed and again after each death."""

    def __init__(self, views: ViewConfig, pool: PoolConfig) -> None:
        self._settings = json.dumps([strict_json.to_json(views), strict_json.to_json(pool)])
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection

    def render(self, record: AssetRecord) -> pa.Table:
        """The rows of ``render_record`` for one asset.

        Raises AssetError: besides those of ``render_record``, ``timeout``, ``out_of_memory``, ``crashed`` (the process
        died of it twice) or ``render_error``. Raises ChildKilled, or StorageError where the disk that the asset lies
        on is away.
        """
        num_crashes = num_kills = 0
        while True:
            reply = self._ask(record)
            if reply is not None:
                return reply
            assert self._process is not None
            number = -self._process.wait()
            if number == signal.SIGALRM:  # a second try would take as long
                raise AssetError("timeout", "longer than pool.asset_limit_s")
            told = f"signal {signal.Signals(number).name}" if number > 0 else f"exit code {-number}"
            if number in _FROM_OUTSIDE:
                if num_kills == len(_PAUSES_S):
                    raise ChildKilled(f"its process ended with {told}, {num_kills + 1} times")
                time.sleep(_PAUSES_S[num_kills])
                num_kills += 1
            else:
                num_crashes += 1
                if num_crashes == _CRASHES:
                    raise AssetError("crashed", f"its process ended with {told}, {num_crashes} times")

    def close(self) -> None:
        """Ends the child; also safe where there is none."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()

    def _ask(self, record: AssetRecord) -> pa.Table | None:
        """The reply of a living child; None where it died over the question."""
        self._bring_to_life()
        try:
            self._pipe.send(record)
            reply = self._pipe.recv_bytes()
        except (OSError, EOFError):  # also in the middle of a reply
            return None
        kind, body = reply[:1], reply[1:]
        if kind == _AWAY:
            raise StorageError(body.decode())
        if kind == _REFUSED:
            raise AssetError(*json.loads(body))
        with pa.ipc.open_stream(body) as stream:
            return stream.read_all()

    def _bring_to_life(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._pipe.close()
        # the module search path of this process: a Ray worker may have it from its job, not from its environment
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._pipe, theirs = Pipe()
        with theirs:
            words = [sys.executable, "-m", "raydream.views.child", str(theirs.fileno()), self._settings]
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
            )


def main() -> None:
    """The child: its end of the pipe and the settings are its arguments; it ends with the pipe."""
    pipe = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # whatever a library prints is no part of what its parent's command prints
    views_json, pool_json = json.loads(sys.argv[2])
    views, pool = strict_json.from_json(ViewConfig, views_json), strict_json.from_json(PoolConfig, pool_json)
    import torch

    from raydream.assets.procedural import procedural_records
    from raydream.backend import load_backend
    from raydream.views.render import render_record

    torch.set_num_threads(1)
    backend = load_backend("auto", "cpu")
    render_record(procedural_records()[0], ViewConfig(1, 8), backend)  # compiles the kernels, on nobody's time
    _limit_memory(pool.asset_memory_gb)
    while True:
        try:
            record = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        signal.alarm(pool.asset_limit_s)
        try:
            kind, body = _ROWS, _ipc_bytes(render_record(record, views, backend))
        except AssetError as error:
            kind, body = _refusal(error.reason, error.detail)
        except (
            Exception
        ) as error:  # the last net under files that nobody has seen: the pool goes on, the report says it
            kind, body = _last_words(error)
        signal.alarm(0)
        try:
            pipe.send_bytes(kind + body)
        except ConnectionError:  # nobody waits for it any more
            os._exit(0)


def _last_words(error: Exception) -> tuple[bytes, bytes]:
    """The reply for an error that no reader foresaw."""
    words = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and is_passing(error):
        return _AWAY, words[:_MAX_DETAIL].encode()
    short = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return _refusal("out_of_memory" if short else "render_error", words)


def _refusal(reason: str, detail: str) -> tuple[bytes, bytes]:
    return _REFUSED, json.dumps([reason, detail[:_MAX_DETAIL]]).encode()


def _ipc_bytes(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return sink.getvalue().to_pybytes()


def _limit_memory(gigabytes: float) -> None:
    """Bounds what this process may take beyond what it has mapped already."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mapped + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
