"""Credentials of both servers: each kind publishes an event; wrong ones are refused at the start, or waited out later.

No message shows a secret.
"""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nkeys
import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Connected, Marked, Unreachable
from outbox.embedded import Nats, Postgres
from outbox.errors import Denied, Misconfigured
from outbox.monitor.http import Health
from outbox.operate import migrate, status
from outbox.schema import grants
from outbox.sources import load
from tests.support.authority import Operator, new_key, public_of, seed_of
from tests.support.bed import Broker, ProcessRelay, ThreadRelay, broker_of, rows, until, wait_until_sent
from tests.support.guarded import SECRET
from tests.support.servers import Stream, clone, own_nats

WRONG, ODD = "another-s3cr3t", "p@ss/w%rd"


def refusal(settings: Settings) -> Misconfigured:
    relay = ThreadRelay(settings)
    error = relay.ended()
    assert isinstance(error, Misconfigured), error
    assert error.remedy
    assert not any(secret in f"{error} {relay.happenings}" for secret in (SECRET, WRONG))
    return error


# --- renewed under a relay that runs


def through_file(settings: Settings, **files: Path) -> Settings:
    """The same, with these settings from files of their own."""
    others = settings.model_dump(exclude_unset=True, exclude=set(files))
    environment = {f"OUTBOX_{name.upper()}_FILE": str(path) for name, path in files.items()}
    return load(environment, Path("no.toml"), **others).settings


def says(name: str, words: str, unreachable: Unreachable) -> bool:
    return name in unreachable.why and words in unreachable.why


