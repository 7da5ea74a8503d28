"""Requests made up from the service's own OpenAPI: no failure inside, and no answer that the description lacks."""

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # not later, beside a service that imports: Python 3.11 parses in one thread
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

FEW = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service without Ray on a port of its own, with a few generations in its record."""
    api = build_api(small_settings(tmp_path_factory.mktemp("fuzz"), unfinished_per_key=5), lambda: 0.0)
    server = uvicorn.Server(uvicorn.Config(api, "127.0.0.1", 0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=60) as client:
        for seed in range(3):
            client.post("/v1/generations", json=CHAIR | {"seed": seed}).raise_for_status()
    yield url
    server.should_exit = True
    thread.join(30)


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
