"""Ten things that an operator meets: the doctor, or the status, names each with its remedy, and the remedy works."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked, InDoubt
from outbox.doctor import examine as doctor
from outbox.doctor import queries
from outbox.doctor.check import Check, Colour
from outbox.embedded import Nats, Postgres
from outbox.errors import Misconfigured
from outbox.operate import dead, migrate, rebase, status
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.guarded import SECRET
from tests.support.servers import Stream, clone, old_nats


def checks(settings: Settings) -> list[Check]:
    return asyncio.run(doctor.examine(settings))


def wrong(settings: Settings, colour: Colour = Colour.RED) -> list[Check]:
    return [each for each in checks(settings) if each.colour is colour]


def named(settings: Settings, found: str, remedy: str, colour: Colour = Colour.RED) -> Check:
    """The one check of this colour that says so, with this remedy."""
    told = checks(settings)
    fitting = [each for each in told if found in each.found and remedy in each.remedy and each.colour is colour]
    assert len(fitting) == 1, "\n".join(f"{each.colour} {each.name}: {each.found} -> {each.remedy}" for each in told)
    return fitting[0]


def add(url: str, subject: str, payload: str = "x") -> None:
    rows(url, "SELECT outbox.add(%s, %s::text)", subject, payload)


def flows(settings: Settings) -> None:
    """A relay sends all that is pending, and the doctor sees nothing red."""
    with ThreadRelay(settings):
        wait_until_sent(settings.database_url)
        assert wrong(settings) == []


@pytest.fixture
def edit(broker: Broker, stream: Stream) -> Callable[..., None]:
    """What `nats stream edit` does."""

    def change(**config: object) -> None:
        answer = broker.api(f"STREAM.UPDATE.{stream.name}", {**broker.info(stream.name)["config"], **config})
        assert "error" not in answer, answer

    return change


def test_nothing_is_wrong(settings: Settings, stream: Stream) -> None:
    add(settings.database_url, f"{stream.prefix}.x")
    flows(settings)
    assert {each.area for each in checks(settings)} == {"database", "outbox", "stream"}
    assert all(each.remedy for each in checks(settings) if each.colour is not Colour.GREEN)


def test_wrong_password(passwords: Postgres, nats: Nats, stream: Stream) -> None:
    url = clone(passwords)
    migrate.grant(url, "outbox", relay="by_password")
    add(url, f"{stream.prefix}.x")
    right = psycopg.conninfo.make_conninfo(url, user="by_password", password=SECRET)
    wrong_one = psycopg.conninfo.make_conninfo(right, password="guessed")
    settings = Settings(database_url=wrong_one, nats_url=nats.url)
    found = named(settings, "password authentication failed", "give the right user and password")
    assert "guessed" not in found.found
    flows(settings.model_copy(update={"database_url": right}))


def test_stream_without_allow_atomic(settings: Settings, broker: Broker) -> None:
    broker.create_stream("LACKS", "lacks.>", allow_atomic=False)
    add(settings.database_url, "lacks.x")
    named(settings, "it lacks allow_atomic", "nats stream edit LACKS --allow-batch")
    named(settings, "its leader says that atomic batches are off", "nats stream edit LACKS --allow-batch")
    assert broker.last_sequence("LACKS") == 0
    broker.api("STREAM.UPDATE.LACKS", {**broker.info("LACKS")["config"], "allow_atomic": True})
    flows(settings)
    broker.api("STREAM.DELETE.LACKS")


def test_subject_without_a_stream(settings: Settings, broker: Broker, stream: Stream) -> None:
    add(settings.database_url, "lost.property")
    named(
        settings, "subject lost.property is in no stream", "nats stream add NAME --subjects lost.property --allow-batch"
    )
    with ThreadRelay(settings):
        until(lambda: status.status(settings.database_url).blocked)
        named(settings, "transaction 1: subject lost.property is in no stream", "the lines under stream")
    broker.create_stream("FOUND", "lost.property")
    flows(settings)
    broker.api("STREAM.DELETE.FOUND")


def test_full_stream(settings: Settings, stream: Stream, edit: Callable[..., None]) -> None:
    edit(max_msgs=2, discard="new")
    with ThreadRelay(settings):
        for _ in range(2):
            add(settings.database_url, f"{stream.prefix}.x")
            wait_until_sent(settings.database_url)
        add(settings.database_url, f"{stream.prefix}.x")
        until(lambda: any(each.blocked for each in status.status(settings.database_url).streams))
        named(settings, "it is full: 2 of 2 messages", "raise max_msgs")
        named(settings, f"{stream.name}: maximum messages exceeded", "the lines under stream")
    edit(max_msgs=-1)
    flows(settings)


def test_missing_grant(settings: Settings, stream: Stream) -> None:
    url, name = settings.database_url, f"relay_{stream.prefix}"
    rows(url, f"CREATE ROLE {name} LOGIN")
    migrate.grant(url, "outbox", relay=name)
    rows(url, f"REVOKE UPDATE (attempts) ON outbox.transactions FROM {name}")
    as_relay = settings.model_copy(update={"database_url": psycopg.conninfo.make_conninfo(url, user=name)})
    add(url, f"{stream.prefix}.x")
    found = named(as_relay, "lacks UPDATE (dead_at, dead_reason, attempts) ON outbox.transactions", "outbox migrate")
    assert found.remedy.endswith(f"as the owner: outbox migrate --relay-role {name}")
    rows(url, f"REVOKE USAGE ON SCHEMA outbox FROM {name}")
    named(as_relay, f"role {name} lacks USAGE ON SCHEMA", "outbox migrate --relay-role")
    migrate.grant(url, "outbox", relay=name)
    flows(as_relay)


def test_drifted_schema(settings: Settings, stream: Stream) -> None:
    url = settings.database_url
    rows(url, "DROP INDEX outbox.transactions_dead")
    rows(url, "ALTER TABLE outbox.events DISABLE TRIGGER seal")
    named(settings, "it has drifted: missing: index", "outbox migrate --check names all")
    sql = migrate.migration_sql()
    index = next(line for line in sql.splitlines() if "CREATE INDEX transactions_dead" in line)
    rows(url, index)
    named(settings, "it has drifted: missing: trigger", "outbox migrate --check names all")
    rows(url, "ALTER TABLE outbox.events ENABLE TRIGGER seal")
    add(url, f"{stream.prefix}.x")
    flows(settings)


def test_schema_that_is_not_there(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"schema": "nowhere"})
    named(nowhere, "there is no schema nowhere", "outbox migrate")
    migrate.migrate(settings.database_url, "nowhere")
    assert wrong(nowhere) == []


def test_old_server(database: str, workplace: Path) -> None:
    """Upgraded on its own data, it is what the relay needs."""
    server = Nats(workplace / "nats", binary=old_nats("2.11.11"))
    settings = Settings(database_url=database, nats_url=server.url)
    with server:
        broker = Broker(server.url)
        broker.create_stream("OLD", "old.>", allow_atomic=None)
        add(database, "old.x")
        named(settings, "nats-server 2.11.11", "upgrade nats-server to 2.12.1 or later")
    with Nats(workplace / "nats", port=server.port, binary=old_nats("2.12.1")):
        named(settings, "nats-server 2.12.1: a change of leader could", "upgrade nats-server", Colour.YELLOW)
        Broker(server.url).api("STREAM.UPDATE.OLD", {**broker.info("OLD")["config"], "allow_atomic": True})
        flows(settings)


def test_forgotten_prepared_transaction(two_phase_postgres: Postgres, nats: Nats, stream: Stream) -> None:
    settings = Settings(database_url=clone(two_phase_postgres), nats_url=nats.url)
    url = settings.database_url
    with psycopg.connect(url) as connection:
        connection.execute("SELECT outbox.add(%s, 'x')", [f"{stream.prefix}.x"])
        connection.execute("PREPARE TRANSACTION 'it''s forgotten'")
        connection.rollback()
    with ThreadRelay(settings):
        add(url, f"{stream.prefix}.x")
        wait_until_sent(url)  # nobody waits for it

        def found() -> list[Check]:
            return [each for each in wrong(settings, Colour.YELLOW) if each.name == "prepared transactions"]

        (check,) = until(found)
        assert 'prepared transaction "it\'s forgotten" of postgres' in check.found
        command = check.remedy.partition("then ")[2].partition(" or ")[0]
        rows(url, command)
        until(lambda: value(url, "SELECT count(*) FROM outbox.transactions WHERE sent_at IS NOT NULL") == 2)
        assert found() == []


def test_publishing_is_forbidden(database: str, workplace: Path) -> None:
    """To the publisher it looks like silence: the cause is in the status long before an ack is overdue."""

    def users(denied: str) -> str:
        relay = f'{{ user: relay, password: x, permissions: {{ publish: {{ deny: "{denied}" }} }} }}'
        return f"authorization {{ users: [ {relay}, {{ user: admin, password: x }} ] }}"

    with Nats(workplace / "nats", config=users("denied.>")) as server:
        admins = Broker(server.url.replace("//", "//admin:x@"))
        admins.create_stream("DENIED", "denied.>")
        settings = Settings(database_url=database, nats_url=server.url.replace("//", "//relay:x@"))
        add(database, "denied.x")
        with ThreadRelay(settings) as relay:
            assert "permissions violation" in relay.wait_for(Blocked).why.lower()
            named(settings, "DENIED: nats: permissions violation", "the lines under stream")
            named(settings, "publishing to denied.x cannot be probed", "permissions of this user")
            server.config = users("other.>")
            server._command()
            server.send_signal(signal.SIGHUP)
            wait_until_sent(database)
        assert [each.subject for each in admins.read("DENIED")] == ["denied.x"]


def test_what_is_forbidden_on_one_stream_leaves_the_others_alone(database: str, workplace: Path) -> None:
    denied = '{ user: relay, password: x, permissions: { publish: { deny: "denied.>" } } }'
    users = f"authorization {{ users: [ {denied}, {{ user: admin, password: x }} ] }}"
    with Nats(workplace / "nats", config=users) as server:
        admins = Broker(server.url.replace("//", "//admin:x@"))
        admins.create_stream("DENIED", "denied.>")
        admins.create_stream("FREE", "free.>")
        settings = Settings(database_url=database, nats_url=server.url.replace("//", "//relay:x@"))
        add(database, "denied.x")
        with ThreadRelay(settings) as relay:
            relay.wait_for(Blocked, lambda each: each.stream == "DENIED")
            for _ in range(200):
                add(database, "free.x")
            until(lambda: admins.last_sequence("FREE") == 200)
            assert not [each for each in relay.happenings if isinstance(each, InDoubt) and each.stream == "FREE"]
            assert [each.blocked is not None for each in status.status(database).streams] == [True, False]


@pytest.mark.parametrize("call", ["STREAM.NAMES", "STREAM.INFO.Denied", "STREAM.MSG.GET.Denied"])
def test_question_that_is_forbidden_is_told_as_such(
    database: str, workplace: Path, environment: dict[str, str], call: str
) -> None:
    """Fault: the relay's user may not use a part of JetStream's API, which looks like silence. All name it."""
    denied = f'{{ user: relay, password: x, permissions: {{ publish: {{ deny: "$JS.API.{call}" }} }} }}'
    users = f"authorization {{ users: [ {denied}, {{ user: admin, password: x }} ] }}"
    words = f'permissions violation for publish to "$JS.API.{call}"'
    with Nats(workplace / "nats", config=users) as server:
        admins = Broker(server.url.replace("//", "//admin:x@"))
        admins.create_stream("Denied", "Denied.>")
        admins.publish("Denied.before", b"")
        environment["OUTBOX_NATS_URL"] = server.url.replace("//", "//relay:x@")
        add(database, "Denied.x")
        with ThreadRelay(Settings(database_url=database, nats_url=environment["OUTBOX_NATS_URL"])):
            until(lambda: words in str(status.status(database).blocked))
        done = outbox(environment, "doctor", "--json")
        assert words.replace('"', '\\"') in done.stdout
        rows(database, "INSERT INTO outbox.streams (name, created, last_sequence) VALUES ('Denied', 'x', 0)")
        if call != "STREAM.NAMES":
            done = outbox(environment, "verify")
            assert words in done.stderr
            assert f"allow this user to publish to $JS.API.{call}" in done.stderr


def test_subject_in_capitals_that_is_forbidden(database: str, workplace: Path) -> None:
    """nats-py gives the server's words in lower case: the stream that is held back is found all the same."""
    denied = '{ user: relay, password: x, permissions: { publish: { deny: "Orders.>" } } }'
    users = f"authorization {{ users: [ {denied}, {{ user: admin, password: x }} ] }}"
    with Nats(workplace / "nats", config=users) as server:
        Broker(server.url.replace("//", "//admin:x@")).create_stream("ORDERS", "Orders.>")
        add(database, "Orders.Placed")
        with ThreadRelay(
            Settings(database_url=database, nats_url=server.url.replace("//", "//relay:x@"), ack_timeout=60)
        ) as relay:
            relay.wait_for(Blocked, lambda each: each.stream == "ORDERS" and '"Orders.Placed"' in each.why)


