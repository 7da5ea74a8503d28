"""The tables of the service's database. There is no migration: what is added here has a table of its own."""

import sqlalchemy as sa

METADATA = sa.MetaData()
OWNERS = sa.Table(
    "owners",
    METADATA,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("num_posts", sa.Integer, nullable=False, default=0),
)
GENERATIONS = sa.Table(
    "generations",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(100), sa.ForeignKey("owners.name"), nullable=False),
    sa.Column("idempotency_key", sa.String(200)),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("preset", sa.String(64), nullable=False),
    sa.Column("method", sa.String(16), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("steps", sa.Integer),
    sa.Column("num_steps", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("num_stalls", sa.Integer, nullable=False, default=0),
    sa.Column("furthest_step", sa.Integer, nullable=False, default=0),
    sa.Column("step", sa.Integer, nullable=False, default=0),
    sa.Column("phase", sa.Text, nullable=False, default=""),
    sa.Column("eta_s", sa.Float),
    sa.Column("losses", sa.JSON, nullable=False),
    sa.Column("preview_step", sa.Integer),
    sa.Column("meshes", sa.JSON, nullable=False),
    sa.Column("error_title", sa.Text),
    sa.Column("error_detail", sa.Text),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
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
