"""The schema: up, down and up again, drift, printed SQL, and an application's own Alembic history."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import schema
from outbox.embedded import Postgres
from outbox.errors import Misconfigured
from outbox.operate import migrate
from outbox.operate.status import status
from tests.support.bed import rows, value
from tests.support.servers import fingerprint, numbers

pytestmark = pytest.mark.core

FORGED = """
CREATE OR REPLACE FUNCTION outbox.header_bytes(headers jsonb) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'
"""
COLUMNS = """
SELECT column_name FROM information_schema.columns WHERE table_schema = 'outbox' AND table_name = %s
 ORDER BY ordinal_position
"""


@pytest.fixture
def empty(two_phase_postgres: Postgres) -> str:
    """URL of an empty database on each PostgreSQL."""
    name = f"empty_{next(numbers)}"
    rows(two_phase_postgres.url(), f"CREATE DATABASE {name} TEMPLATE template0")
    return two_phase_postgres.url(name)


def everything(url: str) -> set[str]:
    """Every relation, function and type of anybody's in the database."""
    catalogs = ("pg_class:relname:relnamespace", "pg_proc:proname:pronamespace", "pg_type:typname:typnamespace")
    found = set()
    for each in catalogs:
        catalog, name, home = each.split(":")
        query = f"SELECT {name}::text FROM {catalog} WHERE {home}::regnamespace::text !~ '^(pg_|information_schema)'"
        found |= {f"{catalog} {row[0]}" for row in rows(url, query)}
    return found | {f"schema {row[0]}" for row in rows(url, "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'")}


@pytest.mark.parametrize("name", ["outbox", "order"])
def test_up_down_and_up_again_leaves_no_difference(empty: str, name: str) -> None:
    before = everything(empty)
    assert migrate.migrate(empty, name) == (0, 2)
    assert migrate.migrate(empty, name) == (2, 2)
    first = fingerprint(empty, name)
    assert migrate.migrate(empty, name, to=0) == (2, 0)
    assert everything(empty) == before
    assert migrate.migrate(empty, name) == (0, 2)
    assert fingerprint(empty, name) == first
    assert migrate.problems(empty, name) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("ALTER TABLE outbox.transactions DROP CONSTRAINT transactions_have_events", "transactions_have_events"),
        ("DROP INDEX outbox.transactions_dead", "transactions_dead"),
        ("ALTER TABLE outbox.events DISABLE TRIGGER seal", "seal"),
        ("ALTER TABLE outbox.events ALTER COLUMN id SET CACHE 5", "cache 5"),
        ("ALTER TABLE outbox.events ADD COLUMN more text", "more"),
        (FORGED, "header_bytes"),
    ],
)
def test_drift_is_named(database: str, change: str, found: str) -> None:
    assert migrate.problems(database) == []
    rows(database, change)
    assert any(found in problem for problem in migrate.problems(database))


UNCOMMENTED = """
DO $$ DECLARE each record; BEGIN
  FOR each IN SELECT relname, relkind FROM pg_class
               WHERE relnamespace = 'outbox'::regnamespace AND relkind IN ('r', 'v') LOOP
    EXECUTE format('COMMENT ON %s outbox.%I IS NULL', CASE each.relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
                   each.relname);
  END LOOP;
END $$
"""
COMMENTS = "SELECT objoid::regclass::text, description FROM pg_description WHERE classoid = 'pg_class'::regclass"


@pytest.mark.parametrize("version", [1, 2])
def test_restored_without_comments(empty: str, version: int) -> None:
    """The comment that tells the version is gone; the history of `outbox migrate` tells it, which puts it back."""
    migrate.migrate(empty)
    before = set(rows(empty, COMMENTS))
    migrate.migrate(empty, to=version)
    rows(empty, UNCOMMENTED)
    with pytest.raises(Misconfigured, match="does not tell its version") as refused:
        status(empty)
    assert refused.value.remedy.startswith("outbox migrate")
    assert "comment on outbox.events" in migrate.problems(empty)[0]
    assert migrate.migrate(empty) == (version, 2)
    assert set(rows(empty, COMMENTS)) == before
    assert migrate.problems(empty) == []
    assert status(empty).schema_version == 2


@pytest.mark.parametrize("version", [1, 2])
def test_restored_without_comments_or_a_history(empty: str, version: int) -> None:
    """An application's own Alembic history made it: the words are the statement that puts the comment back."""
    for each in range(1, version + 1):
        for statement in schema.statements(each, "up"):
            rows(empty, statement)
    rows(empty, UNCOMMENTED)
    with pytest.raises(Misconfigured, match="cannot be told") as refused:
        migrate.migrate(empty)
    rows(empty, refused.value.remedy.partition(": ")[2])
    with psycopg.connect(empty) as connection:
        assert migrate.installed(connection, "outbox") == version
    assert not rows(empty, "SELECT 1 FROM pg_namespace WHERE nspname LIKE 'outbox\\_%'")