def test_postgres_password_in_a_file_is_read_for_each_connection(
    passwords: Postgres, nats: Nats, stream: Stream, workplace: Path
) -> None:
    """Fault: a password is renewed, and its file is late, gone or garbage. Promise: said, tried again, and taken up."""
    database, file = clone(passwords), workplace / "url"
    migrate.grant(database, "outbox", relay="by_password")

    def write(password: str) -> None:
        file.write_text(psycopg.conninfo.make_conninfo(database, user="by_password", password=password) + "\n")

    def cut() -> None:
        rows(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'by_password'")

    write(SECRET)
    health = Health()
    try:
        with ThreadRelay(
            through_file(Settings(nats_url=nats.url), database_url=file), listener=health.happened
        ) as relay:
            rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
            relay.wait_for(Marked)
            rows(database, f"ALTER ROLE by_password PASSWORD '{WRONG}'")
            cut()
            relay.wait_for(Unreachable, lambda each: "password authentication failed" in each.why)
            assert "password authentication failed" in str(until(lambda: health.problem))
            garbage = {"": "is empty", f"host={SECRET} {SECRET}": "is neither a URL", "no file": "cannot be read"}
            for content, words in garbage.items():
                file.write_text(content)
                if content == "no file":
                    file.unlink()
                relay.wait_for(Unreachable, partial(says, f"OUTBOX_DATABASE_URL_FILE: {file}", words))
            assert not any(secret in f"{relay.happenings}" for secret in (SECRET, WRONG))
            after = len(relay.happenings)
            write(WRONG)
            rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
            relay.wait_for(Marked, after=after)
            assert until(lambda: health.problem is None)
    finally:
        rows(database, f"ALTER ROLE by_password PASSWORD '{SECRET}'")


def test_nats_password_in_a_file_is_read_for_each_connection(database: str, workplace: Path) -> None:
    def config(password: str) -> str:
        return f'authorization {{ user: relay, password: "{password}", timeout: 1 }}'

    server, file = own_nats(workplace / "nats", config=config(SECRET)), workplace / "password"
    with server:
        settings = Settings(database_url=database, nats_url=server.url, nats_user="relay", nats_password=SECRET)
        broker_of(settings).create_stream("KEYS", "keys.>")
        file.write_text(SECRET)
        with ThreadRelay(through_file(settings, nats_password=file)) as relay:
            rows(database, "SELECT outbox.add('keys.x', 'y')")
            relay.wait_for(Marked)
            path = server.directory / "nats.conf"
            path.write_text(path.read_text().replace(server.config, config(WRONG)))
            server.send_signal(signal.SIGHUP)
            relay.wait_for(Unreachable, lambda each: "Authorization Violation" in each.why)
            file.unlink()
            relay.wait_for(Unreachable, lambda each: f"OUTBOX_NATS_PASSWORD_FILE: {file} cannot be read" in each.why)
            after = len(relay.happenings)
            file.write_text(WRONG)
            rows(database, "SELECT outbox.add('keys.x', 'y')")
            relay.wait_for(Marked, after=after)
            assert not any(secret in f"{relay.happenings}" for secret in (SECRET, WRONG))


# --- NATS


class Keys:
    """One server, and settings that it takes, for each kind of credentials."""

    def __init__(self, folder: Path) -> None:
        user, operator = new_key(nkeys.PREFIX_BYTE_USER), Operator()
        self.configs = {
            "password": f'authorization {{ user: relay, password: "{SECRET}" }}',
            "URL": f'authorization {{ user: relay, password: "{ODD}" }}',
            "token": f'authorization {{ token: "{SECRET}" }}',
            "token in the URL": f'authorization {{ token: "{SECRET}" }}',
            "nkey": f"authorization {{ users: [ {{ nkey: {public_of(user)} }} ] }}",
            "credentials": operator.config,
        }
        self.right: dict[str, dict[str, Any]] = {
            "password": {"nats_user": "relay", "nats_password": SECRET},
            "URL": {"nats_url": f"relay:{quote(ODD, safe='')}@"},
            "token": {"nats_token": SECRET},
            "token in the URL": {"nats_url": f"{SECRET}@"},
            "nkey": {"nats_nkey_seed": seed_of(user)},
            "credentials": {"nats_credentials": operator.credentials(folder / "relay.creds")},
        }
        self.wrong: dict[str, dict[str, Any]] = {
            "password": {"nats_user": "relay", "nats_password": WRONG},
            "URL": {"nats_url": f"relay:{WRONG}@"},
            "token": {"nats_token": WRONG},
            "token in the URL": {"nats_url": f"{WRONG}@"},
            "nkey": {"nats_nkey_seed": seed_of(new_key(nkeys.PREFIX_BYTE_USER))},
            "credentials": {"nats_credentials": operator.credentials(folder / "late.creds", lifetime=-5)},
        }


KINDS = ["password", "URL", "token", "token in the URL", "nkey", "credentials"]


@pytest.mark.parametrize("kind", KINDS)
def test_nats_takes_the_right_and_refuses_the_wrong(kind: str, database: str, workplace: Path) -> None:
    keys = Keys(workplace)

    def settings(server: Nats, given: dict[str, Any]) -> Settings:
        url = server.url.replace("//", f"//{given.get('nats_url', '')}")
        return Settings(**{**given, "database_url": database, "nats_url": url})

    with own_nats(workplace / "nats", config=keys.configs[kind]) as server:
        right = settings(server, keys.right[kind])
        # nats-py does not decode a URL's password.
        broker = Broker(server.url, user="relay", password=ODD) if kind == "URL" else broker_of(right)
        broker.create_stream("KEYS", "keys.>")
        rows(database, "SELECT outbox.add('keys.x', 'y')")
        for given in ({}, keys.wrong[kind]):
            error = refusal(settings(server, given))
            assert "Authorization Violation" in error.message
            assert "OUTBOX_NATS_PASSWORD" in error.remedy
        with ThreadRelay(right):
            wait_until_sent(database)


def test_nats_credentials_that_change_under_a_relay_are_waited_out(database: str, workplace: Path) -> None:
    def config(password: str) -> str:
        return f'authorization {{ user: relay, password: "{password}", timeout: 1 }}'

    server = own_nats(workplace / "nats", config=config(SECRET))

    def change(password: str) -> None:
        path = server.directory / "nats.conf"
        old, server.config = server.config, config(password)
        path.write_text(path.read_text().replace(old, server.config))
        server.send_signal(signal.SIGHUP)

    with server:
        settings = Settings(database_url=database, nats_url=server.url, nats_user="relay", nats_password=SECRET)
        broker_of(settings).create_stream("KEYS", "keys.>")
        with ThreadRelay(settings) as relay:
            rows(database, "SELECT outbox.add('keys.x', 'y')")
            relay.wait_for(Marked)
            change(WRONG)
            told = relay.wait_for(Unreachable, lambda each: "remedy" in each.why)
            assert told.server == "nats"
            rows(database, "SELECT outbox.add('keys.x', 'z')")
            change(SECRET)
            wait_until_sent(database)
        assert SECRET not in repr(relay.happenings)


def test_secrets_from_files_and_no_word_of_them_in_the_log(database: str, workplace: Path) -> None:
    (workplace / "password").write_text(f"{WRONG}\n")
    with own_nats(workplace / "nats", config=f'authorization {{ user: relay, password: "{SECRET}" }}') as server:
        environment = {
            "OUTBOX_DATABASE_URL": database,
            "OUTBOX_NATS_URL": server.url,
            "OUTBOX_NATS_USER": "relay",
            "OUTBOX_NATS_PASSWORD_FILE": str(workplace / "password"),
        }
        with ProcessRelay(workplace, environment) as relay:
            until(lambda: not relay.running)
            assert relay.stop() == 1
        assert "remedy: give credentials" in relay.log.read_text()
        assert WRONG not in relay.log.read_text()
        (workplace / "password").write_text(f"{SECRET}\n")
        broker_of(load(environment).settings).create_stream("KEYS", "keys.>")
        rows(database, "SELECT outbox.add('keys.x', 'y')")
        with ProcessRelay(workplace, environment) as relay:
            relay.wait_for("Marked")
            assert relay.stop() == 0
        assert SECRET not in relay.log.read_text()


# --- PostgreSQL


@pytest.fixture
def shop(passwords: Postgres) -> str:
    """A database in which the roles may do a relay's work, as its superuser's URL."""
    url = clone(passwords)
    for role in ("by_password", "by_nothing"):
        for statement in grants(relay=role):
            rows(url, statement)
    return url


@pytest.mark.parametrize("way", ["URL", "passfile", "service"])
def test_postgres_password(
    way: str, shop: str, nats: Nats, stream: Stream, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = psycopg.conninfo.conninfo_to_dict(shop)
    host, port, name = (str(words[key]) for key in ("host", "port", "dbname"))
    if way == "URL":
        url = shop.replace("postgres@", f"by_password:{SECRET}@")
    elif way == "passfile":
        passfile = workplace / "pgpass"
        passfile.write_text(f"{host}:{port}:*:by_password:{SECRET}\n")
        passfile.chmod(0o600)
        url = psycopg.conninfo.make_conninfo(shop, user="by_password", passfile=str(passfile))
    else:
        service = workplace / "pg_service.conf"
        service.write_text(
            f"[shop]\nhost={host}\nport={port}\ndbname={name}\nuser=by_password\npassword={SECRET}\nconnect_timeout=7\n"
        )
        monkeypatch.setenv("PGSERVICEFILE", str(service))
        url = "service=shop"
    rows(shop, "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
    with ThreadRelay(Settings(database_url=url, nats_url=nats.url)):
        wait_until_sent(shop)
    assert status.status(url).sent_transactions == 1


def test_service_of_the_owner_migrates(shop: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = psycopg.conninfo.conninfo_to_dict(shop)
    service = workplace / "pg_service.conf"
    service.write_text("[owner]\n" + "".join(f"{name}={value}\n" for name, value in words.items()))
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    migrate.migrate("service=owner", to=0)
    assert migrate.migrate("service=owner")[0] == 0
    assert migrate.problems("service=owner") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("postgres@", f"by_password:{WRONG}@"), "password authentication failed"),
        (("postgres@", "by_password@"), "no password supplied"),
        (("postgres@", f"by_nothing:{WRONG}@"), "pg_hba.conf rejects"),
        (("postgres@", "nobody_at_all@"), "does not exist"),
        (("/test_", "/no_test_"), "does not exist"),
        (("postgresql://", "service=none #"), "definition of service"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_postgres_refused(change: tuple[str, str], words: str, shop: str) -> None:
    url = "service=none" if "service" in change[1] else shop.replace(*change)
    error = refusal(Settings(database_url=url))
    assert words in error.message
    with pytest.raises(Denied) as command:
        status.status(url)
    assert command.value.remedy == error.remedy


def test_a_server_that_is_not_there_is_weather(workplace: Path) -> None:
    with ThreadRelay(Settings(database_url="postgresql://nobody@127.0.0.1:1/none")) as relay:
        assert "remedy" not in relay.wait_for(Unreachable).why


def test_postgres_password_that_changes_under_a_relay_is_waited_out(shop: str, nats: Nats, stream: Stream) -> None:
    url = shop.replace("postgres@", f"by_password:{SECRET}@")
    with ThreadRelay(Settings(database_url=url, nats_url=nats.url)) as relay:
        relay.wait_for(Connected, lambda each: each.server == "nats")
        rows(shop, f"ALTER ROLE by_password PASSWORD '{WRONG}'")
        rows(shop, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'by_password'")
        told = relay.wait_for(Unreachable, lambda each: each.server == "postgres" and "remedy" in each.why)
        assert "password authentication failed" in told.why
        rows(shop, f"ALTER ROLE by_password PASSWORD '{SECRET}'")
        rows(shop, "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
        wait_until_sent(shop)
    assert SECRET not in repr(relay.happenings)
