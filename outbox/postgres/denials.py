"""Why PostgreSQL does not let us in, or does not do as we say: whose fault it is, and the remedy. Tables.

Pure. What is in no table is weather, which is told. Of a connection that was not made there are only words, in English:
a server that speaks another language is waited for, and its words are shown. Else there is a SQLSTATE.
"""

from __future__ import annotations

import re

from outbox.errors import Denied, Halt, Locked, Misconfigured, OutboxError, Weather
from outbox.text import masked

# libpq gives no SQLSTATE for a connection that was not made, and no code for TLS. Read from top to bottom.
DENIALS = {
    r"password authentication failed|no password supplied|(?:SASL|SCRAM) authentication": (
        "give the right user and password: in OUTBOX_DATABASE_URL or its file, a passfile or a service file of libpq; "
        "a relay that runs reads these files anew at each connection"
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
WEATHER = {
    r"too many connections for role": (
        "end other sessions of this role, or as a superuser: ALTER ROLE … CONNECTION LIMIT …"
    ),
    r"too many connections for database": "end other sessions there, or: ALTER DATABASE … CONNECTION LIMIT …",
    r"too many clients|remaining connection slots|no more connections allowed": (
        "end sessions that nobody needs (pg_stat_activity shows them), or raise max_connections in the server"
    ),
    r"the database system is": "wait until the server has started: its log says how far it is",
}

READ_ONLY = "the database is read-only"
UNWRITABLE = (
    "name the primary in OUTBOX_DATABASE_URL; or, if the server's configuration has default_transaction_read_only on: "
    "ALTER SYSTEM RESET default_transaction_read_only, and SELECT pg_reload_conf()"
)
DRIFTED = "outbox migrate --check says what is not as it should be; outbox doctor looks at the rest"
GRANTS = (
    "as the owner: outbox migrate --relay-role ROLE (or --operator-role, --application-role); "
    "outbox migrate and outbox rebase of a database are the owner's own, outbox purge is the relay's"
)
CORRUPT = "look at the server's log and its disk; REINDEX, or restore a backup: outbox doctor, then outbox verify"

UNCHANGEABLE: tuple[type[OutboxError], str, str] = (
    Misconfigured,
    "this role inherits a setting that the outbox cannot work with, and may not change it",
    "as a superuser: ALTER ROLE … RESET session_replication_role; the same for the database and the server",
)
# Where one SQLSTATE says several things: with the function in the server that says it, as its words are translated.
BY_FUNCTION: dict[tuple[str, str], tuple[type[OutboxError], str, str]] = {
    ("42501", "check_enable_rls"): (
        Misconfigured,
        "row security would hide rows from this role",
        "ALTER TABLE … DISABLE ROW LEVEL SECURITY; or ALTER ROLE … BYPASSRLS",
    ),
    ("42501", "set_config_with_handle"): UNCHANGEABLE,
    ("42501", "set_config_option_ext"): UNCHANGEABLE,  # of older releases, as the next one
    ("42501", "set_config_option"): UNCHANGEABLE,
    ("0A000", "call_bool_check_hook"): (Weather, READ_ONLY, UNWRITABLE),  # BEGIN READ WRITE on a standby
}

# By SQLSTATE, else by its class, the first two digits: the kind, words before the server's own, and the remedy.
FAULTS: dict[str, tuple[type[OutboxError], str, str]] = {
    "08": (Weather, "", ""),
    "0A": (Weather, "", DRIFTED),  # a plan whose result changed under it: the next session makes a new one
    "22": (Weather, "", DRIFTED),
    "23": (Halt, "", "find out who changes the outbox's tables by hand, then start again"),
    "25": (Weather, "", ""),
    "25006": (Weather, READ_ONLY, UNWRITABLE),
    "26": (Weather, "", "give a direct connection, or one pooled in session mode (OUTBOX_DATABASE_URL)"),
    "28": (Denied, "", "give the right user and password: see OUTBOX_DATABASE_URL"),
    "3D": (Misconfigured, "", "create the database, or name another one in OUTBOX_DATABASE_URL"),
    "3F": (Misconfigured, "the outbox is not in this database", "outbox migrate"),
    "40": (Weather, "", ""),
    "42": (Weather, "", DRIFTED),
    "42501": (Misconfigured, "", GRANTS),
    "42P01": (Misconfigured, "the outbox is not in this database", "outbox migrate"),
    "42703": (Misconfigured, "the outbox is not in this database", "outbox migrate"),
    "53": (Weather, "", "see the server's log"),
    "53100": (Weather, "", "make room on the server's disk"),
    "53200": (Weather, "", "give the server more memory, or fewer sessions"),
    "53300": (Weather, "", "end sessions that nobody needs, or raise the limit of the server, database or role"),
    "54": (Weather, "", DRIFTED),
    "55": (Weather, "", ""),
    "55P03": (Locked, "", "see who holds it: pg_blocking_pids and pg_stat_activity; then run it again"),
    "57": (Weather, "", ""),
    "58": (Weather, "", "see the server's log and its disk"),
    "F0": (Weather, "", "see the server's log and its configuration"),
    "P0": (
        Weather,
        "",
        "a trigger or function says so: outbox migrate --check names those that are not ours",
    ),
    "XX": (Weather, "", "see the server's log"),
    "XX001": (Halt, "", CORRUPT),
    "XX002": (Halt, "", CORRUPT),
}


def fault(sqlstate: str | None, function: str | None, words: str) -> OutboxError:
    """A failed statement as one of our errors; `function` is the one in the server that said so."""
    code = sqlstate or ""
    kind, before, remedy = (
        BY_FUNCTION.get((code, function or "")) or FAULTS.get(code) or FAULTS.get(code[:2]) or (Weather, "", "")
    )
    line = _line(words)
    return kind(f"{before}: {line}" if before else line, remedy=remedy)


def refusal(words: str) -> Weather:
    """What libpq said when a connection was not made: `Denied` unless it is the weather."""
    line = _line(words)
    # Of several hosts each has its words, and one that is only down may be the one that would take us.
    each = line.split("connection to server at ")[1:] or [line]
    remedies = ["" if _first(WEATHER, host) else _first(DENIALS, host) for host in each]
    if all(remedies):
        return Denied(line, remedy=remedies[0])
    return Weather(line, remedy=next(filter(None, (_first(WEATHER, host) for host in each)), ""))


def _line(words: str) -> str:
    """The server's words on one line; a password never gets out."""
    return masked(re.sub(r" LINE \d+: .*", "", " ".join(words.split())))


def _first(table: dict[str, str], words: str) -> str:
    return next((remedy for pattern, remedy in table.items() if re.search(pattern, words)), "")
