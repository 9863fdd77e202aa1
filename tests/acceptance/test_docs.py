"""The documents say what is: examples run, and every test, command, flag, setting, name and file they name exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
import typer.main
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations

import outbox
from outbox import schema
from outbox.cli.app import app
from outbox.config import Settings
from outbox.core.transaction import DeadReason
from outbox.embedded import Nats
from outbox.operate import dead, migrate, purge
from outbox.schema import register
from tests.support.bed import Broker, rows, until, value
from tests.support.documents import (
    DOCS,
    README,
    ROOT,
    anchors,
    blocks,
    check_command,
    first_cells,
    flags,
    invocations,
    libpq,
    named,
    prose,
    run,
    section,
    spans,
)

SCHEMA, API = DOCS / "schema.md", DOCS / "reference" / "api.md"
STREAM, MONITOR, DEAD_LETTERS, TROUBLESHOOT = (
    DOCS / "operate" / f"{name}.md" for name in ("stream", "monitor", "dead-letters", "troubleshoot")
)
DOCUMENTS = [
    README,
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted(DOCS.rglob("*.md")),
]
# Heard from them in test_troubleshoot.py, or in the tests that the guarantees name.
SERVERS_WORDS = {
    "password authentication failed",
    'database "shop" does not exist',
    "Connection refused",
    "Authorization Violation",
    "Connect call failed",
    "permission denied for schema outbox",
    "maximum messages exceeded",
    "maximum bytes exceeded",
    "permissions violation",
}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


# --- the examples of the README


def test_readme_first_event_relay_and_consumer(database: str, nats: Nats, tmp_path: Path) -> None:
    """All blocks as they are: connections come from the environment, but for the flag of the relay's command line."""
    examples = named(README, "python")
    for name, text in examples.items():
        (tmp_path / name).write_text(text)
    (relay_line,) = (line for block in blocks(README, "sh") for line in block.splitlines() if "outbox relay" in line)
    (relay_words,) = invocations(relay_line)
    relay_words[relay_words.index("--nats-url") + 1] = nats.url
    (transcript,) = blocks(README, "text")
    environment = {**libpq(database), "OUTBOX_NATS_URL": nats.url}

    run(sys.executable, "-m", "outbox", "migrate", folder=tmp_path, environment=environment)
    run(sys.executable, "first_event.py", folder=tmp_path, environment=environment)
    (statements,) = blocks(README, "sql")
    rows(database, statements)
    relay = subprocess.Popen(
        [sys.executable, "-m", "outbox", *relay_words],
        cwd=tmp_path,
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
    )
    broker, heard = Broker(nats.url), list[str]()
    try:
        until(lambda: value(database, "SELECT count(*) FROM outbox.transactions WHERE sent_at IS NOT NULL") == 2)
        consumer = subprocess.Popen(
            [sys.executable, "consumer.py"],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert consumer.stdout
        guard = threading.Timer(30, consumer.kill)
        guard.start()
        try:
            heard = [consumer.stdout.readline() for _ in transcript.splitlines()]
        finally:
            guard.cancel()
            consumer.kill()
            consumer.wait()
            consumer.stdout.close()
    finally:
        relay.terminate()
        assert relay.wait(30) == 0
        broker.api("STREAM.DELETE.ORDERS")
    assert "".join(heard) == transcript


def test_revision_and_metadata(database: str) -> None:
    """The revision of an application's own history goes up and down, and autogenerate leaves the outbox alone."""
    migrate.migrate(database, to=0)
    rows(database, "DROP TABLE aggregates, bumps, ledger")
    revision: dict[str, object] = {}
    exec(compile(named(SCHEMA, "python")["revision.py"], "revision.py", "exec"), revision)
    upgrade, downgrade = revision["upgrade"], revision["downgrade"]
    assert callable(upgrade)
    assert callable(downgrade)
    target = sa.MetaData()
    register(target)
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_schemas": True})
        with Operations.context(context):
            upgrade()
            assert compare_metadata(context, target) == []
            connection.commit()
            assert value(database, "SELECT count(*) FROM outbox.pending") == 0
            downgrade()
            connection.commit()
    assert value(database, "SELECT to_regnamespace('outbox') IS NULL")


def test_readme_begins_with_the_two_command_lines() -> None:
    extras = set(metadata.metadata("outbox-relay").get_all("Provides-Extra") or [])
    demo, tests = next(blocks(README, "sh")).splitlines()
    assert demo.endswith("'.[demo]' && .venv/bin/outbox demo")
    assert tests.endswith("'.[dev]' && .venv/bin/python -m pytest")
    assert {"demo", "dev"} <= extras


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 220


def test_bad_event_is_refused_as_the_schema_page_says(database: str) -> None:
    (transcript,) = blocks(SCHEMA, "text")
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        rows(database, named(SCHEMA, "sql")["refused"])
    told = refused.value.diag
    assert f"ERROR:  {told.message_primary}\nHINT:  {told.message_hint}\n" == transcript


# --- the operator's guide


def test_sql_of_the_operators_guide(database: str) -> None:
    """Each block as it is, as the role that is said to run it: what it changes, and that it is allowed."""
    statements = {**named(STREAM, "sql"), **named(MONITOR, "sql")}
    suffix = database.rpartition("/")[2]
    operator, relay = f"operator_{suffix}", f"relay_{suffix}"
    for role in (operator, relay):
        rows(database, f"CREATE ROLE {role} LOGIN")
    for grant in schema.grants(operator=operator, relay=relay):
        rows(database, grant)
    as_operator, as_relay = (database.replace("postgres@", f"{role}@") for role in (operator, relay))

    rows(as_operator, statements["larger limits"])
    assert value(database, "SELECT max_transaction_events FROM outbox.limits") == 2000

    rows(database, "ALTER TABLE outbox.transactions ALTER COLUMN position RESTART WITH 42")
    rows(database, """SELECT outbox.add('a.b', n::text, '{"k": "v"}') FROM generate_series(1, 3) AS n""")
    rows(as_operator, statements["set aside"])
    assert rows(database, "SELECT position, discarded_at FROM outbox.dead") == [(42, None)]
    assert dead.retry(as_operator, "outbox", [42]) == [42]
    rows(as_operator, statements["set aside"])
    assert dead.discard(as_operator, "outbox", [42]) == [42]

    rows(database, "SELECT outbox.add('a.b', 'pending')")
    rows(database, "SELECT outbox.add('a.b', 'sent')")
    rows(
        database,
        "UPDATE outbox.transactions SET sent_at = now() - interval '2 days', stream = 'S', first_sequence = 1, "
        "last_sequence = 1 WHERE position = 44",
    )
    assert purge.purge(as_relay, "outbox", 3600) == 1
    assert rows(database, "SELECT position FROM outbox.transactions ORDER BY 1") == [(42,), (43,)]
    assert value(database, "SELECT count(*) FROM outbox.events") == 4
    assert value(database, "SELECT purged FROM outbox.housekeeping") == 44


def test_reasons_and_columns_of_dead_letters(database: str) -> None:
    words = first_cells(DEAD_LETTERS.read_text())
    columns = rows(database, "SELECT attname FROM pg_attribute WHERE attrelid = 'outbox.dead'::regclass")
    assert sorted(words) == sorted([*(name for (name,) in columns), *DeadReason])


def test_words_of_halts_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in (ROOT / "outbox").rglob("*.py"))
    found = first_cells(section(ROOT / "docs" / "guarantees.md", "Halts and their remedy"))
    assert len(found) > 5
    for words in found:
        for piece in words.split("…"):
            assert piece.strip() in code, words


