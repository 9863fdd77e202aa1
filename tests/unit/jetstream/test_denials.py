"""What NATS denies, and what is weather."""

from __future__ import annotations

import ssl

import nats.errors
import pytest

from outbox.jetstream.denials import denial


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
    denied = denial("n:4222", error)
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
    assert denial("n:4222", error) is None
