"""Why NATS does not let us in as we are set up, and the remedy: tables.

Pure. What is in no table is weather. OpenSSL's codes come first; where nats-py gives only words, these are the words.
"""

from __future__ import annotations

import re
import ssl

from outbox.errors import Denied
from outbox.text import masked

# X509_V_ERR of OpenSSL; any other one is a matter of the authority too.
CERTIFICATES = {
    9: "its validity has not begun: see the clocks of both machines",
    10: "renew the server's certificate; or see the clock of this machine",
    62: "connect by a name that the certificate has: OUTBOX_NATS_URL",
    64: "connect by a name that the certificate has: OUTBOX_NATS_URL",
}
OTHER_CERTIFICATE = "name the authority that signed the server's certificate: OUTBOX_NATS_TLS_CA"

# OpenSSL's reasons, in capitals or in words.
HANDSHAKES = {
    r"wrong version number|record layer failure": (
        "the server does not begin with TLS: unset OUTBOX_NATS_TLS_FIRST, or turn TLS on in the server"
    ),
    r"alert (?:certificate expired|bad certificate|unknown ca|certificate unknown|certificate required)"
    r"|alert (?:access denied|certificate revoked|unsupported certificate)": (
        "give a client certificate that the server accepts: OUTBOX_NATS_TLS_CERT and OUTBOX_NATS_TLS_KEY"
    ),
    r"alert protocol version|unsupported protocol|no protocols available": "let the server speak TLS 1.2 or later",
}
DENIALS = {
    r"authorization violation|authentication (?:expired|revoked)": (
        "give credentials that the server knows: OUTBOX_NATS_USER and OUTBOX_NATS_PASSWORD, or one of "
        "OUTBOX_NATS_TOKEN, OUTBOX_NATS_NKEY_SEED and OUTBOX_NATS_CREDENTIALS"
    ),
    r"tls required|secure connection": "ask for TLS: tls:// in OUTBOX_NATS_URL, and OUTBOX_NATS_TLS_CA",
}


# What a server says when it ends a connection over what it was sent.
OFFENCES = r"maximum payload|control line|parser error|protocol operation|invalid publish|invalid subject|header"


def blames_what_was_sent(words: str) -> bool:
    """True if a server's last words blame what it was sent: sent again, it ends the connection again."""
    return re.search(OFFENCES, words.lower()) is not None


def denial(where: str, error: Exception) -> Denied | None:
    """What came of connecting to NATS, if that is not the weather; `where` is the server's host and port."""
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = CERTIFICATES.get(error.verify_code, OTHER_CERTIFICATE)
        return Denied(f"NATS at {where} has a certificate that is not accepted: {error.verify_message}", remedy=remedy)
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).lower().replace("_", " ")
        remedy = _first(HANDSHAKES, reason)
        return Denied(f"NATS at {where}: the TLS handshake has failed: {reason}", remedy=remedy) if remedy else None
    words = str(error).removeprefix("nats: ").strip("'")
    remedy = _first(DENIALS, words.lower())
    return Denied(f"NATS at {where} denies the connection: {masked(words)}", remedy=remedy) if remedy else None


def _first(table: dict[str, str], words: str) -> str:
    return next((remedy for pattern, remedy in table.items() if re.search(pattern, words)), "")