def test_words_of_troubleshooting_are_those_of_the_code() -> None:
    """But for those of the two servers, which `test_troubleshoot.py` hears from them."""
    code = "".join(path.read_text() for kind in ("*.py", "*.sql") for path in (ROOT / "outbox").rglob(kind))
    for words in first_cells(TROUBLESHOOT.read_text()):
        for piece in re.sub("^(postgres|nats) (?=cannot)", "", words).split("…"):
            assert piece.strip() in code or piece in SERVERS_WORDS, words


# --- what the documents name


@each_document
def test_commands_and_flags_exist(document: Path) -> None:
    for span in spans(document):
        if span.startswith("--"):
            assert span.split()[0] in flags() | {"--build", "--scale"}, span
    lines = [line for block in blocks(document, "sh") for line in block.splitlines()]
    lines += [span for span in spans(document) if re.match(r"outbox [a-z]|docker ", span)]
    for line in lines:
        for words in invocations(line):
            check_command(words)


@each_document
def test_named_tests_exist(document: Path) -> None:
    for path, name in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", document.read_text()):
        tree = ast.parse((ROOT / path).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in there, f"{path} has no test {name}"


def test_each_row_of_the_guarantees_keeps_a_test_in_the_default_run() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    run = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(run) > 300, done.stdout + done.stderr
    for row in (DOCS / "guarantees.md").read_text().splitlines():
        tests = set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", row)) if row.startswith("|") else set()
        assert not tests or tests & run, row


@each_document
def test_links_resolve(document: Path) -> None:
    for text, link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_file(), f"{link} in {document.name}"
        assert not anchor or anchor in anchors(target), f"{link} in {document.name}"
        if named_test := re.match(r"`(tests/[\w/]+\.py)::", text):
            assert target == ROOT / named_test.group(1), f"{text} in {document.name}"


@each_document
def test_settings_exist(document: Path) -> None:
    for name in re.findall(r"\bOUTBOX_(?!TESTS_)[A-Z_]*[A-Z]\b", document.read_text()):
        assert name.removeprefix("OUTBOX_").removesuffix("_FILE").lower() in Settings.model_fields, name


def test_references_are_what_the_code_says() -> None:
    """Commands, settings and the index of pages are made from the code; this says what to run when they are not."""
    command = [sys.executable, "docs/site/reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_to_watch_exist() -> None:
    named = set(re.findall(r"`(outbox_[a-z_]+)`", MONITOR.read_text()))
    assert named
    assert named <= set(first_cells((DOCS / "reference" / "metrics.md").read_text()))


def test_settings_of_the_readme_have_their_flag_and_default() -> None:
    table = [line.split("|")[1:-1] for line in section(README, "Run it").splitlines() if line.startswith("| `")]
    names = [name.strip(" `").removeprefix("OUTBOX_").lower() for name, *_ in table]
    assert len(names) == 5
    for name, (_, flag, default, _) in zip(names, table, strict=True):
        wanted = Settings.model_fields[name].default
        assert default.strip(" `") == ("" if wanted is None else str(wanted)), name
        option = "--" + name.replace("_", "-")
        assert flag.strip(" `") == (option if option in flags() else ""), name


def test_every_name_of_the_application_is_documented() -> None:
    assert sorted(first_cells(API.read_text().partition("\n## ")[0])) == sorted(outbox.__all__)


def test_every_command_is_documented() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"outbox {command}" in text, command


def test_changelog_has_this_version() -> None:
    assert f"## [{metadata.version('outbox-relay')}]" in (ROOT / "CHANGELOG.md").read_text()
