"""Why a server does not let us in as we are set up, and the remedy: tables, for both servers.

Pure. What is in no table is weather. Codes come first; where a library gives only words, these are the words, in
English: a server that speaks another language is waited for, and its words are shown.
"""

from __future__ import annotations

import re
import ssl

from outbox.errors import Denied
from outbox.text import masked

# libpq gives no SQLSTATE for a connection that was not made, and no code for TLS. Read from top to bottom.
POSTGRES = {
    r"password authentication failed|no password supplied|(?:SASL|SCRAM) authentication": (
        "give the right user and password: in OUTBOX_DATABASE_URL or its file, a passfile or a service file of libpq; "
        "a relay that runs reads its settings anew when it is restarted"
    ),
    r"no pg_hba\.conf entry|pg_hba\.conf rejects": (
        "allow this user, database and host in the server's pg_hba.conf, with or without TLS as the message says"
    ),
    r"valid client certificate|alert (?:bad certificate|certificate required|unknown ca|certificate expired)"
    r"|certificate authentication failed": (
        "give the certificate and key that the server asks for: sslcert and sslkey in OUTBOX_DATABASE_URL"
    ),
    r'FATAL: +role ".*" does not exist|is not permitted to log in|no such user|authentication failed for user': (
        "name a role that exists and may log in there: the user in OUTBOX_DATABASE_URL"
    ),
    r'FATAL: +database ".*" does not exist|no such database': (
        "create the database, or name another one in OUTBOX_DATABASE_URL"
    ),
    r"FATAL: +permission denied for database": "GRANT CONNECT ON DATABASE … TO this role",
    r"certificate verify failed": (
        "the server's certificate is expired: renew it; or its authority is not in sslrootcert: see OUTBOX_DATABASE_URL"
    ),
    r"server certificate for .* does not match host name|host name must be specified": (
        "connect by a name that the server's certificate has: the host in OUTBOX_DATABASE_URL"
    ),
    r"server does not support SSL": (
        "turn ssl on in the server; or, on a network that you trust, choose another sslmode in OUTBOX_DATABASE_URL"
    ),
    r"root certificate|certificate file|certificate revocation|private key|weak sslmode": (
        "see sslrootcert, sslcert and sslkey in OUTBOX_DATABASE_URL, and who may read these files"
    ),
    r"definition of service|service file|invalid \w+ value|invalid port number|could not match \d+": (
        "see OUTBOX_DATABASE_URL, libpq's service file and its variables (PG…)"
    ),
    r"channel binding|authentication method requirement": (
        "see channel_binding and require_auth in OUTBOX_DATABASE_URL, and the server's pg_hba.conf"
    ),
}
POSTGRES_WEATHER = r"the database system is|too many (?:clients|connections)|remaining connection slots"

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
NATS = {
    r"authorization violation|authentication (?:expired|revoked)": (
        "give credentials that the server knows: OUTBOX_NATS_USER and OUTBOX_NATS_PASSWORD, or one of "
        "OUTBOX_NATS_TOKEN, OUTBOX_NATS_NKEY_SEED and OUTBOX_NATS_CREDENTIALS"
    ),
    r"tls required|secure connection": "ask for TLS: tls:// in OUTBOX_NATS_URL, and OUTBOX_NATS_TLS_CA",
}


def by_postgres(words: str) -> Denied | None:
    """What libpq said when a connection was not made, if that is not the weather."""
    line = masked(" ".join(words.split()))
    # Of several hosts each has its words, and one that is only down may be the one that would take us.
    each = line.split("connection to server at ")[1:] or [line]
    remedies = ["" if re.search(POSTGRES_WEATHER, host) else _first(POSTGRES, host) for host in each]
    return Denied(line, remedy=remedies[0]) if all(remedies) else None


def by_nats(where: str, error: Exception) -> Denied | None:
    """What came of connecting to NATS, if that is not the weather; `where` is the server's host and port."""
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = CERTIFICATES.get(error.verify_code, OTHER_CERTIFICATE)
        return Denied(f"NATS at {where} has a certificate that is not accepted: {error.verify_message}", remedy=remedy)
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).lower().replace("_", " ")
        remedy = _first(HANDSHAKES, reason)
        return Denied(f"NATS at {where}: the TLS handshake has failed: {reason}", remedy=remedy) if remedy else None
    words = str(error).removeprefix("nats: ").strip("'")
    remedy = _first(NATS, words.lower())
    return Denied(f"NATS at {where} denies the connection: {masked(words)}", remedy=remedy) if remedy else None


def _first(table: dict[str, str], words: str) -> str:
    return next((remedy for pattern, remedy in table.items() if re.search(pattern, words)), "")
