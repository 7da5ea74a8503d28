"""Requests made up from the service's own OpenAPI: no failure inside, and no answer that the description lacks."""

import multiprocessing
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service_cases import CHAIR, small_settings

from serve.api import build_api
from serve.supervisor import SupervisorHealth

pytestmark = pytest.mark.slow

FEW = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def serve(folder: Path, told: Connection) -> None:
    """The service without Ray on a port of its own, until it is terminated; tells its address when it is up."""
    api = build_api(small_settings(folder, unfinished_per_key=5), lambda: SupervisorHealth(0.0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
        uvicorn.Server(uvicorn.Config(api, log_level="error")).run(sockets=[listener])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service with a few generations in its record.

    In a process of its own: Hypothesis parses sources, which fails in Python 3.11 ("AST constructor recursion depth
    mismatch") where anything else parses meanwhile, as the print of a traceback does.
    """
    context = multiprocessing.get_context("spawn")
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(tmp_path_factory.mktemp("fuzz"), told), daemon=True)
    process.start()
    told.close()
    assert heard.poll(120), "the service did not start"
    url = heard.recv()
    with httpx.Client(base_url=url, timeout=60) as client:
        for seed in range(3):
            client.post("/v1/generations", json=CHAIR | {"seed": seed}).raise_for_status()
    yield url
    process.terminate()
    process.join(30)
    assert not process.is_alive()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_breaks_it(address: str, mode: GenerationMode) -> None:
    """Valid requests by the description, and such as break it."""
    description, num_operations = schemathesis.openapi.from_url(f"{address}/openapi.json"), 0
    for operation in (found.ok() for found in description.get_all_operations()):

        @given(case=operation.as_strategy(generation_mode=mode))
        @FEW
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        if mode is GenerationMode.POSITIVE or operation.body or next(operation.iter_parameters(), None):
            check()
            num_operations += 1
    assert num_operations >= 10
