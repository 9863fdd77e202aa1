"""The rules of an event, and that the database has the same ones in the same words."""

from __future__ import annotations

import json
from uuid import uuid4

import psycopg
import pytest

from outbox import InvalidEvent, Outbox, event
from outbox.event import header_bytes, header_problem, subject_problem
from tests.support.bed import rows

SUBJECTS = [
    "",
    "a b",
    "a.*",
    "a.>",
    "*",
    ">",
    "a*b",
    "$JS.x",
    "a..b",
    ".a",
    "a.",
    ".",
    "x" * 256,
    "ä" * 128,
    "a\u00a0b",
    "a\tb",
    "a\u2003b",
    "a\x7f",
    "a\x01",
]
GOOD_SUBJECTS = ["a", "orders.created", "a.b.c", "x" * 255, "ä.ö", "a-b_c", "a$b", "_x", "日本.語"]
HEADERS = [
    {"a b": "x"},
    {"": "x"},
    {"a:b": "x"},
    {"ä": "x"},
    {"a": "x\ny"},
    {"a": "x\ry"},
    {"Nats-Msg-Id": "x"},
    {"nats-expected-stream": "x"},
    {"NATS-TTL": "1h"},
    {"Nats-Rollup": "all"},
    {"Outbox-Id": "x"},
    {"outbox-x": "x"},
]
GOOD_HEADERS = [
    {},
    {"Nats-TTL": "1h"},
    {"Nats-Rollup": "sub"},
    {"x%y": "1"},
    {"traceparent": "00-a-b-01"},
    {"a": ""},
    {"a": "ä b"},
]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_bad_subject(subject: str) -> None:
    with pytest.raises(InvalidEvent, match=r"outbox: subject"):
        event(subject, b"")


@pytest.mark.parametrize("headers", HEADERS)
def test_bad_headers(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidEvent, match="outbox: headers"):
        event("a", b"", headers=headers)


