"""The servers' words that the page for troubleshooting tells of are what a relay hears from real servers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Unreachable
from outbox.embedded import Postgres
from outbox.errors import Misconfigured
from tests.support.bed import ThreadRelay, rows, until, value
from tests.support.documents import DOCS
from tests.support.servers import own_nats

PAGE = (DOCS / "operate" / "troubleshoot.md").read_text()


def hears(settings: Settings, server: str, *words: str) -> None:
    """The relay says some of these words of this server, which the page has: while it waits, or as its last."""
    assert all(each in PAGE for each in words)
    relay = ThreadRelay(settings)

    def said() -> list[str]:
        waits = [told.why for told in relay.happenings if isinstance(told, Unreachable) and told.server == server]
        return waits or [str(error) for error in (relay.error,) if error]

    told = until(said)[0]
    assert any(each in told for each in words), told
    relay.stop()


@pytest.fixture
def protected(postgres: Postgres, database: str) -> Iterator[str]:
    """The database's URL for a role with a password, which it asks for: the password is missing in the URL."""
    rows(database, "CREATE ROLE protected LOGIN PASSWORD 'right'")
    rules = Path(value(database, "SHOW hba_file"))
    before = rules.read_text()
    rules.write_text(f"host all protected all scram-sha-256\n{before}")
    loaded = value(database, "SELECT pg_conf_load_time()")
    rows(database, "SELECT pg_reload_conf()")
    until(lambda: value(database, "SELECT pg_conf_load_time()") > loaded)
    yield database.replace("postgres@", "protected:{}@")
    rules.write_text(before)
    rows(database, "SELECT pg_reload_conf()")
    rows(database, "DROP ROLE protected")


def test_wrong_password(protected: str, settings: Settings) -> None:
    wrong = settings.model_copy(update={"database_url": protected.format("wrong")})
    hears(wrong, "postgres", "password authentication failed")


def test_missing_grant(protected: str, settings: Settings) -> None:
    error = ThreadRelay(settings.model_copy(update={"database_url": protected.format("right")})).ended()
    assert isinstance(error, Misconfigured)
    assert "permission denied for schema outbox" in error.message
    assert "--relay-role" in error.remedy


def test_nobody_listens(settings: Settings) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and not listening
        port = reserved.getsockname()[1]
        hears(
            settings.model_copy(update={"database_url": f"postgresql://127.0.0.1:{port}/shop"}),
            "postgres",
            "Connection refused",
        )
        hears(
            settings.model_copy(update={"nats_url": f"nats://127.0.0.1:{port}"}),
            "nats",
            "Connect call failed",
            "Connection refused",
        )


def test_database_that_is_not_there(database: str, settings: Settings) -> None:
    elsewhere = f"{database.rpartition('/')[0]}/shop"
    hears(settings.model_copy(update={"database_url": elsewhere}), "postgres", 'database "shop" does not exist')


def test_user_that_nats_does_not_know(settings: Settings, workplace: Path) -> None:
    config = 'authorization { users = [ { user: "relay", password: "right" } ] }'
    server = own_nats(workplace / "nats", config=config)
    server.start()
    try:
        hears(settings.model_copy(update={"nats_url": server.url}), "nats", "Authorization Violation")
    finally:
        server.stop()
