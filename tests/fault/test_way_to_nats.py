"""What fails is the way to NATS, or a server at its end: slow links, limits that are told late, servers that hang up,
addresses where nobody answers, servers that are about to stop. Promises 5 and 7."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked, Connected, Died, InDoubt, LeadEnded, Marked, Settled, Unreachable
from outbox.doctor.examine import examine
from outbox.embedded import Nats
from outbox.errors import Misconfigured
from outbox.jetstream.client import JetStream
from outbox.operate import status
from tests.support.bed import Broker, ThreadRelay, rows, until, wait_until_sent
from tests.support.cluster import Cluster, three_nodes
from tests.support.faults import add
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, own_nats


@pytest.fixture
def proxy(nats: Nats) -> Iterator[NatsProxy]:
    with NatsProxy(nats.port) as made:
        yield made


# --- links that are slow


@pytest.mark.parametrize(
    ("rate", "events", "size", "patience"),
    [
        pytest.param(500_000, 200, 10_000, 1, id="small"),
        pytest.param(1_500_000, 1000, 40_000, 10, id="40 MB", marks=pytest.mark.long),
    ],
)
def test_large_transaction_over_a_slow_link(
    database: str,
    broker: Broker,
    proxy: NatsProxy,
    stream: Stream,
    rate: int,
    events: int,
    size: int,
    patience: float,
) -> None:
    """Fault: a transaction takes several times as long to send as the relay waits for an ack. Promise: sent once."""
    add(database, f"{stream.prefix}.small")
    with ThreadRelay(Settings(database_url=database, nats_url=proxy.url, ack_timeout=patience)) as relay:
        relay.wait_for(Marked)
        after = len(relay.happenings)
        proxy.change(proxy.up, rate=rate)
        add(database, f"{stream.prefix}.large", events, size=size)
        wait_until_sent(database, patience=60)
        proxy.heal()
    assert not any(isinstance(each, InDoubt | Unreachable) for each in relay.happenings[after:])
    assert len(broker.read(stream.name)) == events + 1


@pytest.mark.long
def test_large_messages_are_read_back_over_a_slow_link(
    database: str, broker: Broker, proxy: NatsProxy, stream: Stream
) -> None:
    """Fault: the acks of sixteen messages of 1 MB are lost, and the stream is read back over 1.5 MB/s.

    Promise: it is, however long that takes, and nothing is sent twice.
    """
    rows(database, "UPDATE outbox.limits SET max_event_bytes = 1040000")
    with ThreadRelay(Settings(database_url=database, nats_url=proxy.url, ack_timeout=2)) as relay:
        add(database, f"{stream.prefix}.small")
        relay.wait_for(Marked)
        proxy.acks = "drop"
        for number in range(16):
            add(database, f"{stream.prefix}.{number}", size=1_000_000)
        until(lambda: broker.last_sequence(stream.name) > 8)
        proxy.change(proxy.down, rate=1_500_000)
        after = len(relay.happenings)
        until(lambda: any(isinstance(each, Settled) and each.stored for each in relay.happenings[after:]), patience=60)
        proxy.acks = "pass"
        wait_until_sent(database, patience=60)
        proxy.heal()
    assert len(broker.read(stream.name)) == 17


async def test_questions_wait_behind_what_is_being_sent(proxy: NatsProxy, broker: Broker, stream: Stream) -> None:
    """Fault: a batch is on a slow link for longer than an answer may take. Promise: who asks meanwhile is answered."""
    jetstream = await JetStream.connect(Settings(nats_url=proxy.url))
    proxy.change(proxy.up, rate=200_000)
    jetstream._nc.wire.write(b"PUB elsewhere 1000000\r\n" + bytes(1_000_000) + b"\r\n")
    assert await jetstream.stream_of(f"{stream.prefix}.x") == stream.name
    await jetstream.close()


# --- servers that hang up, and limits that are told late

ACCOUNT = """
accounts {{ A {{ jetstream: enabled, users: [ {{ user: relay, password: secret }} ], {more} }} }}
"""


@contextlib.contextmanager
def account(folder: Path, more: str, config: str = "") -> Iterator[tuple[Nats, str]]:
    """A server with one account, and its URL with the user."""
    with own_nats(folder, config=ACCOUNT.format(more=more) + config) as server:
        assert isinstance(server, Nats)
        yield server, f"nats://relay:secret@127.0.0.1:{server.port}"


def test_account_takes_less_than_its_server_says(database: str, workplace: Path) -> None:
    """Fault: the account's max_payload is lower than the server's, which is all that the first INFO tells.

    Promise: what is too large is set aside with its reason, the others are sent, over one connection.
    """
    with account(workplace / "nats", "limits { max_payload: 100000 }") as (_, url):
        Broker(url).create_stream("S", "s.>")
        for size in (10, 200_000, 20):
            add(database, "s.x", size=size)
        with ThreadRelay(Settings(database_url=database, nats_url=url)) as relay:
            wait_until_sent(database)
        assert [each.verdict.reason for each in relay.happenings if isinstance(each, Died)] == ["message-too-large"]
        assert sum(isinstance(each, Connected) and each.server == "nats" for each in relay.happenings) == 1
        assert [len(each.payload) for each in Broker(url).read("S")] == [10, 20]


@pytest.mark.parametrize("to", [100_000, 3_000_000])
def test_server_is_reloaded_with_another_limit(database: str, workplace: Path, to: int) -> None:
    """Fault: max_payload is changed by a reload, below or above what waits. Promise: the limit that holds is used."""
    server = own_nats(workplace / "nats", config="max_payload: 1000000")
    with server:
        Broker(server.url).create_stream("S", "s.>")
        rows(database, "UPDATE outbox.limits SET max_event_bytes = 2500000")
        with ThreadRelay(Settings(database_url=database, nats_url=server.url)) as relay:
            add(database, "s.x", size=10)
            wait_until_sent(database)
            config = server.directory / "nats.conf"
            config.write_text(config.read_text().replace("max_payload: 1000000", f"max_payload: {to}"))
            server.send_signal(signal.SIGHUP)
            until(lambda: f"Reloaded: max_payload = {to}" in log(server), what="a reload")
            for size in (2_000_000, 200_000, 20):
                add(database, "s.x", size=size)
            wait_until_sent(database)
        dead = [each.verdict.reason for each in relay.happenings if isinstance(each, Died)]
        assert len(dead) == {100_000: 2, 3_000_000: 0}[to]
        assert [len(each.payload) for each in Broker(server.url).read("S")] == [10, 2_000_000, 200_000, 20][
            :: 3 if dead else 1
        ]


def log(server: Nats) -> str:
    return "".join(each.read_text(errors="replace") for each in server.directory.glob("*.log"))


@pytest.mark.parametrize(("events", "size"), [(1, 10), (30, 50_000)], ids=["short", "while more is written"])
def test_server_hangs_up_over_what_it_is_sent(database: str, workplace: Path, events: int, size: int) -> None:
    """Fault: the server hangs up over a transaction, each time that it is sent. Promise: blocked, for the true reason.

    A few connections find that out, not hundreds; then it is set aside.
    """
    config = "max_control_line: 200"
    with own_nats(workplace / "nats", config=config) as server, NatsProxy(server.port) as proxy:
        Broker(f"nats://127.0.0.1:{server.port}").create_stream("S", "s.>")
        with ThreadRelay(Settings(database_url=database, nats_url=proxy.url)) as relay:
            add(database, "s.x")
            wait_until_sent(database)
            before = proxy.connections
            add(database, f"s.{'x' * 200}", events, size=size)
            relay.wait_for(Blocked, lambda each: "maximum control line exceeded" in each.why)
            until(lambda: any("times in a row" in str(each.blocked) for each in status.status(database).streams))
            assert proxy.connections - before < 10
            died = relay.wait_for(Died).verdict
            assert (died.position, died.reason) == (2, "ends-connections")
            assert "maximum control line exceeded" in died.detail
            add(database, "s.x")
            wait_until_sent(database)
            assert proxy.connections - before < 20
    delays = [each.delay for each in relay.happenings if isinstance(each, Unreachable)]
    assert 0 < max(delays) <= 3


@pytest.mark.parametrize("words", [True, False], ids=["with a reason", "without a word"])
def test_offender_over_which_connections_end_is_found_among_many(database: str, workplace: Path, words: bool) -> None:
    """Fault: one of 60 transactions ends each connection that it is sent over. Promise: the others flow, in order,

    and so does another stream, which uses the same connections.
    """
    config = "max_control_line: 200" if words else ""
    with own_nats(workplace / "nats", config=config) as server, NatsProxy(server.port) as proxy:
        proxy.poison = b"poison"
        broker = Broker(f"nats://127.0.0.1:{server.port}")
        broker.create_stream("S", "s.>")
        broker.create_stream("OTHER", "other.>")
        add(database, "s.x")
        with ThreadRelay(Settings(database_url=database, nats_url=proxy.url), drain=True) as relay:
            assert relay.ended() is None
        bad = f"s.{'x' * 200}" if words else "s.poison"
        for number in range(60):
            add(database, bad if number == 20 else "s.x")
            add(database, "other.x")
        with ThreadRelay(Settings(database_url=database, nats_url=proxy.url)) as relay:
            wait_until_sent(database, patience=60)
        dead = rows(database, "SELECT position, split_part(dead_reason, ':', 1) FROM outbox.dead")
        assert dead == [(42, "ends-connections")]
        assert [each.position for each in broker.read("S")] == [1, *(n for n in range(2, 122, 2) if n != 42)]
        assert [each.position for each in broker.read("OTHER")] == list(range(3, 122, 2))
        assert not any(isinstance(each, LeadEnded) for each in relay.happenings[:-3])


# --- addresses where nobody answers


@contextlib.contextmanager
def silent(how: str, address: str, port: int) -> Iterator[None]:
    """Somebody who does not let us in, at this address."""
    held: list[socket.socket] = []
    with socket.create_server((address, port), backlog=0) as listener:
        if how == "drops":  # who is beyond the backlog is not answered
            for _ in range(2):
                held.append(each := socket.socket())
                each.setblocking(False)
                each.connect_ex((address, port))
        else:

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        made, _ = listener.accept()
                        if how == "hangs up":
                            made.close()
                        else:
                            held.append(made)
                        if how in ("no PONG", "no handshake"):
                            tls = b', "tls_required": true' if how == "no handshake" else b""
                            made.sendall(b'INFO {"version": "2.15.1", "max_payload": 1048576%s}\r\n' % tls)

            threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            for each in held:
                each.close()


@pytest.mark.parametrize("how", ["drops", "no INFO", "no handshake", "no PONG", "hangs up", "refuses", "no route"])
@pytest.mark.parametrize("of", ["a name", "the setting"])
async def test_first_address_does_not_let_us_in(nats: Nats, how: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the first address of a name, or of the setting, is silent or turns us away. Promise: the next one."""
    before = {"no route": "192.0.2.1"}.get(how, "127.0.0.2")
    resolve = socket.getaddrinfo

    def resolved(host: Any, port: Any, *more: Any, **further: Any) -> Any:
        if host != "nats.test":
            return resolve(host, port, *more, **further)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in (before, "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr("random.sample", lambda these, _: list(these))
    url = f"nats://nats.test:{nats.port}" if of == "a name" else f"nats://{before}:{nats.port},{nats.url}"
    with contextlib.ExitStack() as stack:
        if how not in ("refuses", "no route"):
            stack.enter_context(silent(how, before, nats.port))
        jetstream = await JetStream.connect(Settings(nats_url=url))
        assert await jetstream.stream_of("nowhere") is None
        await jetstream.close()


async def test_one_name_of_several_does_not_exist(nats: Nats) -> None:
    """Fault: a name of the setting cannot be resolved. Promise: the others are tried."""
    jetstream = await JetStream.connect(Settings(nats_url=f"nats://nowhere.invalid:4222,{nats.url}"))
    await jetstream.close()


# --- servers that stop, in a cluster


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Cluster]:
    with three_nodes(home / "way") as made:
        yield made


