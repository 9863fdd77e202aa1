"""The database schema of an outbox: DDL by version as plain SQL, its tables for SQLAlchemy, grants, migration helpers.

The door of the migration tooling. Everything here is text or metadata: nothing connects. The statements of version N
are `ddl/000N_up.sql` and `ddl/000N_down.sql`; the schema's name is composed into them as an identifier.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from importlib import resources
from typing import Any, Protocol

import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.dialects import postgresql

from outbox.errors import Misconfigured

VERSION = 1
DEFAULT_SCHEMA = "outbox"

# First keys of the two-integer advisory locks: one constant per purpose; the second key tells the schemas apart.
LEADER_LOCK = 0x0B0C_0001
AWAKE_LOCK = 0x0B0C_0002

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,47}")


def checked_name(schema: str) -> str:
    """The name itself, or `Misconfigured`: lower-case letters, digits, underscores, at most 48, no leading digit."""
    if not _NAME.fullmatch(schema) or schema.startswith("pg_"):
        raise Misconfigured(
            f"schema name {schema!r} is not usable",
            remedy="use 1 to 48 lower-case letters, digits and underscores, not beginning with a digit or pg_",
        )
    return schema


def lock_key(schema: str) -> int:
    """Second key of this outbox's advisory locks, a signed 32-bit integer."""
    unsigned = zlib.crc32(schema.encode())
    return unsigned - (1 << 32) if unsigned >= 1 << 31 else unsigned


def channel(schema: str) -> str:
    """Name of the notification channel on which a sleeping relay is woken."""
    return f"outbox_{schema}"


def statements(version: int, direction: str, schema: str = DEFAULT_SCHEMA) -> Iterator[str]:
    """The SQL statements that go from version-1 to version (`direction` "up") or back ("down"), ready to execute."""
    checked_name(schema)
    text = resources.files("outbox").joinpath("ddl", f"{version:04}_{direction}.sql").read_text()
    names = {
        "schema": sql.Identifier(schema),
        "literal": sql.Literal(schema),
        "limits": sql.Literal(f"{schema}.limits"),
        "channel": sql.Literal(channel(schema)),
        "key": sql.Literal(lock_key(schema)),
        "awake": sql.Literal(AWAKE_LOCK),
        **{name: sql.Literal(f"outbox.{schema}_{name}") for name in ("added", "sealed", "place")},
    }
    for part in re.split(r";\n(?:\n|\Z)", text):
        if statement := re.sub(r"\A(--.*\n|\s)*", "", part):
            yield sql.SQL(statement).format(**names).as_string()


class Operations(Protocol):
    """What the functions below need of Alembic's `op`."""

    def execute(self, sqltext: Any, /) -> Any: ...


def upgrade(op: Operations, *, to: int = VERSION, since: int = 0, schema: str = DEFAULT_SCHEMA) -> None:
    """Create the outbox, or bring it from version `since` to `to`, within an application's own Alembic revision.

    `op` is Alembic's `op`; works offline (`--sql`) too. Does not commit: the revision does.
    """
    for version in range(since + 1, to + 1):
        _execute(op, statements(version, "up", schema))


def downgrade(op: Operations, *, to: int = 0, since: int = VERSION, schema: str = DEFAULT_SCHEMA) -> None:
    """Take the outbox back from version `since` to `to`; 0 removes it with all its events. Does not commit."""
    for version in range(since, to, -1):
        _execute(op, statements(version, "down", schema))


def _execute(op: Operations, texts: Iterator[str]) -> None:
    for text in texts:
        op.execute(sa.text(text.replace(":", "\\:")))


def grants(
    schema: str = DEFAULT_SCHEMA,
    *,
    application: str | None = None,
    relay: str | None = None,
    operator: str | None = None,
) -> Iterator[str]:
    """GRANT statements that give existing roles the least they need; run them as the owner of the schema."""
    checked_name(schema)
    wanted = {"application": application, "relay": relay, "operator": operator}
    for kind, role in wanted.items():
        if role is not None:
            for statement in _GRANTS[kind]:
                names = {"schema": sql.Identifier(schema), "role": sql.Identifier(role)}
                yield sql.SQL(statement).format(**names).as_string()


_GRANTS = {
    "application": (
        "GRANT USAGE ON SCHEMA {schema} TO {role}",
        "GRANT INSERT (message_id, subject, headers, payload) ON {schema}.events TO {role}",
        "GRANT EXECUTE ON FUNCTION {schema}.add(text, bytea, jsonb, uuid), {schema}.add(text, text, jsonb, uuid), "
        "{schema}.add(text, jsonb, jsonb, uuid) TO {role}",
    ),
    "relay": (
        "GRANT USAGE ON SCHEMA {schema} TO {role}",
        "GRANT SELECT, DELETE ON {schema}.events TO {role}",
        "GRANT SELECT, DELETE ON {schema}.transactions TO {role}",
        "GRANT UPDATE (sent_at, stream, first_sequence, last_sequence, dead_at, dead_reason, attempts) "
        "ON {schema}.transactions TO {role}",
        "GRANT SELECT, INSERT, UPDATE ON {schema}.streams TO {role}",
        "GRANT SELECT, UPDATE ON {schema}.relay TO {role}",
        "GRANT SELECT ON {schema}.limits, {schema}.pending, {schema}.dead TO {role}",
    ),
    "operator": (
        "GRANT USAGE ON SCHEMA {schema} TO {role}",
        "GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}",
        "GRANT UPDATE (dead_at, dead_reason, discarded_at) ON {schema}.transactions TO {role}",
        "GRANT UPDATE ON {schema}.relay, {schema}.streams, {schema}.limits TO {role}",
        "GRANT DELETE ON {schema}.streams TO {role}",
    ),
}


