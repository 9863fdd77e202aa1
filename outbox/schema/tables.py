"""The outbox's tables for SQLAlchemy: so that an application's autogenerate neither drops nor re-creates them.

Metadata only, for `outbox.schema.register`; the triggers, functions and checks come from `outbox.schema.upgrade` alone.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import base

from outbox.schema import checked_name, events_comment


class XID8(sa.types.UserDefinedType[str]):
    """PostgreSQL's 64-bit transaction id."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:  # noqa: D102 - SQLAlchemy's interface
        return "xid8"


def described(metadata: sa.MetaData, schema: str) -> dict[str, sa.Table]:
    """Put the outbox's tables into `metadata`; see `outbox.schema.register`. Returns them by name."""
    checked_name(schema)
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
        comment=events_comment(),
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
        sa.Column("retried_at", time),
        number("replay_of", nullable=True),
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
        sa.Column(
            "plan",
            postgresql.ARRAY(postgresql.INT8RANGE),
            server_default=sa.text("ARRAY[]::int8range[]"),
            nullable=False,
        ),
        number("sent_transactions", "0"),
        number("sent_events", "0"),
        sa.Column("blocked", text),
        sa.Column("blocked_since", time),
        sa.Column("retired_at", time),
        sa.Column(
            "fences",
            postgresql.JSONB,
            comment="Where others write too: by position, the subject and its last sequence that fence a head.",
        ),
        sa.Column("sharing", text, comment="What other writers cost, where they cost much."),
        schema=schema,
        comment="One row per stream that this outbox publishes to: identity, mode, place, plan.",
    )
    relay = sa.Table(
        "relay",
        metadata,
        singleton(),
        sa.Column("outbox_id", sa.Uuid, server_default=uuid_default, nullable=False),
        sa.Column("former_ids", postgresql.ARRAY(sa.Uuid), server_default=sa.text("ARRAY[]::uuid[]"), nullable=False),
        number("system_identifier", nullable=True),
        sa.Column("database_oid", postgresql.OID),
        number("timeline", nullable=True),
        number("epoch", "0"),
        sa.Column("leader", text),
        sa.Column("leader_since", time),
        sa.Column("deaths", sa.Integer, server_default=zero, nullable=False),
        number("suspect", nullable=True),
        sa.Column("last_death", sa.Text),
        number("blamed", nullable=True),
        number("cursor", "0"),
        sa.Column(
            "open_positions",
            postgresql.INT8MULTIRANGE,
            server_default=sa.text("int8multirange()"),
            nullable=False,
        ),
        sa.Column("retried", postgresql.INT8MULTIRANGE, server_default=sa.text("int8multirange()"), nullable=False),
        number("purged", "0"),
        sa.Column("blocked", text),
        sa.Column("blocked_since", time),
        sa.Column("paused_at", time),
        sa.Column("paused_why", text),
        sa.Column(
            "suits_from",
            sa.Integer,
            server_default=sa.text("2"),
            nullable=False,
            comment="Relays that were written for this schema version, or a later one, can work with it.",
        ),
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
    housekeeping = sa.Table(
        "housekeeping",
        metadata,
        singleton(),
        number("purged", "0"),
        number("stray_events", "0"),
        sa.Column("drift", text),
        sa.Column("failing", text),
        sa.Column("failing_since", time),
        schema=schema,
        comment="One row: what the purge and the search for strays and drift came to, beside the relay.",
    )
    parts = sa.Table(
        "parts",
        metadata,
        sa.Column("position", bigint, primary_key=True, autoincrement=False),
        sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("stream", text, nullable=False),
        sa.Column("numbers", postgresql.ARRAY(sa.Integer), nullable=False),
        sa.Column("sent_at", time),
        number("first_sequence", nullable=True),
        number("last_sequence", nullable=True),
        sa.Column("dead_at", time),
        sa.Column("dead_reason", text),
        sa.Column("discarded_at", time),
        sa.Column("moves", sa.Boolean, server_default=sa.text("false"), nullable=False),
        sa.UniqueConstraint("position", "stream", name="parts_one_a_stream"),
        sa.Index("parts_dead", "position", postgresql_where=sa.text("dead_at IS NOT NULL")),
        schema=schema,
        comment="The parts of each transaction over several streams: their events by number, and what became of them.",
    )
    return {table.name: table for table in (events, transactions, streams, relay, limits, housekeeping, parts)}