def test_dead_letter(settings: Settings, stream: Stream, edit: Callable[..., None]) -> None:
    url = settings.database_url
    edit(max_msg_size=500)
    add(url, f"{stream.prefix}.x", "x" * 900)
    with ThreadRelay(settings):
        until(lambda: status.status(url).dead_transactions)
        named(settings, "1 transaction; the newest, 1: message-too-large", "outbox dead list", Colour.YELLOW)
        named(settings, "max_msg_size is 500", "--max-msg-size=-1", Colour.YELLOW)
        edit(max_msg_size=-1)
        assert dead.retry(url, "outbox", [1]) == [1]
        until(lambda: value(url, "SELECT sent_at FROM outbox.transactions"))
    assert [each for each in checks(settings) if each.name == "dead letters"] == []


def test_another_writer_in_the_stream(settings: Settings, broker: Broker, stream: Stream) -> None:
    url = settings.database_url
    with ThreadRelay(settings):
        add(url, f"{stream.prefix}.x")
        wait_until_sent(url)
        broker.publish(f"{stream.prefix}.foreign")
        (told,) = [each for each in checks(settings) if "other writers" in each.found]
        assert told.colour is Colour.GREEN
        assert f"on {stream.prefix}.foreign); fenced by subject" in told.found
        add(url, f"{stream.prefix}.x")
        wait_until_sent(url)
        (shown,) = status.status(url).streams
        assert (shown.mode, shown.fence, shown.sharing) == ("shared", "subject", None)
    # The other writer has stopped, and so has the relay.
    asyncio.run(rebase.accept_stream(settings, stream.name))
    with ThreadRelay(settings):
        add(url, f"{stream.prefix}.x")
        wait_until_sent(url)
        assert status.status(url).streams[0].mode == "chained"
        assert [each for each in checks(settings) if "other writers" in each.found] == []