class XID8(sa.types.UserDefinedType[str]):
    """PostgreSQL's 64-bit transaction id."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


def tables(metadata: sa.MetaData, schema: str = DEFAULT_SCHEMA) -> dict[str, sa.Table]:
    """Register the outbox's tables in `metadata`, so that an application's autogenerate knows and leaves them alone.

    Also teaches SQLAlchemy's reflection the type xid8. The tables are for autogenerate and for queries; the triggers,
    functions and checks come from `upgrade` alone, so never `create_all` them.
    """
    checked_name(schema)
    from sqlalchemy.dialects.postgresql import base

    base.ischema_names.setdefault("xid8", XID8)
    now, clock = sa.text("now()"), sa.text("clock_timestamp()")
    zero, bigint, text = sa.text("0"), sa.BigInteger, sa.Text
    time = sa.DateTime(timezone=True)

    def identity() -> sa.Identity:
        return sa.Identity(always=True, cache=1)

    def singleton() -> sa.Column[bool]:
        return sa.Column("singleton", sa.Boolean, server_default=sa.text("true"), primary_key=True)

    def number(name: str, default: str | None = None, *, nullable: bool = False) -> sa.Column[int]:
        server_default = sa.text(default) if default is not None else None
        return sa.Column(name, bigint, server_default=server_default, nullable=nullable)

    uuid_default = sa.text("gen_random_uuid()")
    events = sa.Table(
        "events",
        metadata,
        sa.Column("txid", XID8, server_default=sa.text("pg_current_xact_id()"), primary_key=True),
        sa.Column("id", bigint, identity(), primary_key=True),
        sa.Column("message_id", sa.Uuid, server_default=uuid_default, nullable=False),
        sa.Column("subject", text, nullable=False),
        sa.Column("headers", postgresql.JSONB),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("created_at", time, server_default=now, nullable=False),
        schema=schema,
        comment="outbox schema version 1. One row per event; append-only.",
    )
    transactions = sa.Table(
        "transactions",
        metadata,
        sa.Column("position", bigint, identity(), primary_key=True),
        sa.Column("txid", XID8, nullable=False),
        sa.Column("event_count", sa.Integer, nullable=False),
        sa.Column("sealed_at", time, server_default=clock, nullable=False),
        sa.Column("attempts", sa.Integer, server_default=zero, nullable=False),
        sa.Column("sent_at", time),
        sa.Column("stream", text),
        number("first_sequence", nullable=True),
        number("last_sequence", nullable=True),
        sa.Column("dead_at", time),
        sa.Column("dead_reason", text),
        sa.Column("discarded_at", time),
        sa.Index("transactions_txid", "txid"),
        sa.Index("transactions_dead", "position", postgresql_where=sa.text("dead_at IS NOT NULL")),
        schema=schema,
        comment="One row per transaction that added events, in commit order; written at commit.",
    )
    streams = sa.Table(
        "streams",
        metadata,
        sa.Column("name", text, primary_key=True),
        sa.Column("created", text, nullable=False),
        sa.Column("mode", text, server_default=sa.text("'chained'"), nullable=False),
        number("last_sequence"),
        number("plan_base", nullable=True),
        sa.Column("plan", postgresql.ARRAY(bigint), server_default=sa.text("ARRAY[]::bigint[]"), nullable=False),
        number("sent_transactions", "0"),
        number("sent_events", "0"),
        sa.Column("blocked", text),
        sa.Column("blocked_since", time),
        schema=schema,
        comment="One row per stream that this outbox publishes to: identity, mode, place, plan.",
    )
    relay = sa.Table(
        "relay",
        metadata,
        singleton(),
        sa.Column("outbox_id", sa.Uuid, server_default=uuid_default, nullable=False),
        number("system_identifier", nullable=True),
        number("epoch", "0"),
        sa.Column("leader", text),
        sa.Column("leader_since", time),
        number("cursor", "0"),
        sa.Column(
            "open_positions",
            postgresql.INT8MULTIRANGE,
            server_default=sa.text("int8multirange()"),
            nullable=False,
        ),
        sa.Column("blocked", text),
        sa.Column("blocked_since", time),
        schema=schema,
        comment="One row: who this outbox is, who leads, and how far it has read.",
    )
    limits = sa.Table(
        "limits",
        metadata,
        singleton(),
        *(
            sa.Column(name, sa.Integer, server_default=sa.text(default), nullable=False)
            for name, default in (
                ("max_event_bytes", "1000000"),
                ("max_header_bytes", "61440"),
                ("max_transaction_events", "1000"),
            )
        ),
        schema=schema,
        comment="One row: what an application may add. Changed by UPDATE; the triggers read it.",
    )
    return {table.name: table for table in (events, transactions, streams, relay, limits)}


def version_of(comment: str | None) -> int:
    """The schema version that the comment on the table `events` tells; 0 if there is none."""
    found = re.match(r"outbox schema version (\d+)\.", comment or "")
    return int(found.group(1)) if found else 0
