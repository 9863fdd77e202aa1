"""PostgreSQL that asks who is there: by password, or over TLS by certificate."""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass

import psycopg

from outbox.embedded import Postgres
from tests.support.authority import Authority, Pair
from tests.support.bed import rows, until

SECRET = "s3cr3t-of-nobody"  # what no message may show
SSL_REQUEST = struct.pack("!II", 8, 80877103)
BY_PASSWORD = """
host all by_password 127.0.0.1/32 scram-sha-256
host all by_nothing  127.0.0.1/32 reject
host all all         127.0.0.1/32 trust
"""
OVER_TLS = """
host    all postgres       127.0.0.1/32 trust
hostssl all by_certificate 127.0.0.1/32 cert
hostssl all by_password    127.0.0.1/32 scram-sha-256
"""


def ask(server: Postgres, access: str, *, password: bool = True) -> str:
    """Give the server another pg_hba.conf, wait until it goes by that, and return the one before."""
    file = server.data / "pg_hba.conf"
    before = file.read_text()
    file.write_text(access)
    rows(server.url(), "SELECT pg_reload_conf()")
    until(lambda: denies(server.url().replace("postgres@", "by_password@")) == password)
    return before


def denies(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return True
    return False


@dataclass(frozen=True)
class Guarded:
    """A server that nobody but its superuser may enter without TLS, and the certificate that it shows."""

    server: Postgres
    authority: Authority
    pair: Pair

    def url(self, role: str, **options: str) -> str:
        return psycopg.conninfo.make_conninfo(self.server.url().replace("postgres@", f"{role}@"), **options)

    def certificate(self, *names: str, expired: bool = False) -> None:
        """Give the server another certificate, and wait until it shows it."""
        self.authority.issue(*names, expired=expired, into=self.pair)
        rows(self.server.url(), "SELECT pg_reload_conf()")
        until(lambda: self._shown() == ssl.PEM_cert_to_DER_cert(self.pair.cert.read_text()))

    def _shown(self) -> bytes | None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", self.server.port)) as plain:
            plain.sendall(SSL_REQUEST)
            assert plain.recv(1) == b"S"
            with context.wrap_socket(plain) as secure:
                return secure.getpeercert(binary_form=True)
