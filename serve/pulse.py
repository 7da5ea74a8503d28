"""Whether the Ray that this process belongs to is still there.

Asked of the kernel: a Ray that is gone lets a call of its own wait for a minute, and one that is busy answers late.
"""

import os
import socket
import threading
import time
from collections.abc import Callable

import ray

_EVERY_S = 1.0
_CONNECT_S = 3.0

Pulse = Callable[[], str]  # in words what is wrong; empty where nothing is


def of_worker() -> Pulse:
    """For an actor's process, which its node's raylet started: without its parent it is nobody's."""
    parent, gcs = os.getppid(), ray.get_runtime_context().gcs_address

    def trouble() -> str:
        return "Ray has ended on this machine" if os.getppid() != parent else _silence("the head of the cluster", gcs)

    return trouble


def of_driver() -> Pulse:
    """For the process that joined or started the cluster."""
    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    raylet, gcs = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", context.gcs_address

    def trouble() -> str:
        return _silence("Ray on this machine", raylet) or _silence("the head of the cluster", gcs)

    return trouble


def end_with_node(grace_s: float = 0.0) -> None:
    """Ends this actor's process once its node's raylet has: nobody else would, and it would go on as if nothing were.

    ``grace_s``: so long it may still tell those who ask.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY_S)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _silence(who: str, address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return ""
    except OSError as error:
        return f"{who} does not answer: {error.strerror or error}"
