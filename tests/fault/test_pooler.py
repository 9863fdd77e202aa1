"""A pooler in front of Postgres: in session mode it works, in transaction mode it is refused with the remedy."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg

from outbox.config import Settings
from outbox.doctor import examine as doctor
from outbox.doctor.check import Colour
from outbox.embedded import Nats, Postgres
from outbox.errors import Misconfigured
from outbox.operate.status import status
from tests.support.bed import Broker, ProcessRelay, ThreadRelay, rows, until, value
from tests.support.commands import outbox
from tests.support.pooler import pooler
from tests.support.servers import Stream
from tests.support.spoilt import TRAPS, spoil, whole, wrongly

COMMANDS = (
    "migrate",
    "migrate --check",
    "status",
    "show 1",
    "dead list",
    "dead retry 3 --yes",
    "pause",
    "resume",
    "replay --from 1 --to 3 --yes",
    "verify",
    "rebase --yes",
    "purge",
)
PERSONAL = ("application_name", "client_encoding", "TimeZone")  # PgBouncer keeps these for each client


def settings_of(url: str) -> dict[str, str]:
    """What an application's connection has; without an operator or a function that could be trapped."""
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT name, setting FROM pg_catalog.pg_settings").fetchall()
    return {name: setting for name, setting in found if name not in PERSONAL}


def test_transaction_mode_is_refused(
    postgres: Postgres, database: str, nats: Nats, stream: Stream, workplace: Path
) -> None:
    """Fault: session locks that hold nothing. Promise: refused at the start, before anything is published."""
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    with pooler(postgres, database, workplace, "transaction") as url:
        error = ThreadRelay(Settings(database_url=url, nats_url=nats.url), drain=True).ended()
    assert isinstance(error, Misconfigured)
    assert "pooler in transaction mode" in error.message
    assert "direct connection" in error.remedy
    assert Broker(nats.url).read(stream.name) == []
    assert "pooler in transaction mode" in str(status(database).blocked)


def test_session_mode_works(postgres: Postgres, database: str, nats: Nats, stream: Stream, workplace: Path) -> None:
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    with pooler(postgres, database, workplace, "session") as url:
        assert ThreadRelay(Settings(database_url=url, nats_url=nats.url), drain=True).ended() is None
    assert len(Broker(nats.url).read(stream.name)) == 1


def test_the_doctor_and_the_metrics_leave_nothing_behind(
    postgres: Postgres, database: str, environment: dict[str, str], workplace: Path
) -> None:
    """Fault: the connections of the pool are the application's too. Promise: refused whatever runs beside, and the
    application goes on as before.
    """
    with pooler(postgres, database, workplace, "transaction") as url:
        through = environment | {"OUTBOX_DATABASE_URL": url}
        checks = asyncio.run(doctor.examine(Settings(database_url=url, nats_url=environment["OUTBOX_NATS_URL"])))
        assert [each.name for each in checks if each.colour is Colour.RED] == ["pooler"]
        for _ in range(3):
            with ProcessRelay(workplace, through, "--drain", "--listen", "127.0.0.1:0") as relay:
                until(lambda: not relay.running)
                assert relay.stop() == 1
                assert "pooler in transaction mode" in relay.log.read_text()
        for _ in range(5):
            rows(url, "SELECT outbox.add('a.b', 'x')")
        assert value(url, "SHOW enable_seqscan") == "on"


def test_commands_inherit_nothing_and_leave_nothing_behind(
    postgres: Postgres, database: str, environment: dict[str, str], workplace: Path
) -> None:
    """Fault: all settings are spoilt, and what a command sets would be the application's next."""
    with whole(database) as application:
        for number in range(3):
            application.execute("SELECT outbox.add('a.b', %s::text)", [str(number)])
        application.execute("UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'x' WHERE position = 3")
        application.execute(TRAPS.encode())
    spoil(database, f"DATABASE {database.rpartition('/')[2]}", wrongly(postgres))
    before = settings_of(database)
    with pooler(postgres, database, workplace, "transaction") as url:
        through = environment | {"OUTBOX_DATABASE_URL": url}
        for words in COMMANDS:
            done = outbox(through, *words.split(), cwd=workplace)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
            assert {**settings_of(url), **before} == settings_of(url), words
        assert "red     database  pooler" in outbox(through, "doctor", cwd=workplace).stdout
