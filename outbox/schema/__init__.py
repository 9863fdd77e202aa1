"""The database schema of an outbox, and the migration tooling's door: upgrade, downgrade, register, grants.

Knows the DDL by version, the locks' keys and the channel, as text: nothing connects, and SQLAlchemy is loaded only by
who registers the tables. Must not know the relay. The statements of version N are `ddl/000N_up.sql` and
`ddl/000N_down.sql`; the schema's name is composed into them as an identifier.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from typing import TYPE_CHECKING, Any, LiteralString, Protocol

from psycopg import sql

from outbox.errors import Misconfigured

if TYPE_CHECKING:
    import sqlalchemy as sa

VERSION = 2
UNRELEASED = {2}  # may still change in place: a database tells by a fingerprint which form of it it has
DEFAULT_SCHEMA = "outbox"
TABLES = ("events", "transactions", "streams", "relay", "limits", "housekeeping", "parts")

# First keys of the two-integer advisory locks: one constant per purpose; the second key tells the schemas apart.
LEADER_LOCK = 0x0B0C_0001
AWAKE_LOCK = 0x0B0C_0002

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,47}")


def checked_name(schema: str) -> str:
    """The name itself, or `Misconfigured`: lower-case letters, digits, underscores, at most 48, no leading digit."""
    if not _NAME.fullmatch(schema) or schema.startswith("pg_"):
        raise Misconfigured(
            f"schema name {schema!r} is not usable",
            remedy="use 1 to 48 lower-case letters, digits and underscores, not beginning with a digit or pg_",
        )
    return schema


def lock_key(schema: str) -> int:
    """Second key of this outbox's advisory locks, a signed 32-bit integer."""
    unsigned = zlib.crc32(schema.encode())
    return unsigned - (1 << 32) if unsigned >= 1 << 31 else unsigned


def channel(schema: str) -> str:
    """Name of the notification channel on which a sleeping relay is woken."""
    return f"outbox_{schema}"


def statements(version: int, direction: str, schema: str = DEFAULT_SCHEMA) -> Iterator[str]:
    """The SQL statements that go from version-1 to version (`direction` "up") or back ("down"), ready to execute."""
    checked_name(schema)
    names = {
        "schema": sql.Identifier(schema),
        "literal": sql.Literal(schema),
        "comment": sql.Literal(events_comment(version)),
        **{table: sql.Literal(f"{schema}.{table}") for table in TABLES},
        "channel": sql.Literal(channel(schema)),
        "key": sql.Literal(lock_key(schema)),
        "awake": sql.Literal(AWAKE_LOCK),
        **{name: sql.Literal(f"outbox.{schema}_{name}") for name in ("added", "sealed", "leads")},
    }
    for part in re.split(r";\n(?:\n|\Z)", _ddl(version, direction)):
        if statement := re.sub(r"\A(--.*\n|\s)*", "", part):
            yield sql.SQL(statement).format(**names).as_string()


def _ddl(version: int, direction: str) -> str:
    return resources.files("outbox.schema").joinpath("ddl", f"{version:04}_{direction}.sql").read_text()


def events_comment(version: int = VERSION) -> str:
    """The comment on the table `events`, which tells the version, and of an unreleased one what it was made by."""
    made_by = f" ({sha256(_ddl(version, 'up').encode()).hexdigest()[:8]})" if version in UNRELEASED else ""
    return f"outbox schema version {version}. One row per event; append-only.{made_by}"


def comments(version: int, schema: str = DEFAULT_SCHEMA) -> Iterator[str]:
    """The comments that the schema has at this version, for a database that was restored without them."""
    for each in range(1, version + 1):
        yield from (text for text in statements(each, "up", schema) if text.startswith("COMMENT ON"))


class Operations(Protocol):
    """What the functions below need of Alembic's `op`."""

    def execute(self, sqltext: Any, /) -> Any: ...  # noqa: D102 - Alembic's


def upgrade(op: Operations, *, to: int = VERSION, since: int = 0, schema: str = DEFAULT_SCHEMA) -> None:
    """Create the outbox, or bring it from version `since` to `to`, within an application's own Alembic revision.

    `op` is Alembic's `op`; works offline (`--sql`) too. Does not commit: the revision does.
    """
    for version in range(since + 1, to + 1):
        _execute(op, statements(version, "up", schema))


def downgrade(op: Operations, *, to: int = 0, since: int = VERSION, schema: str = DEFAULT_SCHEMA) -> None:
    """Take the outbox back from version `since` to `to`; 0 removes it with all its events. Does not commit."""
    for version in range(since, to, -1):
        _execute(op, statements(version, "down", schema))


def register(metadata: sa.MetaData, schema: str = DEFAULT_SCHEMA) -> dict[str, sa.Table]:
    """Register the outbox's tables in `metadata`, so that an application's autogenerate knows and leaves them alone.

    Returns the tables by name, for queries. Also teaches SQLAlchemy's reflection the type xid8. The triggers, functions
    and checks come from `upgrade` alone, so never `create_all` these tables.
    """
    from outbox.schema import tables

    return tables.described(metadata, schema)


def _execute(op: Operations, texts: Iterator[str]) -> None:
    for text in texts:
        op.execute(text.replace(":", "\\:"))  # Alembic takes :name for a parameter