def test_shared_stream_that_no_subject_can_fence(
    settings: Settings, broker: Broker, stream: Stream, edit: Callable[..., None]
) -> None:
    """It is slow beside others, and says why; and is quick again when the reason is gone."""
    url = settings.database_url
    edit(allow_rollup_hdrs=True)
    broker.publish(f"{stream.prefix}.foreign")
    with ThreadRelay(settings):
        add(url, f"{stream.prefix}.x")
        wait_until_sent(url)
        named(settings, "it has allow_rollup_hdrs: so any message", "limits retention, without TTL", Colour.YELLOW)
        (shown,) = status.status(url).streams
        assert (shown.mode, shown.fence) == ("shared", "stream")
        assert "it has allow_rollup_hdrs" in str(shown.sharing)
        edit(allow_rollup_hdrs=False)

        def fenced() -> bool:
            add(url, f"{stream.prefix}.x")
            wait_until_sent(url)
            return status.status(url).streams[0].fence == "subject"

        until(fenced)


def test_paused_and_without_a_leader(settings: Settings, stream: Stream) -> None:
    add(settings.database_url, f"{stream.prefix}.x")
    rows(settings.database_url, "UPDATE outbox.transactions SET sealed_at = now() - interval '2 minutes'")
    named(settings, "no relay leads", "outbox relay", Colour.YELLOW)
    named(settings, "transaction 1 waits for 12", "outbox status --watch", Colour.YELLOW)
    rows(settings.database_url, "UPDATE outbox.relay SET paused_at = now(), paused_why = 'a test'")
    named(settings, "a test", "outbox resume", Colour.YELLOW)
    rows(settings.database_url, "UPDATE outbox.relay SET paused_at = NULL, paused_why = NULL")
    flows(settings)


