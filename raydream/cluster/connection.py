"""How a process comes to a Ray cluster: it joins the one that ``RAY_ADDRESS`` names, or starts one for itself alone."""

import logging
import os
import secrets
import socket

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]  # made at import
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError, RayError

ADDRESS = "RAY_ADDRESS"
_ANSWER_S = 15.0
_CLIENT = "ray://"  # a driver outside of the cluster; the port is another program's
_TOKEN = (
    "the cluster asks for a token and got none, or another one; export RAY_AUTH_MODE=token, with the cluster's token "
    "in ~/.ray/auth_token or RAY_AUTH_TOKEN"
)
# Views and gradients of a step travel inside the calls instead of through the object store: a fifth less overhead.
_SMALL_MESSAGES = {"max_direct_call_object_size": 2**20, "task_rpc_inlined_bytes_limit": 100 * 2**20}


def connect() -> None:
    """Joins the cluster that this job runs in, or starts one for this process alone, without a dashboard.

    ``ValueError`` naming ``RAY_ADDRESS`` where no cluster answers there or lets this process in.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a lost actor's other calls fail too; one is enough said
    address = check_address()
    if not address:
        _start_own()
        return
    try:
        ray.init(log_to_driver=True)
    except AuthenticationError as error:
        raise ValueError(f"{ADDRESS}={address}: {_TOKEN}") from error
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ValueError(f"{ADDRESS}={address}: this process cannot join the Ray cluster there: {error}") from error


def check_address() -> str:
    """What ``RAY_ADDRESS`` says, once a cluster has answered there; empty where a process should start its own.

    Ray itself tries for a quarter of an hour. ``ValueError`` as in ``connect``, within seconds.
    """
    address = os.environ.get(ADDRESS, "")
    if address in ("", "local") or ray.is_initialized():
        return "" if address == "local" else address
    try:
        host_port = address.removeprefix(_CLIENT).partition("?")[0]
        if address == host_port:
            host_port = canonicalize_bootstrap_address_or_die(address)
        host, _, port = host_port.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        if not address.startswith(_CLIENT):
            _ask(host_port)
    except AuthenticationError as error:
        raise ValueError(f"{ADDRESS}={address}: {_TOKEN}") from error
    except (ValueError, OSError, grpc.RpcError) as error:
        raise ValueError(_nobody(address, error)) from error
    return address


def _ask(host_port: str) -> None:
    with init_grpc_channel(host_port) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError(error.details()) from error
            raise


def _nobody(address: str, error: Exception) -> str:
    why = error.code().name if isinstance(error, grpc.RpcError) else str(error)
    return (
        f"{ADDRESS}={address}: no Ray cluster answers there ({why}); "
        "name the host:port of a head (see `ray start --head`), or unset it to run on this machine alone"
    )


def _start_own() -> None:
    # A secret of its own, which goes to nobody else: a token that Ray made would stay in ~/.ray/auth_token, and lock
    # the next `ray start --head` for those who do not know of it.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",  # without it Ray would join whatever cluster somebody started on this machine
        include_dashboard=False,
        log_to_driver=True,
        object_store_memory=256 * 2**20,
        logging_level=logging.WARNING,
        _system_config=_SMALL_MESSAGES,
    )
