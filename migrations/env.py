"""Alembic environment of `outbox migrate`: the version table lives inside the outbox's own schema.

Run by `outbox.operate.migrate`, which hands over the schema's name and, unless it only prints SQL, the connection.
"""

from alembic import context
from psycopg import sql

from outbox.postgres.heritage import disinherit_script

schema: str = context.config.attributes["schema"]
connection = context.config.attributes.get("connection")
target = {"connection": connection} if connection is not None else {"dialect_name": "postgresql", "literal_binds": True}

context.configure(**target, version_table="alembic_version", version_table_schema=schema, include_schemas=True)
with context.begin_transaction():
    if connection is None:  # whatever role and tool run it, and nothing is left behind
        context.execute(disinherit_script())
    # The version table is made before the first revision runs, and needs the schema.
    context.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)).as_string())
    context.run_migrations(schema=schema)
