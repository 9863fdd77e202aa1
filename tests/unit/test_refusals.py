"""What a server denies, and what is weather: by code, else by the words of libpq and nats-server."""

from __future__ import annotations

import ssl

import nats.errors
import pytest

from outbox.jetstream import denials as nats_denials
from outbox.postgres import denials as postgres_denials

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
    denied = postgres_denials.denial(AT + words)
    assert denied is not None
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
    assert postgres_denials.denial(AT + words) is None


def certificate(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "what OpenSSL says"
    return error


def handshake(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}]")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (certificate(10), "renew"),
        (certificate(9), "clocks"),
        (certificate(62), "OUTBOX_NATS_URL"),
        (certificate(64), "OUTBOX_NATS_URL"),
        (certificate(19), "OUTBOX_NATS_TLS_CA"),
        (certificate(20), "OUTBOX_NATS_TLS_CA"),
        (handshake("WRONG_VERSION_NUMBER"), "OUTBOX_NATS_TLS_FIRST"),
        (handshake("TLSV13_ALERT_CERTIFICATE_REQUIRED"), "OUTBOX_NATS_TLS_CERT"),
        (handshake("SSLV3_ALERT_CERTIFICATE_EXPIRED"), "OUTBOX_NATS_TLS_CERT"),
        (handshake("TLSV1_ALERT_PROTOCOL_VERSION"), "TLS 1.2"),
        (nats.errors.Error("nats: 'Authorization Violation'"), "OUTBOX_NATS_PASSWORD"),
        (nats.errors.Error("nats: 'User Authentication Expired'"), "OUTBOX_NATS_CREDENTIALS"),
    ],
    ids=str,
)
def test_nats_denies(error: Exception, remedy: str) -> None:
    denied = nats_denials.denial("n:4222", error)
    assert denied is not None
    assert remedy in denied.remedy
    assert "n:4222" in denied.message


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "Connect call failed"),
        BrokenPipeError(32, "Broken pipe"),
        TimeoutError(),
        nats.errors.Error("nats: 'maximum connections exceeded'"),
        nats.errors.Error("nats: 'Authentication Timeout'"),
        handshake("UNEXPECTED_EOF_WHILE_READING"),
    ],
    ids=str,
)
def test_nats_is_weather(error: Exception) -> None:
    assert nats_denials.denial("n:4222", error) is None


def test_of_several_hosts_one_that_is_down_may_be_the_right_one() -> None:
    down, denied = "Connection refused\n", 'FATAL:  no pg_hba.conf entry for host "10.0.0.9"\n'
    assert postgres_denials.denial(AT + down + AT + denied) is None
    assert postgres_denials.denial(AT + denied + AT + denied) is not None
