"""What changes is the database's past: restored, copied, moved, or promoted with a lag. Promise 2, and nothing merged.

Transaction ids and positions are handed out again, while the old messages are still in the stream.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked
from outbox.embedded import Nats, Postgres
from outbox.errors import Halt
from outbox.operate import rebase
from outbox.operate.verify import verify
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.servers import Stream, own_postgres, prepared, standby_of


def add(url: str, subject: str, *payloads: str) -> None:
    """One transaction with these payloads."""
    rows(url, "SELECT outbox.add(%s, p) FROM unnest(%s::text[]) AS p", subject, list(payloads))


def send(settings: Settings, subject: str, *payloads: str) -> None:
    """A transaction for each payload, of two events each, sent."""
    for payload in payloads:
        add(settings.database_url, subject, payload, payload)
    assert ThreadRelay(settings, drain=True).ended() is None


def halts(settings: Settings) -> Halt:
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Halt), error
    assert "outbox rebase" in error.remedy
    return error


def payloads(broker: Broker, stream: Stream) -> list[str]:
    """The payload of each transaction in the stream, which are whole."""
    stored = broker.read(stream.name)
    assert [each.number for each in stored] == [1, 2] * (len(stored) // 2)
    assert [each.payload for each in stored[::2]] == [each.payload for each in stored[1::2]]
    return [each.payload.decode() for each in stored[::2]]


def anomalies(settings: Settings) -> list[str]:
    return [anomaly.kind for each in asyncio.run(verify(settings)) for anomaly in each.anomalies]


@pytest.mark.core
def test_older_physical_copy_halts_and_rebase_sends_nothing_twice(
    nats: Nats, broker: Broker, stream: Stream, workplace: Path
) -> None:
    """Fault: the data directory is put back to an older state; positions 3 and on are drawn again.

    Promise: the relay halts; after a rebase what the old state does not know as sent, and is stored, is not sent again.
    """
    server = own_postgres(workplace / "postgres")
    with server:
        prepared(server)
        settings = Settings(database_url=server.url(), nats_url=nats.url)
        send(settings, f"{stream.prefix}.x", "1", "2")
        add(server.url(), f"{stream.prefix}.x", "3", "3")  # committed before the copy, sent after it
    shutil.copytree(server.data, workplace / "copy")
    with server:
        send(settings, f"{stream.prefix}.x", "4", "5", "6")
    shutil.rmtree(server.data)
    (workplace / "copy").rename(server.data)
    if identity := server._identity():
        for each in (server.data, *server.data.rglob("*")):
            shutil.chown(each, identity["user"], identity["group"])
    with server:
        add(server.url(), f"{stream.prefix}.x", "other 4", "other 4")
        assert "cannot be there" in halts(settings).message
        done = asyncio.run(rebase.rebase(settings))
        assert (done.adopted, done.unknown) == (1, 6)  # "3" is marked; "4" to "6" are in the stream alone
        send(settings, f"{stream.prefix}.x", "7")
        assert value(server.url(), "SELECT max(position) FROM outbox.transactions") > 6
        assert anomalies(settings) == []
    assert payloads(broker, stream) == ["1", "2", "3", "4", "5", "6", "other 4", "7"]


@pytest.mark.parametrize("left", [0, 1], ids=["all consumed", "one in the middle left"])
def test_older_physical_copy_halts_where_a_work_queue_was_worked_off(
    nats: Nats, broker: Broker, workplace: Path, left: int
) -> None:
    """Fault: the data directory is put back, on the same timeline, and consumers have taken what was sent since.

    Promise: what is gone is not taken for somebody else's: the relay halts, and a rebase settles it.
    """
    name, prefix = f"WORKED{left}", f"worked{left}"
    broker.create_stream(name, f"{prefix}.>", duplicate_window=100_000_000)
    server = own_postgres(workplace / "postgres")
    with server:
        prepared(server)
        settings = Settings(database_url=server.url(), nats_url=nats.url)
        send(settings, f"{prefix}.x", "1")
        add(server.url(), f"{prefix}.x", "2", "2")
    shutil.copytree(server.data, workplace / "copy")
    with server:
        send(settings, f"{prefix}.x", "3", "4", "5")
    shutil.rmtree(server.data)
    (workplace / "copy").rename(server.data)
    if identity := server._identity():
        for each in (server.data, *server.data.rglob("*")):
            shutil.chown(each, identity["user"], identity["group"])
    last = broker.last_sequence(name)
    for sequence in range(1, last + 1):
        if not (left and sequence == last - 2):
            broker.api(f"STREAM.MSG.DELETE.{name}", {"seq": sequence})
    with server:
        add(server.url(), f"{prefix}.x", "other 3", "other 3")
        words = halts(settings).message
        assert ("cannot be there" if left else "the database is an older copy") in words
        assert value(server.url(), "SELECT mode FROM outbox.streams") == "chained"
        asyncio.run(rebase.rebase(settings))
        send(settings, f"{prefix}.x", "6")
        assert value(server.url(), "SELECT count(*) FROM outbox.dead") == 0
    stored = [each.payload.decode() for each in broker.read(name)]
    assert stored[left::2] == ["2", "other 3", "6"]  # "2" was sent and consumed after the copy: nobody can tell
    broker.api(f"STREAM.DELETE.{name}")


def test_other_writers_of_a_work_queue_are_no_halt(database: str, nats: Nats, broker: Broker) -> None:
    """Fault: others write while no relay leads; some of theirs are left. Promise: the relay shares the stream."""
    broker.create_stream("OTHERS", "others.>", retention="workqueue")
    settings = Settings(database_url=database, nats_url=nats.url)
    send(settings, "others.x", "1")
    for _ in range(3):
        broker.publish("others.foreign")
    for sequence in (3, 5):
        broker.api("STREAM.MSG.DELETE.OTHERS", {"seq": sequence})
    send(settings, "others.x", "2")
    assert value(database, "SELECT mode FROM outbox.streams") == "shared"
    broker.publish("others.foreign")
    broker.api("STREAM.PURGE.OTHERS")
    send(settings, "others.x", "3")
    broker.api("STREAM.DELETE.OTHERS")


def test_dump_and_restore_elsewhere_halts_and_rebase_settles_it(
    nats: Nats, broker: Broker, stream: Stream, postgres: Postgres, database: str, workplace: Path
) -> None:
    """Fault: dump and restore into a new cluster. Promise: refused before it reads; nothing twice, nothing merged."""
    settings = Settings(database_url=database, nats_url=nats.url)
    send(settings, f"{stream.prefix}.x", "1")
    add(database, f"{stream.prefix}.x", "2", "2")
    dump = workplace / "dump"
    tools = postgres.installation / "bin"
    subprocess.run([tools / "pg_dump", "-Fc", "-f", dump, "-d", database], check=True, capture_output=True)
    send(settings, f"{stream.prefix}.x", "3")
    with own_postgres(workplace / "new") as server:
        command = [str(tools / "pg_restore"), "--no-owner", "-d", server.url(), str(dump)]
        subprocess.run(command, check=True, capture_output=True)
        moved = Settings(database_url=server.url(), nats_url=nats.url)
        add(server.url(), f"{stream.prefix}.x", "other 3", "other 3")
        assert "not the database that the outbox was in" in halts(moved).message
        done = asyncio.run(rebase.rebase(moved))
        assert (done.adopted, done.unknown) == (1, 2)
        send(moved, f"{stream.prefix}.x", "4")
        txids = [int(txid) for (txid,) in rows(server.url(), "SELECT DISTINCT txid::text FROM outbox.events")]
        assert len(txids) == len(set(txids)) == 4
    assert payloads(broker, stream) == ["1", "2", "3", "other 3", "4"]


@pytest.mark.parametrize("consumed", [False, True], ids=["messages there", "messages removed"])
def test_failover_that_lost_commits_halts(nats: Nats, broker: Broker, workplace: Path, consumed: bool) -> None:
    """Fault: a standby that lags is promoted; what the relay had published since is in the stream alone, or gone.

    Promise: the new primary's positions are taken for nobody else's: the relay halts and names the command.
    """
    name, prefix = f"LOSSY{consumed:d}", f"lossy{consumed:d}"
    stream = Stream(name, prefix)
    broker.create_stream(name, f"{prefix}.>")
    primary = own_postgres(workplace / "primary", wal_keep_size="64")
    with primary:
        prepared(primary)
        settings = Settings(database_url=primary.url(), nats_url=nats.url)
        send(settings, f"{prefix}.x", "1")
        standby = standby_of(primary, workplace / "standby")
        with standby:
            caught_up(primary)
            standby.stop()
            send(settings, f"{prefix}.x", "2", "3")
            primary.kill()
            standby.start()
            rows(standby.url(), "SELECT pg_promote()")
            if consumed:
                broker.api(f"STREAM.PURGE.{name}")
                broker.publish(f"{prefix}.foreign")
            after = Settings(database_url=standby.url(), nats_url=nats.url)
            add(standby.url(), f"{prefix}.x", "other 2", "other 2")
            assert "promoted or restored" in halts(after).message or not consumed
            if consumed:
                broker.api(f"STREAM.PURGE.{name}")
            done = asyncio.run(rebase.rebase(after))
            assert done.unknown == (0 if consumed else 4)
            send(after, f"{prefix}.x", "4")
    assert payloads(broker, stream) == (["other 2", "4"] if consumed else ["1", "2", "3", "other 2", "4"])
    broker.api(f"STREAM.DELETE.{name}")


def test_clean_failover_goes_on_by_itself(nats: Nats, broker: Broker, stream: Stream, workplace: Path) -> None:
    """Fault: a standby that has everything is promoted. Promise: no human is needed."""
    primary = own_postgres(workplace / "primary")
    with primary:
        prepared(primary)
        send(Settings(database_url=primary.url(), nats_url=nats.url), f"{stream.prefix}.x", "1")
        add(primary.url(), f"{stream.prefix}.x", "2", "2")
        standby = standby_of(primary, workplace / "standby")
        with standby:
            caught_up(primary)
            primary.kill()
            rows(standby.url(), "SELECT pg_promote()")
            after = Settings(database_url=standby.url(), nats_url=nats.url)
            send(after, f"{stream.prefix}.x", "3")
            assert value(standby.url(), "SELECT timeline FROM outbox.relay") == 2
    assert payloads(broker, stream) == ["1", "2", "3"]


def caught_up(primary: Postgres) -> None:
    """Wait until the only standby has flushed everything."""
    until(lambda: rows(
        primary.url(),
        "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming' AND flush_lsn >= pg_current_wal_insert_lsn()",
    ))  # fmt: skip


def test_copy_within_the_cluster_halts(
    postgres: Postgres, database: str, nats: Nats, broker: Broker, stream: Stream
) -> None:
    """Fault: CREATE DATABASE … TEMPLATE of a live outbox. Promise: the copy halts before it reads anything."""
    settings = Settings(database_url=database, nats_url=nats.url)
    send(settings, f"{stream.prefix}.x", "1")
    name = database.rpartition("/")[2]
    rows(postgres.url(), f"CREATE DATABASE {name}_copy TEMPLATE {name}")
    copy = Settings(database_url=f"{database}_copy", nats_url=nats.url)
    add(copy.database_url, f"{stream.prefix}.x", "of the copy", "of the copy")
    assert "not the database that the outbox was in" in halts(copy).message
    send(settings, f"{stream.prefix}.x", "2")
    assert payloads(broker, stream) == ["1", "2"]


def test_stream_that_the_database_does_not_know_yet_holds_its_messages(
    database: str, nats: Nats, broker: Broker, stream: Stream
) -> None:
    """Fault: the database is older than its first contact with the stream. Promise: halts instead of sending on top."""
    settings = Settings(database_url=database, nats_url=nats.url)
    send(settings, f"{stream.prefix}.x", "1")
    rows(database, "DELETE FROM outbox.streams")
    add(database, f"{stream.prefix}.x", "2", "2")
    assert "does not know the stream" in halts(settings).message
    assert payloads(broker, stream) == ["1"]
    # The mark was lost too: the rebase finds it in the stream that takes the subjects of what is pending.
    rows(
        database,
        "UPDATE outbox.transactions SET sent_at = NULL, stream = NULL, first_sequence = NULL, last_sequence = NULL",
    )
    rows(database, "UPDATE outbox.relay SET cursor = 0")
    assert asyncio.run(rebase.rebase(settings)).adopted == 1
    assert anomalies(settings) == []
    send(settings, f"{stream.prefix}.x", "3")
    assert payloads(broker, stream) == ["1", "2", "3"]
    # The same old state once more: it knows nothing of the id that the outbox was given by the first rebase.
    rows(database, "DELETE FROM outbox.streams")
    rows(
        database,
        "UPDATE outbox.transactions SET sent_at = NULL, stream = NULL, first_sequence = NULL, last_sequence = NULL",
    )
    rows(database, "UPDATE outbox.relay SET cursor = 0, outbox_id = former_ids[1], former_ids = ARRAY[]::uuid[]")
    assert asyncio.run(rebase.rebase(settings)).adopted == 3
    send(settings, f"{stream.prefix}.x", "4")
    assert payloads(broker, stream) == ["1", "2", "3", "4"]


def test_rebase_refuses_while_a_relay_leads(
    database: str, stream: Stream, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebase, "LOCK_TRIES", 2)
    with ThreadRelay(settings) as relay:
        add(database, f"{stream.prefix}.x", "1")
        relay.wait_for(Marked)
        with pytest.raises(Exception, match="stop every relay"):
            asyncio.run(rebase.rebase(settings))
        with pytest.raises(Exception, match="stop every relay"):
            asyncio.run(rebase.accept_stream(settings, stream.name))
        wait_until_sent(database)
