"""What PostgreSQL denies, and what is weather."""

from __future__ import annotations

import pytest

from outbox.errors import Denied
from outbox.postgres.denials import refusal

AT = 'connection failed: connection to server at "10.0.0.1", port 5432 failed: '


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ('FATAL:  password authentication failed for user "u"', "right user and password"),
        ("fe_sendauth: no password supplied", "right user and password"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.2", user "u", database "d", no encryption', "pg_hba.conf"),
        ('FATAL:  role "u" does not exist', "role that exists"),
        ('FATAL:  Peer authentication failed for user "u"', "role that exists"),
        ('FATAL:  database "d" does not exist', "create the database"),
        ('FATAL:  permission denied for database "d"\nDETAIL:  User does not have CONNECT privilege.', "GRANT CONNECT"),
        ("SSL error: certificate verify failed", "renew it"),
        ('server certificate for "a" (and 1 other name) does not match host name "b"', "name that the server's"),
        ("server does not support SSL, but SSL was required", "turn ssl on"),
        ('private key file "k" has group or world access', "sslkey"),
        ("FATAL:  connection requires a valid client certificate", "sslcert"),
        ("SSL error: ssl/tls alert unknown ca", "sslcert"),
        ('definition of service "shop" not found', "service file"),
        ('invalid sslmode value: "x"', "service file"),
    ],
)
def test_postgres_denies(words: str, remedy: str) -> None:
    denied = refusal(AT + words)
    assert isinstance(denied, Denied)
    assert remedy in denied.remedy
    assert "\n" not in denied.line


@pytest.mark.parametrize(
    "words",
    [
        "Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?",
        "FATAL:  the database system is starting up",
        "FATAL:  the database system is shutting down",
        "FATAL:  sorry, too many clients already",
        "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
        "SSL SYSCALL error: EOF detected",
        "server closed the connection unexpectedly",
        "could not translate host name",
        "FATAL:  Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen",
    ],
)
def test_postgres_is_weather(words: str) -> None:
    assert not isinstance(refusal(AT + words), Denied)


def test_of_several_hosts_one_that_is_down_may_be_the_right_one() -> None:
    down, denied = "Connection refused\n", 'FATAL:  no pg_hba.conf entry for host "10.0.0.9"\n'
    assert not isinstance(refusal(AT + down + AT + denied), Denied)
    assert isinstance(refusal(AT + denied + AT + denied), Denied)
