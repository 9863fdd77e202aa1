"""TLS to both servers: what must work publishes an event; what cannot is refused at the start, with its remedy."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Unreachable
from outbox.embedded import Nats, Postgres, free_port
from outbox.errors import Denied, Misconfigured, Weather
from outbox.jetstream.client import JetStream
from outbox.jetstream.connect import Servers, close, dial
from outbox.jetstream.credentials import tls_context
from outbox.operate import status
from tests.support.authority import Authority, Pair
from tests.support.bed import ThreadRelay, broker_of, rows, value, wait_until_sent
from tests.support.guarded import SECRET, Guarded
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, own_nats


def tls_nats(folder: Path, pair: Pair, more: str = "") -> Nats:
    return own_nats(folder, config=f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}", timeout: 1, {more} }}')


def publishes(settings: Settings) -> None:
    """The relay with these settings makes a stream and publishes an event to it."""
    broker_of(settings).create_stream("TLS", "tls.>")
    rows(settings.database_url, "SELECT outbox.add('tls.x', 'y')")
    with ThreadRelay(settings):
        wait_until_sent(settings.database_url)
    assert (
        value(settings.database_url, "SELECT stream FROM outbox.transactions ORDER BY position DESC LIMIT 1") == "TLS"
    )


def refusal(settings: Settings) -> Misconfigured:
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Misconfigured), error
    assert error.remedy
    return error


# --- NATS


@pytest.mark.parametrize("way", ["ca", "client certificate", "handshake first"])
def test_nats_over_tls(way: str, database: str, workplace: Path, authority: Authority) -> None:
    client = authority.issue(user="relay")
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "ca": ("", {}),
        "client certificate": (
            f'verify: true, ca_file: "{authority.ca}"',
            {"nats_tls_cert": client.cert, "nats_tls_key": client.key},
        ),
        "handshake first": ("handshake_first: true", {"nats_tls_first": True}),
    }
    more, further = ways[way]
    with tls_nats(workplace / "nats", authority.issue("127.0.0.1"), more) as server:
        publishes(Settings(database_url=database, nats_url=server.url, nats_tls_ca=authority.ca, **further))


async def test_nats_that_only_offers_tls_gets_it(workplace: Path, authority: Authority) -> None:
    """nats-py by itself would talk in the clear."""
    server = tls_nats(workplace / "nats", authority.issue("127.0.0.1"))
    monitor = free_port()
    server.config += f"\nallow_non_tls: true\nhttp: 127.0.0.1:{monitor}"
    settings = Settings(nats_url=server.url, nats_tls_ca=authority.ca)
    with server:
        jetstream = await JetStream.connect(settings)
        answer = await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{monitor}/connz")
        with answer:
            (connection,) = json.load(answer)["connections"]
        await jetstream.close()
    assert connection["tls_version"] == "1.3"


REFUSED: dict[str, tuple[str, str]] = {
    "expired": ("certificate has expired", "renew the server's certificate"),
    "other name": ("mismatch|not valid for", "OUTBOX_NATS_URL"),
    "unknown authority": ("unable to get local issuer|self-signed", "OUTBOX_NATS_TLS_CA"),
    "no client certificate": ("asks for a client certificate", "OUTBOX_NATS_TLS_CERT"),
    "strange client certificate": ("unknown ca|bad certificate", "OUTBOX_NATS_TLS_CERT"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_nats_refused(why: str, database: str, workplace: Path, authority: Authority) -> None:
    pair = authority.issue("elsewhere.example" if why == "other name" else "127.0.0.1", expired=why == "expired")
    more = f'verify: true, ca_file: "{authority.ca}"' if why.endswith("client certificate") else ""
    further: dict[str, Any] = {} if why == "unknown authority" else {"nats_tls_ca": authority.ca}
    if why == "strange client certificate":
        client = Authority(workplace / "strange").issue(user="relay")
        further |= {"nats_tls_cert": client.cert, "nats_tls_key": client.key}
    with tls_nats(workplace / "nats", pair, more) as server:
        error = refusal(Settings(database_url=database, nats_url=server.url, **further))
    words, remedy = REFUSED[why]
    assert re.search(words, error.message), error
    assert remedy in error.remedy


@pytest.mark.parametrize("first", [False, True])
async def test_objection_to_a_client_certificate_is_heard(first: bool, workplace: Path, authority: Authority) -> None:
    """The server says it after the handshake; who is writing by then sees a broken pipe, more often than not."""
    more = f'verify: true, ca_file: "{authority.ca}", handshake_first: {str(first).lower()}'
    client = Authority(workplace / "strange").issue(user="relay")
    given = {"nats_tls_ca": authority.ca, "nats_tls_cert": client.cert, "nats_tls_key": client.key}

    async def busy() -> None:
        for _ in itertools.count():
            await asyncio.sleep(0)

    with tls_nats(workplace / "nats", authority.issue("127.0.0.1"), more) as server:
        settings = Settings(nats_url=server.url, nats_tls_first=first, **given)
        others = [asyncio.create_task(busy()) for _ in range(20)]
        for _ in range(10):
            with pytest.raises(Denied, match="unknown ca"):
                await JetStream.connect(settings)
        for other in others:
            other.cancel()


@pytest.mark.parametrize("scheme", ["nats", "tls"])
def test_nats_without_tls_is_refused_before_any_secret_is_sent(
    scheme: str, database: str, nats: Nats, authority: Authority
) -> None:
    url = f"{scheme}://user:{SECRET}@127.0.0.1:{nats.port}"
    further = {} if scheme == "tls" else {"nats_tls_ca": authority.ca}
    settings = Settings(database_url=database, nats_url=url, **further)
    with NatsProxy(nats.port) as proxy:
        settings = settings.model_copy(update={"nats_url": url.replace(str(nats.port), str(proxy.port))})
        error = refusal(settings)
        assert proxy.connections
        assert proxy.up.bytes == 0
    assert "no TLS" in error.message
    assert SECRET not in str(error)


def test_nats_that_does_not_begin_with_tls_is_refused(database: str, nats: Nats, authority: Authority) -> None:
    settings = Settings(database_url=database, nats_url=nats.url, nats_tls_ca=authority.ca, nats_tls_first=True)
    assert "OUTBOX_NATS_TLS_FIRST" in refusal(settings).remedy


def test_handshake_too_late_is_named(database: str, workplace: Path, authority: Authority) -> None:
    """Both wait for the other, and silence may be the weather: the relay goes on trying, with a hint."""
    with tls_nats(workplace / "nats", authority.issue("127.0.0.1"), "handshake_first: true") as server:
        settings = Settings(database_url=database, nats_url=server.url, nats_tls_ca=authority.ca)
        with ThreadRelay(settings) as relay:
            relay.wait_for(Unreachable, lambda each: each.server == "nats" and "OUTBOX_NATS_TLS_FIRST" in each.why)


async def test_handshake_too_early_is_named(workplace: Path, authority: Authority) -> None:
    """The server has said its first word in the clear before, and does not say it again: refused or silent."""
    with tls_nats(workplace / "nats", authority.issue("127.0.0.1")) as server:
        settings = Settings(nats_url=server.url, nats_tls_ca=authority.ca, nats_tls_first=True)
        with pytest.raises(Weather) as error:
            await JetStream.connect(settings)
    assert "OUTBOX_NATS_TLS_FIRST" in str(error.value)


async def test_one_wrong_server_of_several_is_no_reason(workplace: Path, authority: Authority) -> None:
    wrong = tls_nats(workplace / "wrong", authority.issue("elsewhere.example"))
    right = tls_nats(workplace / "right", authority.issue("127.0.0.1"))

    async def connect(*urls: str) -> None:
        settings = Settings(nats_url=",".join(urls), nats_tls_ca=authority.ca)
        jetstream = await JetStream.connect(settings)
        await jetstream.close()

    with wrong:
        with right:
            for _ in range(10):  # in an order of chance
                await connect(right.url, wrong.url)
        with pytest.raises(Weather) as error:
            await connect(right.url, wrong.url)
        assert not isinstance(error.value, Denied)
        with pytest.raises(Denied):
            await connect(wrong.url, wrong.url)


async def test_named_server_is_checked_by_the_name_that_was_given(workplace: Path, authority: Authority) -> None:
    """Fault: the server of the setting is gone, and the others, of which only addresses are known, have certificates
    for names alone. Promise: the next one is reached in TLS, and one that has another name, or no TLS, is not."""

    async def nothing(*_: object) -> None:
        pass

    right, wrong = authority.issue("localhost"), authority.issue("elsewhere.example")
    routes = [free_port() for _ in range(2)]
    others = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)

    def node(number: int, pair: Pair | None) -> Nats:
        tls = f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}" }}' if pair else ""
        cluster = f"cluster {{ name: two, listen: 127.0.0.1:{routes[number]}, routes: [{others}] }}"
        return own_nats(workplace / f"n{number}", config=f"server_name: n{number}\n{cluster}\n{tls}\n# no store_dir")

    first, second = node(0, right), node(1, right)
    servers = Servers([f"tls://localhost:{first.port}"])
    given: dict[str, Any] = {"tls": tls_context(authority.ca, None, None), "error_cb": nothing, "closed_cb": nothing}

    async def reached() -> str:
        client = await dial(servers, news=lambda: None, **given)
        name, writer = client._server_info["server_name"], client.wire._io_writer
        assert writer is not None
        assert writer.get_extra_info("cipher")
        await close(client)
        return str(name)

    with second:
        with first:
            while len(servers.in_order()) < 2:
                assert await reached() == "n0"
        assert await reached() == "n1"
    for pair in (wrong, None):
        second.config = node(1, pair).config
        with second, pytest.raises(Weather):
            await reached()


@pytest.mark.parametrize("broken", ["nats_tls_ca", "nats_tls_key", "nats_credentials"])
def test_broken_files_are_named(broken: str, database: str, nats: Nats, workplace: Path, authority: Authority) -> None:
    pair, other = authority.issue(user="relay"), authority.issue(user="other")
    junk = workplace / "junk.pem"
    junk.write_text("junk")
    given: dict[str, Path] = {
        "nats_tls_ca": {"nats_tls_ca": junk},
        "nats_tls_key": {"nats_tls_cert": pair.cert, "nats_tls_key": other.key},
        "nats_credentials": {"nats_credentials": junk},
    }[broken]
    error = refusal(Settings(database_url=database, nats_url=nats.url, **given))
    assert broken in error.remedy


# --- PostgreSQL


def test_postgres_verified(guarded: Guarded, authority: Authority, nats: Nats, stream: Stream) -> None:
    client = authority.issue(user="by_certificate")
    url = guarded.url(
        "by_certificate",
        sslmode="verify-full",
        sslrootcert=str(authority.ca),
        sslcert=str(client.cert),
        sslkey=str(client.key),
    )
    rows(guarded.server.url(), "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
    with ThreadRelay(Settings(database_url=url, nats_url=nats.url)):
        wait_until_sent(guarded.server.url())


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("expired", "certificate verify failed"),
        ("other name", "does not match host name"),
        ("unknown authority", "certificate verify failed"),
        ("no certificate file", "root certificate file"),
        ("no client certificate", "valid client certificate"),
        ("in the clear", "no encryption"),
    ],
)
def test_postgres_refused(why: str, words: str, guarded: Guarded, workplace: Path, authority: Authority) -> None:
    name, ca = ("elsewhere.example" if why == "other name" else "127.0.0.1"), authority.ca
    if why == "unknown authority":
        ca = Authority(workplace / "other").ca
    if why == "no certificate file":
        ca = workplace / "none.pem"
    role = "by_certificate" if why == "no client certificate" else "by_password"
    mode = "disable" if why == "in the clear" else "verify-full"
    guarded.certificate(name, expired=why == "expired")
    try:
        url = guarded.url(role, password=SECRET, sslmode=mode, sslrootcert=str(ca))
        error = refusal(Settings(database_url=url))
        with pytest.raises(Denied) as command:
            status.status(url)
    finally:
        guarded.certificate("127.0.0.1")
    assert re.search(words, error.message), error
    assert command.value.remedy == error.remedy
    assert SECRET not in str(error)


def test_postgres_without_tls_is_refused(postgres: Postgres, authority: Authority) -> None:
    error = refusal(Settings(database_url=f"{postgres.url()}?sslmode=verify-full&sslrootcert={authority.ca}"))
    assert "does not support SSL" in error.message
