"""What most tests of the service begin with: an empty database, settings of a small service, a client of it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from fastapi.testclient import TestClient
from service_cases import client_of, records_of, small_settings

from serve.records import Records
from serve.settings import Settings

POSTGRES = "RAYDREAM_TEST_POSTGRES"  # a SQLAlchemy URL of an empty database, where there is one


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.sqlite3'}"
    if POSTGRES not in os.environ:
        pytest.skip(f"{POSTGRES} names no database")
    engine = sqlalchemy.create_engine(os.environ[POSTGRES])
    with engine.begin() as connection:
        for table in ("generations", "owners", "leases"):
            connection.execute(sqlalchemy.text(f"DROP TABLE IF EXISTS {table}"))
    engine.dispose()
    return os.environ[POSTGRES]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small_settings(tmp_path)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with client_of(settings) as client:
        yield client


@pytest.fixture
def records(settings: Settings) -> Records:
    return records_of(settings)
