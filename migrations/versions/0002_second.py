"""Schema version 2: housekeeping, streams that are retired, which relays a schema suits, and a seal that counts all."""

from alembic import op

from outbox import schema as outbox_schema

revision = "0002"
down_revision = "0001"


def upgrade(schema: str) -> None:
    outbox_schema.upgrade(op, to=2, since=1, schema=schema)


def downgrade(schema: str) -> None:
    outbox_schema.downgrade(op, to=1, since=2, schema=schema)
