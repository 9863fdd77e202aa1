"""PostgreSQL that asks who is there, for whom it matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.embedded import Postgres
from outbox.schema import grants
from tests.support.authority import Authority
from tests.support.bed import rows
from tests.support.guarded import BY_PASSWORD, OVER_TLS, SECRET, Guarded, ask
from tests.support.servers import own_postgres_with_tls, prepared


@pytest.fixture(scope="session")
def authority(home: Path) -> Authority:
    return Authority(home / "authority")


@pytest.fixture(scope="module")
def passwords(postgres: Postgres) -> Iterator[Postgres]:
    """The usual server asks two roles who they are; the others are trusted."""
    for role in ("by_password", "by_nothing"):
        if not rows(postgres.url(), "SELECT 1 FROM pg_roles WHERE rolname = %s", role):
            rows(postgres.url(), f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
    before = ask(postgres, BY_PASSWORD)
    yield postgres
    ask(postgres, before, password=False)


@pytest.fixture(scope="session")
def guarded(home: Path, authority: Authority) -> Iterator[Guarded]:
    """Debian's PostgreSQL where it is installed: the one from PyPI is built without TLS."""
    pair = authority.issue("127.0.0.1")
    files = {"ssl_cert_file": pair.cert, "ssl_key_file": pair.key, "ssl_ca_file": authority.ca}
    server = own_postgres_with_tls(home / "guarded", ssl="on", **{name: str(path) for name, path in files.items()})
    server.start()
    prepared(server)
    for role in ("by_certificate", "by_password"):
        rows(server.url(), f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
        for statement in grants(relay=role):
            rows(server.url(), statement)
    ask(server, OVER_TLS)
    yield Guarded(server, authority, pair)
    server.stop()