def test_row_security_restored_database_and_small_batches(settings: Settings) -> None:
    url = settings.database_url
    rows(url, "CREATE ROLE hidden LOGIN")
    migrate.grant(url, "outbox", relay="hidden")
    rows(url, "ALTER TABLE outbox.transactions ENABLE ROW LEVEL SECURITY")
    as_hidden = settings.model_copy(update={"database_url": psycopg.conninfo.make_conninfo(url, user="hidden")})
    named(as_hidden, "it may hide rows of transactions from role hidden", "DISABLE ROW LEVEL SECURITY")
    rows(url, "ALTER TABLE outbox.transactions DISABLE ROW LEVEL SECURITY")
    rows(url, "UPDATE outbox.relay SET system_identifier = 1, database_oid = 1, timeline = 1")
    named(as_hidden, "it was restored, copied or moved", "outbox rebase")
    small = as_hidden.model_copy(update={"max_batch_messages": 10})
    named(small, "a transaction may add 1000 events", "raise OUTBOX_MAX_BATCH_MESSAGES")


def test_drift_and_a_missing_view_do_not_hide_the_rest(settings: Settings) -> None:
    url = settings.database_url
    rows(url, "CREATE INDEX more ON outbox.transactions (sealed_at)")
    rows(url, "UPDATE outbox.relay SET paused_at = now(), paused_why = 'a test'")
    named(settings, "unexpected: index", "outbox migrate --check")
    named(settings, "a test", "outbox resume", Colour.YELLOW)
    rows(url, "DROP VIEW outbox.pending CASCADE")
    told = checks(settings)
    assert [each.name for each in told if each.colour is Colour.RED] == ["drift", "tables"]
    assert {"server", "pooler", "account"} <= {each.name for each in told}


