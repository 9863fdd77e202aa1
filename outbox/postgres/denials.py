"""Why PostgreSQL does not let us in as we are set up, and the remedy: tables.

Pure. What is in no table is weather. There are only words, in English: a server that speaks another language is waited
for, and its words are shown.
"""

from __future__ import annotations

import re

from outbox.errors import Denied
from outbox.text import masked

# libpq gives no SQLSTATE for a connection that was not made, and no code for TLS. Read from top to bottom.
DENIALS = {
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
WEATHER = r"the database system is|too many (?:clients|connections)|remaining connection slots"


def denial(words: str) -> Denied | None:
    """What libpq said when a connection was not made, if that is not the weather."""
    line = masked(" ".join(words.split()))
    # Of several hosts each has its words, and one that is only down may be the one that would take us.
    each = line.split("connection to server at ")[1:] or [line]
    remedies = ["" if re.search(WEATHER, host) else _first(DENIALS, host) for host in each]
    return Denied(line, remedy=remedies[0]) if all(remedies) else None


def _first(table: dict[str, str], words: str) -> str:
    return next((remedy for pattern, remedy in table.items() if re.search(pattern, words)), "")
