"""The service on Ray Serve: ``serve run serve.app:app``, on this machine at port 8000.

A Ray that this starts is patient with its HTTP proxy. One that runs already has the patience of its own environment:
give its nodes RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 where they compute on all their cores.
"""

import os
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from raydream.cluster.connection import check_address
from serve import pulse
from serve.actors import look_after_supervisor
from serve.api import build_api
from serve.keys import Keys
from serve.listener import GRACE_S, Listener
from serve.settings import PREFIX, Settings

_MAX_ONGOING = 1000  # most of them event streams
# Processes of a machine that computes on all its cores answer late; Ray Serve gives up on its proxy after 5 s.
_PATIENCE_S = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
# Ray's workers stand back by 15; who answers does not, so that no answer waits for a step of a generation.
_PRIORITY = {"env_vars": {"RAY_worker_niceness": "0"}}
_HEAD = {"node:__internal_head__": 0.001}


class Replica:
    """One process that answers requests. It may come and go: what is accepted is in the record."""

    def __init__(self, settings: Settings, owner: str, is_closed: bool) -> None:
        self._settings, self._owner, self._is_closed = settings, owner, is_closed
        pulse.end_with_node(GRACE_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        look_after = partial(look_after_supervisor, self._settings, self._owner)
        return build_api(self._settings, look_after, pulse.of_worker(), self._is_closed)


def app(arguments: dict[str, str]) -> Application:
    """The application for ``serve run``, behind Ray Serve's own proxies; ``arguments`` are settings by name
    (``max_n=4``), before the environment's.

    Leaves with an error in a line where ``RAY_ADDRESS`` names no cluster. Sets the patience of a Ray that this process
    has yet to start, where the environment says nothing about it.
    """
    given = {PREFIX + name.upper(): value for name, value in arguments.items()}
    settings = Settings.from_environment(dict(os.environ) | given)
    try:
        check_address()
    except ValueError as error:  # Ray's own words are a traceback, after a quarter of an hour
        raise SystemExit(f"error: {error}") from error
    for name, seconds in _PATIENCE_S.items():
        os.environ.setdefault(name, seconds)
    return _deployed(serve.ingress()(Replica), settings, "", {})


def listening(settings: Settings, owner: str) -> Application:
    """The application that listens at the settings' address, on the head node; ``owner`` holds the record's lease."""
    return _deployed(Listener, settings, owner, _HEAD)


def _deployed(replica: type, settings: Settings, owner: str, resources: dict[str, float]) -> Application:
    options: dict[str, Any] = {"num_cpus": 0, "resources": resources, "runtime_env": _PRIORITY}
    deployment = serve.deployment(
        name="raydream",
        num_replicas=settings.num_replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options=options,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        logging_config={"enable_access_log": False},  # a line for each poll is no news; /metrics counts them
    )
    # Whether keys are asked for is settled here: a replica that comes later may find their file gone.
    return deployment(replica).bind(settings, owner, Keys(settings.keys_file).are_needed)