@pytest.mark.parametrize("how", ["killed", "lame duck"])
def test_only_server_of_the_setting_stops(database: str, cluster: Cluster, how: str) -> None:
    """Fault: the setting names one server of three, and that one is killed, or about to stop.

    Promise: the relay goes to one that it has named, and on.
    """
    number = {"killed": 0, "lame duck": 1}[how]
    server = list(cluster.servers.values())[number]
    name = f"W{number}"
    cluster.create_stream(name, f"{name}.>")
    with ThreadRelay(Settings(database_url=database, nats_url=server.url)) as relay:
        add(database, f"{name}.before", 2)
        wait_until_sent(database)
        after = len(relay.happenings)
        try:
            server.send_signal(signal.SIGKILL if how == "killed" else signal.SIGUSR2)
            relay.wait_for(Unreachable, lambda each: each.server == "nats", after=after)
            if how == "lame duck":
                assert any("lame duck" in each.why for each in relay.happenings if isinstance(each, Unreachable))
            relay.wait_for(Connected, lambda each: each.server == "nats", after=after)
            assert not [each for each in relay.happenings[after:] if isinstance(each, Unreachable)][1:]
            add(database, f"{name}.after", 2)
            wait_until_sent(database)
        finally:
            server.restart(kill=True)
    assert len(cluster.read(name)) == 4


