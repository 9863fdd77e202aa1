"""Schema version 1: events, transactions, streams, relay, limits, the sealing trigger."""

from alembic import op

from outbox import schema as outbox_schema

revision = "0001"
down_revision = None


def upgrade(schema: str) -> None:
    outbox_schema.upgrade(op, to=1, since=0, schema=schema)


def downgrade(schema: str) -> None:
    outbox_schema.downgrade(op, to=0, since=1, schema=schema)