def test_header_that_is_no_string() -> None:
    with pytest.raises(InvalidEvent, match="is not a string"):
        event("a", b"", headers={"a": 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("payload", [object(), {1j}, b"x" and {"a": object()}, float])
def test_payload_that_is_no_json(payload: object) -> None:
    with pytest.raises(InvalidEvent, match="cannot be encoded"):
        event("a", payload)


def test_payloads() -> None:
    assert event("a", b"\x00\xff").payload == b"\x00\xff"
    assert event("a", "ä").payload == "ä".encode()
    assert event("a", {"a": [1, None]}).payload == b'{"a":[1,null]}'
    assert event("a", None).payload == b"null"


def test_message_id_is_kept_or_made() -> None:
    given = uuid4()
    assert event("a", b"", message_id=given).message_id == str(given)
    assert event("a", b"").message_id != event("a", b"").message_id


def test_database_refuses_the_same_subjects_in_the_same_words(database: str) -> None:
    with psycopg.connect(database) as connection:
        for subject in SUBJECTS + GOOD_SUBJECTS:
            row = connection.execute("SELECT outbox.subject_problem(%s)", [subject]).fetchone()
            assert row == (subject_problem(subject),), subject


def test_database_refuses_the_same_headers_in_the_same_words(database: str) -> None:
    with psycopg.connect(database) as connection:
        for headers in HEADERS + GOOD_HEADERS:
            text = json.dumps(headers)
            row = connection.execute(
                "SELECT outbox.header_problem(%s::jsonb), outbox.header_bytes(%s::jsonb)", [text, text]
            ).fetchone()
            assert row == (header_problem(headers), header_bytes(headers)), headers


def refused(database: str, statement: str, *parameters: object) -> str:
    with psycopg.connect(database) as connection:
        with pytest.raises(psycopg.errors.CheckViolation) as caught:
            connection.execute(statement.encode(), parameters)
            connection.commit()
        diagnostic = caught.value.diag
        assert diagnostic.message_hint
        return f"{diagnostic.message_primary} | {diagnostic.message_hint}"


INSERT = "INSERT INTO outbox.events (subject, headers, payload) VALUES (%s, %s::jsonb, %s::bytea)"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_insert_refuses_subject(database: str, subject: str) -> None:
    assert str(subject_problem(subject)) in refused(database, INSERT, subject, None, "")


@pytest.mark.parametrize(
    "headers", ["[]", '"x"', "1", '{"a": 1}', '{"a": null}', '{"a": {}}', *map(json.dumps, HEADERS)]
)
def test_insert_refuses_headers(database: str, headers: str) -> None:
    assert "headers" in refused(database, INSERT, "a", headers, "")


def test_insert_refuses_sizes(database: str) -> None:
    assert "max_header_bytes in outbox.limits" in refused(database, INSERT, "a", json.dumps({"a": "x" * 61_440}), "")
    assert "max_event_bytes in outbox.limits" in refused(database, INSERT, "a", None, "x" * 1_000_001)
    assert "max_event_bytes" in refused(database, INSERT, "a", json.dumps({"a": "x" * 100}), "x" * 999_950)


def test_insert_refuses_a_forged_txid(database: str) -> None:
    assert "txid" in refused(database, "INSERT INTO outbox.events (txid, subject, payload) VALUES ('1', 'a', '')")


def test_commit_refuses_more_events_than_fit_a_batch(database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("SELECT outbox.add('a.b', n::text) FROM generate_series(1, 1001) AS n")
        with pytest.raises(psycopg.errors.CheckViolation, match="1001 events, over the limit of 1000") as caught:
            connection.commit()
        assert "max_transaction_events" in str(caught.value.diag.message_hint)
    with psycopg.connect(database) as connection:
        connection.execute("SELECT outbox.add('a.b', n::text) FROM generate_series(1, 1000) AS n")
        connection.commit()


def test_forged_count_is_refused(database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("SELECT outbox.add('a.b', 'x')")
        connection.execute("SELECT set_config('outbox.outbox_added', '1:5', true)")
        with pytest.raises(psycopg.errors.CheckViolation, match="was overwritten"):
            connection.commit()


@pytest.mark.parametrize(
    "cleared",
    [
        "RESET ALL",
        "RESET outbox.outbox_added",
        "SET LOCAL outbox.outbox_added TO DEFAULT",
        "SELECT set_config('outbox.outbox_added', '', true)",
        "SAVEPOINT s; SELECT outbox.add('a.b', 'y'); RESET ALL; RELEASE SAVEPOINT s",
        "RESET ALL; SAVEPOINT s; SELECT outbox.add('a.b', 'y'); ROLLBACK TO SAVEPOINT s",
    ],
)
def test_a_count_that_was_cleared_is_refused(database: str, cleared: str) -> None:
    """A pool or a framework resets the session in the middle: what was added before that would not be counted."""
    with psycopg.connect(database) as connection:
        connection.execute("SELECT outbox.add('a.b', 'x')")
        connection.execute(cleared.encode())
        connection.execute("SELECT outbox.add('a.b', 'z')")
        with pytest.raises(psycopg.errors.CheckViolation, match="was cleared") as caught:
            connection.commit()
        assert "RESET ALL" in str(caught.value.diag.message_hint)
    with psycopg.connect(database) as connection:  # the next transaction of the session is none the worse
        connection.execute("SELECT outbox.add('a.b', 'x')")


def test_events_that_are_added_within_a_statement_that_adds_events_are_all_counted(database: str) -> None:
    """Their triggers fire in another order than they were counted in."""
    nested = "INSERT INTO outbox.events (subject, payload) SELECT 'a.b', outbox.add('c.d', 'x')::text::bytea FROM"
    rows(database, f"{nested} generate_series(1, 3)")
    outer = (
        "INSERT INTO outbox.events (subject, payload) VALUES ('a.b', ''), ('a.b', outbox.add('c.d', 'x')::text::bytea)"
    )
    rows(database, outer)
    assert rows(database, "SELECT event_count FROM outbox.transactions ORDER BY position") == [(6,), (3,)]


def test_sql_forms_of_add(database: str) -> None:
    with psycopg.connect(database) as connection:
        given = uuid4()
        made = connection.execute(
            "SELECT outbox.add('a.b', '{\"a\": 1}'::jsonb, '{\"x\": \"y\"}', %s)", [given]
        ).fetchone()
        assert made == (given,)
        connection.execute("SELECT outbox.add('a.b', 'text')")
        connection.execute("SELECT outbox.add('a.b', '\\x00ff'::bytea)")
        found = connection.execute("SELECT payload, headers FROM outbox.events ORDER BY id").fetchall()
    assert found == [(b'{"a": 1}', {"x": "y"}), (b"text", None), (b"\x00\xff", None)]


@pytest.mark.parametrize(("size", "headers"), [(1_000_000, {}), (999_978, {"a": "12345"})])
def test_python_and_the_database_have_the_same_limit_of_size(database: str, size: int, headers: dict[str, str]) -> None:
    with psycopg.connect(database) as connection:
        Outbox().add(connection, "a", b"x" * size, headers=headers)
        with pytest.raises(InvalidEvent, match="over the limit of 1000000"):
            Outbox().add(connection, "a", b"x" * (size + 1), headers=headers)
        with pytest.raises(psycopg.errors.CheckViolation, match="over the limit of 1000000"):
            Outbox(max_event_bytes=2_000_000).add(connection, "a", b"x" * (size + 1), headers=headers)


def test_python_refuses_before_it_asks_the_server(database: str) -> None:
    with psycopg.connect(database) as connection:
        with pytest.raises(InvalidEvent):
            Outbox().add(connection, "a b", "x")
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
