"""The tables of the service's database. There is no migration: what is added here has a table of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import sqlalchemy as sa

METADATA = sa.MetaData()
OWNERS = sa.Table(
    "owners",
    METADATA,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("num_posts", sa.Integer, nullable=False, default=0),
)


@dataclass(frozen=True)
class Record:
    """One generation as it stands, and its row. Times are seconds since 1970, ``meshes`` the particles with one."""

    id: Annotated[str, sa.String(32)]
    owner: Annotated[str, sa.String(100), sa.ForeignKey("owners.name")]
    idempotency_key: Annotated[str | None, sa.String(200)]
    request_digest: Annotated[str, sa.String(64)]
    prompt: Annotated[str, sa.Text]
    n: Annotated[int, sa.Integer]
    preset: Annotated[str, sa.String(64)]
    method: Annotated[str, sa.String(16)]
    seed: Annotated[int, sa.BigInteger]
    steps: Annotated[int | None, sa.Integer]
    num_steps: Annotated[int, sa.Integer]
    state: Annotated[str, sa.String(16)]
    attempt: Annotated[int, sa.Integer]
    num_stalls: Annotated[int, sa.Integer]
    furthest_step: Annotated[int, sa.Integer]
    step: Annotated[int, sa.Integer]
    phase: Annotated[str, sa.Text]
    eta_s: Annotated[float | None, sa.Float]
    losses: Annotated[dict[str, float], sa.JSON]
    preview_step: Annotated[int | None, sa.Integer]
    meshes: Annotated[list[int], sa.JSON]
    error_title: Annotated[str | None, sa.Text]
    error_detail: Annotated[str | None, sa.Text]
    created_at: Annotated[float, sa.Float]
    started_at: Annotated[float | None, sa.Float]
    ended_at: Annotated[float | None, sa.Float]


def _columns(row: type) -> Iterator[sa.Column[Any]]:
    for name, hint in get_type_hints(row, include_extras=True).items():
        kind, *arguments = get_args(hint)
        yield sa.Column(name, *arguments, primary_key=name == "id", nullable=type(None) in get_args(kind))


GENERATIONS = sa.Table(
    "generations",
    METADATA,
    *_columns(Record),
    sa.UniqueConstraint("owner", "idempotency_key"),
    sa.Index("by_owner", "owner", "created_at", "id"),
    sa.Index("by_state", "state"),
)
LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("name", sa.String(16), primary_key=True),
    sa.Column("owner", sa.String(100), nullable=False),  # empty: nobody
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("since", sa.Float, nullable=False),
    sa.Column("beat_at", sa.Float, nullable=False),
)
