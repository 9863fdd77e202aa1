"""What the two servers must be so that the promises hold: the relay enforces these lists, and the doctor shows them.

Pure: facts in, problems out. What is only worth a look is the doctor's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

OLDEST_POSTGRES = 140005
OLDEST_NATS = (2, 12, 1)


class Problem(NamedTuple):
    """What is not as it must be, and what settles it."""

    what: str
    remedy: str


def of_postgres(number: int) -> Iterator[Problem]:
    """What is wrong with a server of this `server_version_num`."""
    if number < OLDEST_POSTGRES:
        version = f"{number // 10000}.{number % 10000}"
        yield Problem(f"PostgreSQL {version} is too old", "upgrade to 14.5 or later")


def of_outbox(
    schema: str, *, max_transaction_events: int | None, identity_cache: int, max_batch_messages: int
) -> Iterator[Problem]:
    """What is wrong with an outbox's limits, None where their table is empty, and with its identities."""
    if max_transaction_events is None:
        yield Problem(
            f"the table {schema}.limits is empty: was only the schema restored?",
            f"restore its row from a backup; for a new outbox: INSERT INTO {schema}.limits DEFAULT VALUES",
        )
    if identity_cache != 1:
        yield Problem(
            "an identity of the outbox has a cache, which breaks the commit order",
            f"ALTER TABLE {schema}.transactions ALTER COLUMN position SET CACHE 1; same for events.id",
        )
    if max_transaction_events is not None and max_transaction_events > max_batch_messages:
        yield Problem(
            f"a transaction may add {max_transaction_events} events, and the relay's batch takes {max_batch_messages}",
            f"raise OUTBOX_MAX_BATCH_MESSAGES (--max-batch-messages {max_transaction_events}), and "
            "jetstream.limits.batch.max_msgs of nats-server with it; or lower max_transaction_events in "
            f"{schema}.limits",
        )


def of_row_security(schema: str, role: str, hidden: Sequence[str]) -> Iterator[Problem]:
    """What is wrong where row security may hide rows of these tables from a role."""
    if hidden:
        yield Problem(
            f"row security is on: it may hide rows of {', '.join(hidden)} from role {role}: they would never be sent",
            f"ALTER TABLE {schema}.{hidden[0]} DISABLE ROW LEVEL SECURITY; or ALTER ROLE {role} BYPASSRLS",
        )


def of_nats(version: tuple[int, int, int]) -> Iterator[Problem]:
    """What is wrong with a nats-server of this version."""
    if version < OLDEST_NATS:
        yield Problem(
            f"nats-server {'.'.join(map(str, version))} has no atomic batches: it would store every message by itself",
            "upgrade nats-server to 2.12.1 or later (2.12.14, 2.14.4 or 2.15 recommended)",
        )


def of_stream(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with a stream of this configuration, as STREAM.INFO tells it."""
    name = config["name"]
    if config.get("mirror"):
        yield Problem("it is a mirror, which takes no messages", "publish to the stream that it mirrors")
    if config.get("persist_mode") == "async":
        yield Problem("its persist_mode is async, which excludes atomic batches", f"re-create stream {name} without it")
    if not config.get("allow_atomic"):
        yield Problem("it lacks allow_atomic", f"nats stream edit {name} --allow-batch")
    if config.get("no_ack"):
        yield Problem("it has no_ack, so nothing is ever acknowledged", f"nats stream edit {name} --ack")
