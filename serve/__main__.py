"""The service on one machine or as a job of a cluster, at RAYDREAM_SERVE_HOST and RAYDREAM_SERVE_PORT.

python -m serve
python -m serve --take-over      in the place of the service that the data folder, or the database, belongs to now
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import serve

from raydream.cluster.connection import check_address, connect
from serve.actors import end_actors
from serve.app import listening
from serve.keys import Keys
from serve.lease import BEAT_EVERY_S, Tenure, holder_at, take_or_refuse
from serve.listener import open_socket
from serve.pulse import Pulse, of_driver
from serve.records import Records, RecordsAway
from serve.settings import Settings, is_loopback

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
# For so long a Ray may be away: one of our own does not come back, the head of a cluster may be started again.
_PATIENCE_S, _PATIENCE_WITH_OTHERS_S = 5.0, 60.0
_END_S = 60.0


def main(words: Sequence[str] | None = None) -> int:
    """Starts Ray and the service, and ends both on SIGINT or SIGTERM; 2 for settings that cannot be, 1 where it cannot
    go on: Ray has ended, or another service has taken the record over.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--take-over", action="store_true", help="from the service that has the record now")
    by_force = parser.parse_args(words).take_over
    try:
        settings = Settings.from_environment()
        if not is_loopback(settings.host) and not Keys(settings.keys_file).are_needed:
            raise ValueError(
                f"RAYDREAM_SERVE_HOST: {settings.host} is reachable by others, which needs API keys; "
                "make one by `python -m serve.keys add NAME`, or stay at 127.0.0.1"
            )
        tenure = _held(settings, by_force)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_over = threading.Event()
    beats = threading.Thread(target=_beat, args=(tenure, is_over), daemon=True)
    beats.start()
    try:
        return _serve(settings, tenure, by_force)
    except ValueError as error:  # the cluster is not there, or the port still another's
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        is_over.set()
        beats.join()
        _release(tenure)


def _held(settings: Settings, by_force: bool) -> Tenure:
    """The record, for this service alone; ``ValueError`` where it is another's, or cannot be read."""
    Path(settings.data).mkdir(parents=True, exist_ok=True)
    try:
        tenure = Tenure(Records(settings.database_url).leases, uuid.uuid4().hex, holder_at(settings.address))
        take_or_refuse(tenure, by_force)
    except RecordsAway as error:
        raise ValueError(f"RAYDREAM_SERVE_DATABASE: it does not answer: {error.orig}") from error
    return tenure


def _wait_for_port(settings: Settings, patience_s: float) -> None:
    """A service that was taken over needs a moment to leave."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            # a replica's share of somebody else's port would be no error
            return open_socket(settings, is_shared=False).close()
        except ValueError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOOK_EVERY_S)


def _beat(tenure: Tenure, is_over: threading.Event) -> None:
    """Signs of life, from before Ray is there: that may take longer than the lease lasts. None once it is another's."""
    while not is_over.wait(BEAT_EVERY_S):
        try:
            if not tenure.beat():
                return
        except RecordsAway as error:
            _log.warning("the database does not answer: %s", error)


def _serve(settings: Settings, tenure: Tenure, by_force: bool) -> int:
    if not by_force:
        _wait_for_port(settings, 0.0)
    is_private = not check_address()
    connect()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which takes them for itself
        signal.signal(number, lambda *_: stop.set())
    serve.start(proxy_location="Disabled")
    name = settings.namespace
    if by_force and name in serve.status().applications:  # the old service was one of this cluster
        serve.delete(name)
    _wait_for_port(settings, _END_S if by_force else 0.0)
    serve.run(listening(settings, tenure.owner), name=name, route_prefix=None)
    print(f"raydream answers at {settings.address}", file=sys.stderr)
    deployed_at = serve.status().applications[name].last_deployed_time_s
    reason = _watch(tenure, of_driver(), stop, _PATIENCE_S if is_private else _PATIENCE_WITH_OTHERS_S)
    if reason:
        print(f"error: {reason}; the service ends", file=sys.stderr)
    _end_at_last()
    found = None if is_private else serve.status().applications.get(name)
    if is_private:
        ray.shutdown()
    elif found is not None and found.last_deployed_time_s == deployed_at:  # else another's, who took it over
        serve.delete(name)
        end_actors(settings)
    return 1 if reason else 0


def _watch(tenure: Tenure, pulse: Pulse, stop: threading.Event, patience_s: float) -> str:
    """Waits for ``stop``; or says why the service cannot go on."""
    seen_at = time.monotonic()
    while not stop.wait(_LOOK_EVERY_S):
        trouble = pulse()
        if not trouble:
            seen_at = time.monotonic()
        elif time.monotonic() - seen_at >= patience_s:
            return trouble
        if tenure.epoch is None:
            return f"the record belongs to {tenure.look()}"
    return ""


def _release(tenure: Tenure) -> None:
    try:
        tenure.release()
    except RecordsAway as error:  # it becomes free by itself
        _log.warning("the lease could not be given back: %s", error)


def _end_at_last() -> None:
    """Ray may wait for ever for what is no longer there."""
    timer = threading.Timer(_END_S, os._exit, [1])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
