"""What a session inherits from its role, its database or its environment changes nothing of what we read and write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from outbox.embedded import Nats, Postgres
from outbox.operate import migrate
from tests.support.bed import Broker, rows
from tests.support.commands import outbox
from tests.support.servers import Stream, numbers
from tests.support.spoilt import TRAPS, spoil, whole, wrongly


def masked(words: str, stream: Stream) -> str:
    """Without times, ids and names, and the width of columns that they change."""
    words = words.replace(stream.name, "STREAM").replace(stream.prefix, "subject")
    words = re.sub(
        r"\d{4}-\d\d-[-\d:.+ TZ]*|[\d.]+(?= s\b)|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8}@\S+", "…", words
    )
    return re.sub(r'("txid": ")\d+|(seconds": )[\d.]+|txid \d+|[ ─━]+', r"\1\2 ", words)


def story(environment: dict[str, str], stream: Stream, workplace: Path) -> dict[str, str]:
    """All that an operator does, and what comes of it: the words of each command."""
    told: dict[str, str] = {}

    def run(*words: str) -> str:
        done = outbox(environment, *words, cwd=workplace)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        told[" ".join(words)] = masked(done.stdout + ("" if words[0] == "relay" else done.stderr), stream)
        return done.stdout

    def add(*payloads: str) -> None:
        with whole(environment["OUTBOX_DATABASE_URL"]) as connection:
            for payload in payloads:
                connection.execute("SELECT outbox.add(%s, %s::text)", [f"{stream.prefix}.x", payload])

    run("migrate")
    run("migrate", "--check")
    add("a", "b", "ü")
    run("relay", "--drain")
    run("pause", "--why", "größer")
    add("c")
    status = json.loads(run("status", "--json"))
    assert (status["pending_transactions"], status["sent_events"], status["paused_why"]) == (1, 3, "größer")
    run("resume")
    run("show", "3", "--json")
    run("doctor")
    run("replay", "--from", "1", "--to", "2", "--yes")
    run("relay", "--drain")
    run("verify")
    add("d")
    with whole(environment["OUTBOX_DATABASE_URL"]) as connection:
        connection.execute("UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'x' WHERE sent_at IS NULL")
    run("dead", "list", "--json")
    run("dead", "show", "7")
    run("dead", "retry", "7", "--yes")
    run("rebase", "--yes")
    run("relay", "--drain")
    run("verify", "--json")
    run("purge", "--older-than", "0")
    run("status")
    run("migrate", "--to", "0")
    with whole(environment["OUTBOX_DATABASE_URL"]) as connection:
        text = migrate.migration_sql("printed", relay=connection.info.user)
    with psycopg.connect(environment["OUTBOX_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(text.encode())
    told["printed"] = " ".join(migrate.problems(environment["OUTBOX_DATABASE_URL"], "printed"))
    return told


@pytest.fixture
def tell(postgres: Postgres, nats: Nats, broker: Broker, workplace: Path) -> Callable[..., dict[str, str]]:
    """The story in a database of its own, on a stream of its own, as its owner, after `prepare`."""

    def told(prepare: Callable[[str, str, str], dict[str, str]]) -> dict[str, str]:
        name = f"heir_{next(numbers)}"
        rows(postgres.url(), f"CREATE ROLE {name} LOGIN")
        rows(postgres.url(), f"CREATE DATABASE {name} OWNER {name}")
        broker.create_stream(name, f"{name}.>")
        url = postgres.url(name).replace("postgres@", f"{name}@")
        more = prepare(postgres.url(name), name, url)
        environment = {"OUTBOX_DATABASE_URL": url, "OUTBOX_NATS_URL": nats.url, **more}
        return story(environment, Stream(name, name), workplace)

    return told


@pytest.mark.parametrize(
    "whence",
    ["role", pytest.param("database", marks=pytest.mark.long), pytest.param("environment", marks=pytest.mark.long)],
)
def test_inherited_settings_change_nothing(
    postgres: Postgres, tell: Callable[..., dict[str, str]], whence: str
) -> None:
    """Fault: whatever a session may change is spoilt; and with `public` first in the path, names in there that the
    application's role made stand before PostgreSQL's own. Promise: every command does and says the same.
    """
    wrong = wrongly(postgres)
    assert len(wrong) > 100

    def spoilt(admin: str, name: str, url: str) -> dict[str, str]:
        with whole(admin) as connection:
            connection.execute(TRAPS.encode())
        if whence == "environment":
            given = (f"-c {name}={setting.replace(' ', chr(92) + ' ')}" for name, setting in wrong.items())
            return {"PGOPTIONS": " ".join(given), "PGDATESTYLE": "SQL, DMY", "PGTZ": "Asia/Kathmandu"}
        spoil(admin, f"{whence} {name}", wrong)
        with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.RaiseException, match="trapped by"):
            connection.execute("SELECT lower(int8range(1, 2))")
        return {}

    assert tell(spoilt) == tell(lambda *_: {})