def test_behind_is_named(empty: str) -> None:
    assert migrate.problems(empty) == ["schema outbox is at version 0, not 2: outbox migrate"]


def test_printed_sql_makes_the_same_schema(empty: str, database: str) -> None:
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute(migrate.migration_sql().encode())
    assert migrate.problems(empty) == []


def test_unknown_version_is_refused(database: str) -> None:
    with pytest.raises(Misconfigured, match="no schema version 99"):
        migrate.migrate(database, to=99)


@pytest.mark.parametrize("name", ["Outbox", "a-b", "", "x" * 49, 'a"b', "pg_outbox", "1a"])
def test_unusable_schema_names_are_refused(name: str) -> None:
    with pytest.raises(Misconfigured, match="not usable"):
        schema.checked_name(name)


ENV = """
import sqlalchemy as sa
from alembic import context
from outbox.schema import register
metadata = sa.MetaData()
sa.Table("orders", metadata, sa.Column("id", sa.BigInteger, primary_key=True))
register(metadata, "{schema}")
engine = sa.create_engine("{url}", poolclass=sa.NullPool)
if context.is_offline_mode():
    context.configure(url="{url}", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=metadata, include_schemas=True,
                          compare_type=True, compare_server_default=True)
        with context.begin_transaction():
            context.run_migrations()
"""
MAKO = """
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
from alembic import op
import sqlalchemy as sa
def upgrade():
    ${upgrades if upgrades else "pass"}
def downgrade():
    ${downgrades if downgrades else "pass"}
"""
REVISION = """
revision = "a1"
down_revision = None
from alembic import op
import sqlalchemy as sa
from outbox import schema
def upgrade():
    op.create_table("orders", sa.Column("id", sa.BigInteger, primary_key=True))
    schema.upgrade(op, to=1, schema="{schema}")
def downgrade():
    schema.downgrade(op, to=0, since=1, schema="{schema}")
    op.drop_table("orders")
"""
NEXT_REVISION = """
revision = "a2"
down_revision = "a1"
from alembic import op
from outbox import schema
def upgrade():
    schema.upgrade(op, to=2, since=1, schema="{schema}")
def downgrade():
    schema.downgrade(op, to=1, since=2, schema="{schema}")
"""


class Application:
    """A sample application with its own Alembic history."""

    def __init__(self, directory: Path, url: str, name: str) -> None:
        self.directory = directory
        (directory / "versions").mkdir(parents=True)
        sqlalchemy_url = url.replace("postgresql://", "postgresql+psycopg://")
        (directory / "env.py").write_text(ENV.replace("{schema}", name).replace("{url}", sqlalchemy_url))
        (directory / "script.py.mako").write_text(MAKO)
        (directory / "versions" / "a1_first.py").write_text(REVISION.replace("{schema}", name))
        (directory / "versions" / "a2_second.py").write_text(NEXT_REVISION.replace("{schema}", name))
        (directory / "alembic.ini").write_text(f"[alembic]\nscript_location = {directory}\npath_separator = os\n")

    def alembic(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-W",
            "error::sqlalchemy.exc.SAWarning",
            "-m",
            "alembic",
            "-c",
            str(self.directory / "alembic.ini"),
        ]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.mark.parametrize("name", ["outbox", "order"])
def test_application_with_its_own_history(empty: str, tmp_path: Path, name: str) -> None:
    before = everything(empty)
    application = Application(tmp_path / "app", empty, name)
    application.alembic("upgrade", "head")
    assert migrate.problems(empty, name) == []
    assert value(empty, "SELECT version_num FROM alembic_version") == "a2"
    # The next autogenerate is empty: our tables are neither dropped nor made again.
    application.alembic("check")
    with pytest.raises(Misconfigured, match="own Alembic history"):
        migrate.migrate(empty, name)
    application.alembic("downgrade", "base")
    assert everything(empty) - before == {
        "pg_class alembic_version",
        "pg_class alembic_version_pkc",
        "pg_type alembic_version",
        "pg_type _alembic_version",
    }
    application.alembic("upgrade", "head")
    assert migrate.problems(empty, name) == []


def test_applications_history_prints_the_same_sql(empty: str, tmp_path: Path) -> None:
    application = Application(tmp_path / "app", empty, "outbox")
    printed = application.alembic("upgrade", "head", "--sql").stdout
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute(printed.encode())
    assert migrate.problems(empty) == []


def test_tables_fit_what_the_database_has(database: str) -> None:
    import sqlalchemy as sa

    from outbox.schema import register

    metadata = sa.MetaData()
    made: dict[str, Any] = register(metadata)
    with psycopg.connect(database) as connection:
        for name, table in made.items():
            found = connection.execute(COLUMNS, [name])
            assert [c for (c,) in found] == [column.name for column in table.columns]