def test_tables_without_their_row(settings: Settings) -> None:
    """Only the schema was restored: the doctor and the relay say so, without a traceback."""
    rows(settings.database_url, "DELETE FROM outbox.limits")
    named(settings, "the table outbox.limits is empty", "INSERT INTO outbox.limits DEFAULT VALUES")
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Misconfigured)
    assert "outbox.limits is empty" in error.message
    rows(settings.database_url, "DELETE FROM outbox.relay")
    named(settings, "the table outbox.relay is empty", "restore its row from a backup")


def test_what_this_role_cannot_see_is_said_and_no_statement_is_shown(settings: Settings, stream: Stream) -> None:
    url, name = settings.database_url, f"blind_{stream.prefix}"
    rows(url, f"CREATE ROLE {name} LOGIN")
    migrate.grant(url, "outbox", relay=name)
    blind = settings.model_copy(update={"database_url": psycopg.conninfo.make_conninfo(url, user=name)})
    named(blind, "does not see the transactions of other roles", f"GRANT pg_read_all_stats TO {name}", Colour.YELLOW)
    rows(url, "ALTER TABLE outbox.events DISABLE TRIGGER check_event")
    rows(url, "DROP INDEX outbox.transactions_txid")
    named(blind, "missing or disabled: trigger check_event, index transactions_txid", "ENABLE TRIGGER")
    rows(url, f"GRANT pg_read_all_stats TO {name}")
    assert not [each for each in checks(blind) if "does not see" in each.found]
    assert "query" not in queries.WRITERS + queries.SNAPSHOTS


def test_strays_are_found(settings: Settings) -> None:
    rows(settings.database_url, "ALTER TABLE outbox.events DISABLE TRIGGER seal")
    add(settings.database_url, "a.b")
    rows(settings.database_url, "ALTER TABLE outbox.events ENABLE TRIGGER seal")
    named(settings, "belong to no transaction", "add them again")


def test_servers_that_are_not_there(settings: Settings) -> None:
    """Each is a line, and the other one is looked at all the same."""
    nowhere = {"database_url": "postgresql://postgres@127.0.0.1:1/x", "nats_url": "nats://127.0.0.1:1"}
    no_nats = checks(settings.model_copy(update={"nats_url": nowhere["nats_url"]}))
    assert [each.area for each in no_nats if each.colour is Colour.RED] == ["stream"]
    assert any(each.name == "drift" for each in no_nats)
    no_postgres = checks(settings.model_copy(update={"database_url": nowhere["database_url"]}))
    assert [each.area for each in no_postgres if each.colour is Colour.RED] == ["database"]
    assert any(each.name == "account" for each in no_postgres)
    assert [each.colour for each in checks(settings.model_copy(update=nowhere))] == [Colour.RED, Colour.RED]
