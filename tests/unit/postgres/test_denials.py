"""What PostgreSQL denies, and what is weather."""

from __future__ import annotations

import pytest

from outbox.errors import Denied, Halt, Misconfigured, OutboxError, Weather
from outbox.postgres.denials import fault, refusal

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


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ('FATAL:  too many connections for role "u"', "ALTER ROLE"),
        ('FATAL:  too many connections for database "d"', "ALTER DATABASE"),
        ("FATAL:  sorry, too many clients already", "max_connections"),
        ("FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute", "max_connections"),
        ("FATAL:  the database system is starting up", "wait"),
    ],
)
def test_weather_that_somebody_can_mend_has_a_remedy(words: str, remedy: str) -> None:
    found = refusal(AT + words)
    assert not isinstance(found, Denied)
    assert remedy in found.remedy


# Every class of Appendix A of PostgreSQL's manual that an error of a statement may have.
CLASSES = {
    Weather: "03 08 09 0A 0B 0F 0L 0P 0Z 10 20 21 22 24 25 26 27 2B 2D 2F 34 38 39 3B 40 42 44 53 54 55 57 58 F0 P0 XX",
    Halt: "23",
    Denied: "28",
    Misconfigured: "3D 3F",
}


@pytest.mark.parametrize(("kind", "code"), [(kind, code) for kind, codes in CLASSES.items() for code in codes.split()])
def test_every_class_of_errors_is_somebodys(kind: type[OutboxError], code: str) -> None:
    found = fault(f"{code}Z99", None, "words of\n the server")
    assert type(found) is kind
    assert found.message.endswith("words of the server")


@pytest.mark.parametrize(
    ("code", "function", "kind", "words"),
    [
        (None, None, Weather, ""),  # the connection is lost, or psycopg itself cannot read or write a value
        ("25006", None, Weather, "the database is read-only"),
        ("0A000", "call_bool_check_hook", Weather, "the database is read-only"),
        ("42501", "aclcheck_error", Misconfigured, "outbox migrate --relay-role"),
        ("42501", "check_enable_rls", Misconfigured, "row security"),
        ("42501", "set_config_with_handle", Misconfigured, "session_replication_role"),
        ("42P01", None, Misconfigured, "outbox migrate"),
        ("42883", None, Weather, "outbox migrate --check"),
        ("53100", None, Weather, "make room"),
        ("XX001", None, Halt, "REINDEX"),
    ],
)
def test_fault(code: str | None, function: str | None, kind: type[OutboxError], words: str) -> None:
    found = fault(code, function, "words")
    assert type(found) is kind
    assert words in str(found)