# --- accounts of their own ways

PRIVATE = """
accounts {{ A {{ jetstream: enabled, users: [
  {{ user: relay, password: secret, permissions: {{ publish: ">", subscribe: "{inbox}.>" }} }},
  {{ user: all, password: secret }}
] }} }}
"""


@pytest.mark.parametrize("inbox", ["_INBOX_relay", "_INBOX.relay.7"])
def test_account_allows_a_private_inbox_only(database: str, workplace: Path, inbox: str) -> None:
    """Fault: the relay may hear answers under a prefix of its own only. Promise: the setting is named; it works."""
    with own_nats(workplace / "nats", config=PRIVATE.format(inbox=inbox)) as server:
        at = f"127.0.0.1:{server.port}"
        Broker(f"nats://all:secret@{at}").create_stream("S", "s.>")
        add(database, "s.x", 2)
        settings = Settings(database_url=database, nats_url=f"nats://relay:secret@{at}")
        error = ThreadRelay(settings).ended()
        assert isinstance(error, Misconfigured)
        assert "ermissions violation for subscription" in error.message.lower()
        assert "OUTBOX_NATS_INBOX_PREFIX" in error.remedy
        with ThreadRelay(settings.model_copy(update={"nats_inbox_prefix": inbox})):
            wait_until_sent(database)
        assert len(Broker(f"nats://all:secret@{at}").read("S")) == 2


def test_account_maps_a_subject(database: str, workplace: Path) -> None:
    """Fault: the account maps a subject to one that a stream has. Promise: status and doctor say so."""
    with account(workplace / "nats", "mappings { orders: orders.all }") as (_, url):
        Broker(url).create_stream("S", "orders.>")
        add(database, "orders")
        settings = Settings(database_url=database, nats_url=url)
        with ThreadRelay(settings) as relay:
            assert "mappings" in relay.wait_for(Blocked).why
            until(lambda: "the account maps it" in str(status.status(database).blocked))
        found = [each for each in asyncio.run(examine(settings)) if each.name == "subjects"]
        assert any("the account maps it" in each.found and "mappings" in each.remedy for each in found)
        assert Broker(url).last_sequence("S") == 0