def grants(
    schema: str = DEFAULT_SCHEMA,
    *,
    application: str | None = None,
    relay: str | None = None,
    operator: str | None = None,
) -> Iterator[str]:
    """GRANT statements that give existing roles the least they need; run them as the owner of the schema."""
    checked_name(schema)
    wanted = {"application": application, "relay": relay, "operator": operator}
    for kind, role in wanted.items():
        if role == "":
            raise Misconfigured(f"the {kind} role has no name", remedy=f"name an existing role: --{kind}-role ROLE")
        if role is not None:
            for privileges, what in GRANTS[kind]:
                names = {"schema": sql.Identifier(schema), "role": sql.Identifier(role)}
                yield sql.SQL(f"GRANT {privileges} ON {what} TO {{role}}").format(**names).as_string()


# By role: privileges, with their columns, and on what.
GRANTS: dict[str, tuple[tuple[LiteralString, LiteralString], ...]] = {
    "application": (
        ("USAGE", "SCHEMA {schema}"),
        ("INSERT (message_id, subject, headers, payload)", "{schema}.events"),
        ("EXECUTE", "FUNCTION {schema}.add(text, bytea, jsonb, uuid)"),
        ("EXECUTE", "FUNCTION {schema}.add(text, text, jsonb, uuid)"),
        ("EXECUTE", "FUNCTION {schema}.add(text, jsonb, jsonb, uuid)"),
    ),
    "relay": (
        ("USAGE", "SCHEMA {schema}"),
        ("SELECT, DELETE", "{schema}.events"),
        ("SELECT, DELETE", "{schema}.transactions"),
        ("UPDATE (sent_at, stream, first_sequence, last_sequence)", "{schema}.transactions"),
        ("UPDATE (dead_at, dead_reason, attempts)", "{schema}.transactions"),
        ("UPDATE (discarded_at)", "{schema}.transactions"),
        ("SELECT, INSERT, UPDATE", "{schema}.streams"),
        ("SELECT, UPDATE", "{schema}.relay"),
        ("SELECT, UPDATE", "{schema}.housekeeping"),
        ("SELECT, INSERT, UPDATE, DELETE", "{schema}.parts"),
        ("SELECT", "{schema}.limits, {schema}.pending, {schema}.dead"),
        ("SELECT", "SEQUENCE {schema}.events_id_seq, {schema}.transactions_position_seq"),
    ),
    "operator": (
        ("USAGE", "SCHEMA {schema}"),
        ("SELECT", "ALL TABLES IN SCHEMA {schema}"),
        ("SELECT", "SEQUENCE {schema}.events_id_seq, {schema}.transactions_position_seq"),
        ("INSERT (message_id, subject, headers, payload)", "{schema}.events"),
        ("UPDATE (dead_at, dead_reason, discarded_at, retried_at, attempts)", "{schema}.transactions"),
        ("UPDATE (replay_of)", "{schema}.transactions"),
        ("UPDATE (sent_at, stream, first_sequence, last_sequence)", "{schema}.transactions"),
        ("UPDATE", "{schema}.relay, {schema}.streams, {schema}.limits, {schema}.parts"),
        ("INSERT", "{schema}.streams"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The schema that a database has: its `version`, 0 for none, and the oldest version of relays that it suits.

    `unfinished` says that it is another form of an unreleased version.
    """

    version: int
    suits_from: int
    unfinished: bool = False

    def unsuitable(self, schema: str) -> Misconfigured | None:
        """Why this package cannot work with it, with the remedy; None if it can."""
        if self.unfinished:
            words = f"schema {schema} is at an unfinished version {self.version}, not the one of this package"
            return Misconfigured(words, remedy=f"outbox migrate --to {self.version - 1}, then outbox migrate")
        if self.version == 0:
            words = f"schema {schema} does not tell its version: the comment on {schema}.events is gone, or never was"
            return Misconfigured(f"{words} (pg_restore --no-comments?)", remedy="outbox migrate, which puts it back")
        if self.version < VERSION:
            words = f"schema {schema} is at version {self.version}, and version {VERSION} is needed"
            return Misconfigured(words, remedy="outbox migrate")
        if self.suits_from > VERSION:
            words = f"schema {schema} is at version {self.version}, which suits no relay before {self.suits_from}"
            return Misconfigured(f"{words}; this one is of {VERSION}", remedy="upgrade outbox-relay")
        return None


def installed(comment: str | None, suits_from: int | None = None) -> Installed:
    """What the comment on the table `events` tells, and the column `relay.suits_from`, which came with version 2."""
    version = version_of(comment)
    unfinished = version in UNRELEASED and version <= VERSION and comment != events_comment(version)
    return Installed(version=version, suits_from=suits_from or version, unfinished=unfinished)


def version_of(comment: str | None) -> int:
    """The schema version that the comment on the table `events` tells; 0 if there is none."""
    found = re.match(r"outbox schema version (\d+)\.", comment or "")
    return int(found.group(1)) if found else 0


def check_version(comment: str | None, schema: str, suits_from: int | None = None) -> None:
    """Raise `Misconfigured` unless this package can work with the schema that the database has."""
    if problem := installed(comment, suits_from).unsuitable(schema):
        raise problem
