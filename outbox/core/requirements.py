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

    @property
    def line(self) -> str:
        """Both on one line."""
        return f"{self.what}; remedy: {self.remedy}"


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


class Counters(NamedTuple):
    """How far an outbox's counters are, as COUNTERS tells it.

    `reached` is the highest position that it speaks of, `drawn` the last one that was drawn. `kept` is the highest
    transaction id of its rows, `running` the one that its cluster draws next. `stranded` is the position of a pending
    transaction behind the cursor that is in no plan and not open, None where none is near.
    """

    reached: int
    drawn: int
    kept: int
    running: int
    stranded: int | None


def of_counters(found: Counters) -> Iterator[Problem]:
    """What a relay cannot reconcile: committed transactions would be out of its sight, or two would become one."""
    if found.drawn < found.reached:
        yield Problem(
            f"positions began anew: the next one is {found.drawn + 1}, and {found.reached} was reached before "
            "(TRUNCATE, RESTART, setval, or a restore without sequences); what is added would not be seen",
            "stop every relay, then: outbox rebase",
        )
    if found.stranded is not None:
        yield Problem(stranded(found.stranded), "stop every relay, then: outbox rebase, which makes it pending again")
    if found.kept >= found.running:
        yield Problem(
            f"the outbox has rows of transaction id {found.kept}, which this cluster has yet to hand out: they were "
            "copied from another one, and two transactions could become one",
            "stop every relay, then: outbox rebase",
        )


def stranded(position: int) -> str:
    """What is the matter with a pending transaction that is in no plan and not open, behind the cursor."""
    return f"transaction {position} is committed and neither sent nor dead, and is behind all that a relay looks at"


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


def of_subject(subject: str, *, mapped: bool) -> Problem:
    """What is wrong with a subject that JetStream finds in no stream; `mapped` says that one takes it all the same."""
    if mapped:
        return Problem(
            f"subject {subject} is in no stream, though one takes what is sent there: the account maps it to another",
            "add events under the subject that the stream has; or take this one out of the account's mappings, and add "
            "it to the stream's subjects",
        )
    return Problem(
        f"subject {subject} is in no stream",
        "add it to a stream's subjects (nats stream edit), or make one: "
        f"nats stream add NAME --subjects {subject} --allow-batch --discard=new",
    )


def of_sharing(config: Mapping[str, Any]) -> Iterator[str]:
    """Why a stream of this configuration cannot be fenced by a subject: its messages may vanish, or be elsewhere."""
    if config.get("retention", "limits") != "limits":
        yield f"its retention is {config['retention']}"
    if int(config.get("max_msgs_per_subject", -1)) > 0:
        yield "it has max_msgs_per_subject"
    if config.get("allow_msg_ttl"):
        yield "it has allow_msg_ttl"
    if config.get("allow_rollup_hdrs"):
        yield "it has allow_rollup_hdrs"
    if config.get("subject_transform"):
        yield "it has a subject_transform"


def of_stream(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with a stream of this configuration, as STREAM.INFO tells it."""
    name = config["name"]
    if config.get("mirror"):
        yield Problem("it is a mirror, which takes no messages", "publish to the stream that it mirrors")
    if config.get("persist_mode") == "async":
        yield Problem("its persist_mode is async, which excludes atomic batches", f"re-create stream {name} without it")
    if not config.get("allow_atomic"):
        yield Problem("it lacks allow_atomic", f"nats stream edit {name} --allow-batch")
    if config.get("allow_msg_counter"):
        yield Problem("it counts (allow_msg_counter), and takes nothing but increments", "publish to another stream")
    if config.get("sealed"):
        yield Problem("it is sealed, and takes nothing any more", "publish to another stream")
    if config.get("no_ack"):
        yield Problem("it has no_ack, so nothing is ever acknowledged", f"nats stream edit {name} --ack")
