"""What commands print for machines fits the published schemas, which are those of the code."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import typer.main

from outbox.cli.app import app
from outbox.config import Settings
from tests.support import schemas
from tests.support.bed import ThreadRelay, rows, until, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.servers import Stream


@pytest.mark.parametrize("name", schemas.TYPES)
def test_published_schemas_are_those_of_the_code(name: str) -> None:
    assert (schemas.FOLDER / f"{name}.json").read_text() == schemas.text(name), "run: python -m tests.support.schemas"


def test_output_fits_the_schemas(settings: Settings, environment: dict[str, str], stream: Stream) -> None:
    """Every command with --json, on an outbox that has something of everything."""
    url, subject = settings.database_url, f"{stream.prefix}.x"
    rows(url, "SELECT outbox.add(%s, 'text', '{\"kind\": \"x\"}')", subject)
    rows(url, "SELECT outbox.add(%s, '\\xff00'::bytea)", subject)
    same = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    rows(
        url,
        "INSERT INTO outbox.events (subject, payload, message_id) VALUES (%s, 'a', %s), (%s, 'b', %s)",
        subject,
        same,
        subject,
        same,
    )
    with ThreadRelay(settings):
        wait_until_sent(url)
        until(lambda: value(url, "SELECT count(*) FROM outbox.dead"))
    rows(url, "SELECT outbox.add(%s, 'pending')", subject)

    def printed(name: str, *words: str, code: int = 0) -> Any:
        done = outbox(environment, *words, "--json")
        assert done.returncode == code, done.stderr
        found = json.loads(done.stdout)
        jsonschema.validate(found, schemas.schema(name), format_checker=jsonschema.FormatChecker())
        return found

    assert printed("status", "status")["dead_transactions"] == 1
    assert {each["colour"] for each in printed("doctor", "doctor")} == {"green", "yellow"}
    shown = printed("show", "show", "1")
    assert [(each["payload"], each["headers"], each["in_stream"]) for each in shown["events"]] == [
        ("text", {"kind": "x"}, "there")
    ]
    assert printed("show", "show", "2")["events"][0]["payload"] == {"base64": "/wA="}
    assert printed("show", "dead", "show", "3")["state"] == "dead"
    assert [each["position"] for each in printed("dead-list", "dead", "list")] == [3]
    assert printed("replay", "replay", "--from", "1", "--to", "9", "--yes")["transactions"] == 2
    assert [each["anomalies"] for each in printed("verify", "verify")] == [[]]
    assert {each["source"] for each in printed("config", "config")} > {"OUTBOX_NATS_URL", "default"}
    rows(url, "UPDATE outbox.transactions SET first_sequence = 7, last_sequence = 7 WHERE position = 1")
    assert printed("verify", "verify", code=1)[0]["anomalies"]
    rows(url, "DROP INDEX outbox.transactions_dead")
    assert "red" in {each["colour"] for each in printed("doctor", "doctor", code=1)}


def test_every_command_with_json_has_a_schema() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    below = {
        f"{name} {word}": each
        for name, group in commands.items()
        for word, each in getattr(group, "commands", {}).items()
    }
    with_json = {
        name
        for name, each in (commands | below).items()
        if any("--json" in parameter.opts and parameter.is_flag for parameter in each.params)
    }
    titles = " ".join(title for title, _ in schemas.TYPES.values())
    assert with_json
    assert not {name for name in with_json if f"outbox {name}" not in titles}
