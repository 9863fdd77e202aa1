"""What `outbox doctor` looks at in NATS: the server, the account, and each stream that this outbox publishes to.

Stores nothing: the probe is a batch message that nothing can come of. Stream settings that would behead or refuse
batches are facts of nats-server 2.12 to 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outbox.core.chain import SHARED
from outbox.core.outcome import (
    BATCH_INCOMPLETE,
    BATCHES_DISABLED,
    OTHER_STREAM,
    STREAM_FULL,
    STREAM_NOT_FOUND,
    Meaning,
    Rejected,
    Unknown,
    code_of,
    meaning,
)
from outbox.core.plan import Seen
from outbox.core.requirements import of_sharing, of_stream, of_subject
from outbox.doctor.check import Check, Checks
from outbox.errors import Weather
from outbox.jetstream.client import JetStream, Refused
from outbox.jetstream.stream import seen
from outbox.postgres.rows import StreamRow

CHECKS = Checks("stream")
STREAMS_AT_MOST = 1000
TAIL = 100  # messages at a stream's end that are looked at
SUBJECTS = 3  # that are named
FULL_SHARE, NEARLY_SHARE = 0.98, 0.8
HEADER_ROOM = 1000  # bytes that the relay's own headers take, at most
LONGEST_WINDOW = 600e9  # ns of a duplicate window, beyond which its ids take much memory

# Versions of a release line up to which something is wrong with atomic batches: (line, fixed in, what).
KNOWN_BAD = (
    ((2, 12), (2, 12, 2), "a change of leader could commit a part of a batch"),
    ((2, 12), (2, 12, 9), "a stream can deadlock, and replicas drift apart"),
    ((2, 12), (2, 12, 14), "a fence on a subject can be read from a wrong buffer"),
    (
        (2, 14),
        (2, 14, 4),
        "a fence on a subject can be read from a wrong buffer, and a former leader's proposals count",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the outbox knows: its ids, its streams by name, subjects by transaction, and how large an event may be."""

    outbox_ids: Sequence[str]
    streams: Mapping[str, StreamRow]
    subjects: Sequence[Sequence[str]]
    max_event_bytes: int


async def examine(jetstream: JetStream, known: Facts) -> AsyncIterator[Check]:
    """All checks of NATS; what cannot be asked is a red line of its own."""
    yield _server(jetstream.version)
    try:
        for check in _account(await jetstream.ask("INFO")):
            yield check
    except Weather as weather:
        words = f"the account cannot be asked for: {weather.message}"
        yield CHECKS.yellow("account", words, "allow this user to publish to $JS.API.INFO, to see its limits")
    routes: dict[str, str | None] = {}
    mapped: list[str] = []
    try:
        for subject in sorted({subject for group in known.subjects for subject in group}):
            routes[subject] = await jetstream.stream_of(subject)
            if routes[subject] is None and await jetstream.is_mapped(subject):
                mapped.append(subject)
    except Weather as weather:
        words = f"nobody tells where subjects go: {weather.message}"
        yield CHECKS.red(
            "subjects", words, "allow this user to publish to $JS.API.STREAM.NAMES; or see the server's log"
        )
    for check in _routing(routes, mapped, known.subjects):
        yield check
    others = await _all(jetstream)
    for name in sorted({*known.streams, *(stream for stream in routes.values() if stream)}):
        probed = next((each for each, stream in routes.items() if stream == name), None)
        async for check in _examined(jetstream, name, probed, known):
            yield check
        for check in _copies(name, others):
            yield check


async def _examined(jetstream: JetStream, name: str, subject: str | None, known: Facts) -> AsyncIterator[Check]:
    """All checks of one stream."""
    try:
        info = await jetstream.ask(f"STREAM.INFO.{name}")
    except Refused as refused:
        if refused.code == STREAM_NOT_FOUND:
            again = f"outbox rebase --stream {name}"
            remedy = f"create it again, then: {again}; or, if it is not to come back: {again} --retire"
            yield CHECKS.red(name, "it does not exist any more", remedy)
            return
        yield CHECKS.red(name, f"its leader refuses to answer: {refused.message}", f"nats stream info {name}")
        return
    except Weather as weather:
        words = f"its leader does not answer: {weather.message}"
        yield CHECKS.red(name, words, f"nats stream info {name}; or allow $JS.API.STREAM.INFO.{name} to this user")
        return
    for check in _stream(info, jetstream.max_payload, known):
        yield check
    if subject is not None:
        yield await _probed(jetstream, name, subject)
    yield await _writers(jetstream, name, info, known)


def _server(version: tuple[int, int, int]) -> Check:
    words = ".".join(map(str, version))
    for line, fixed, what in KNOWN_BAD:
        if version[:2] == line and version < fixed:
            remedy = "upgrade nats-server to 2.12.14, 2.14.4, 2.15 or later"
            return CHECKS.yellow("server", f"nats-server {words}: {what} before {'.'.join(map(str, fixed))}", remedy)
    return CHECKS.green("server", f"nats-server {words}")


def _account(info: dict[str, Any]) -> Iterator[Check]:
    level = int((info.get("api") or {}).get("level", 0))
    if level < 2:  # noqa: PLR2004 - ADR-44: what allow_atomic asks for
        yield CHECKS.red("API level", f"{level}: atomic batches need 2", "upgrade every nats-server of the cluster")
    for what in ("storage", "memory"):
        limit, used = int(info.get("limits", {}).get(f"max_{what}", -1)), int(info.get(what, 0))
        if limit > 0 and used > NEARLY_SHARE * limit:
            words = f"the account has used {used:,} of {limit:,} bytes of {what}: beyond it a batch can be cut"
            yield CHECKS.yellow("account", words, "raise the account's limit, or lower max_bytes of its streams")
    if level >= 2:  # noqa: PLR2004 - as above
        yield CHECKS.green("account", f"JetStream is there, API level {level}")


def _routing(
    routes: Mapping[str, str | None], mapped: Sequence[str], groups: Sequence[Sequence[str]]
) -> Iterator[Check]:
    for subject, stream in routes.items():
        if stream is None:
            what, remedy = of_subject(subject, mapped=subject in mapped)
            yield CHECKS.red("subjects", f"{what}: a transaction with it waits, and all behind it", remedy)
    for group in groups:
        streams = sorted({stream for subject in group if (stream := routes.get(subject)) is not None})
        if len(streams) > 1:
            yield CHECKS.red(
                "subjects",
                f"one transaction has subjects in {' and '.join(streams)}: it is a dead letter",
                "put all subjects of a transaction into one stream",
            )
            return
    if routes and all(routes.values()):
        yield CHECKS.green("subjects", f"each of {len(routes)} lately used is in one stream")


async def _all(jetstream: JetStream) -> list[dict[str, Any]]:
    """The account's streams, as far as they can be listed: only to see who copies ours."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(Weather):
        while len(found) < STREAMS_AT_MOST:
            answer = await jetstream.ask("STREAM.LIST", {"offset": len(found)})
            streams = answer.get("streams") or []
            found += streams
            if not streams or len(found) >= int(answer.get("total", 0)):
                break
    return found


def _stream(info: dict[str, Any], max_payload: int, known: Facts) -> Iterator[Check]:
    config, state, name = info["config"], info["state"], info["config"]["name"]
    problems = [
        *_unsuited(config),
        *_identity(info, known),
        *_sizes(config, max_payload, known),
        *_fullness(config, state, known),
    ]
    problems += [*_beheading(config), *_durability(info)]
    yield from problems
    if not problems:
        yield CHECKS.green(
            name, f"it suits the relay; {state['messages']:,} messages, last sequence {state['last_seq']:,}"
        )


def _unsuited(config: dict[str, Any]) -> Iterator[Check]:
    name = config["name"]
    for problem in of_stream(config):
        yield CHECKS.red(name, problem.what, problem.remedy)
    if config.get("republish"):
        yield CHECKS.yellow(
            name,
            "it republishes messages with all headers: a stream that captures them refuses them, in silence",
            "let it republish to subjects that no stream has; or source this stream instead",
        )
    if config.get("subject_transform"):
        yield CHECKS.yellow(
            name, "it changes subjects (subject_transform)", "transform in a stream that sources this one"
        )


def _identity(info: dict[str, Any], known: Facts) -> Iterator[Check]:
    name = info["config"]["name"]
    remembered = known.streams.get(name)
    if remembered is None:
        return
    last = remembered.last_sequence
    if remembered.created != info["created"]:
        words = "it is not the stream that the outbox published to: it was made again"
        yield CHECKS.red(name, words, f"outbox rebase --stream {name}")
    elif int(info["state"]["last_seq"]) < last:
        words = (
            f"it ends at {info['state']['last_seq']}, before the last receipt at {last}: it was restored from a backup"
        )
        yield CHECKS.red(name, words, f"outbox rebase --stream {name}")


def _sizes(config: dict[str, Any], max_payload: int, known: Facts) -> Iterator[Check]:
    name, needed = config["name"], known.max_event_bytes + HEADER_ROOM
    largest = int(config.get("max_msg_size", -1))
    if 0 <= largest < needed:
        words = f"max_msg_size is {largest:,}, and an event may have {known.max_event_bytes:,} bytes"
        remedy = f"nats stream edit {name} --max-msg-size=-1, or lower max_event_bytes in the table limits"
        yield CHECKS.yellow(name, words, remedy)
    if max_payload < needed:
        words = f"max_payload of nats-server is {max_payload:,}, and an event may have {known.max_event_bytes:,} bytes"
        yield CHECKS.yellow("server", words, "raise max_payload, or lower max_event_bytes in the table limits")


def _fullness(config: dict[str, Any], state: dict[str, Any], known: Facts) -> Iterator[Check]:
    name = config["name"]
    blocked = name in known.streams and code_of(known.streams[name].blocked or "") == STREAM_FULL
    for limit, used in (("max_bytes", "bytes"), ("max_msgs", "messages")):
        most, now = int(config.get(limit, -1)), int(state[used])
        if config.get("discard") == "new" and most > 0 and (blocked or now > NEARLY_SHARE * most):
            full = blocked or now > FULL_SHARE * most
            words = f"it is {'' if full else 'nearly '}full: {now:,} of {most:,} {used}; what does not fit waits"
            remedy = f"raise {limit} (nats stream edit {name}), or let consumers catch up"
            yield (CHECKS.red if full else CHECKS.yellow)(name, words, remedy)


def _beheading(config: dict[str, Any]) -> Iterator[Check]:
    name = config["name"]
    limited = [each for each in ("max_bytes", "max_msgs") if int(config.get(each, -1)) > 0]
    if limited and config.get("discard") != "new":
        words = f"discard is old and {limited[0]} is set: the oldest messages go, also in the middle of a transaction"
        yield CHECKS.yellow(name, words, f"nats stream edit {name} --discard=new")
    if int(config.get("max_msgs_per_subject", -1)) > 0:
        words = "max_msgs_per_subject is set: parts of older transactions are removed"
        yield CHECKS.yellow(name, words, f"nats stream edit {name} --max-msgs-per-subject=-1, unless that is wanted")
    if int(config.get("duplicate_window", 0)) > LONGEST_WINDOW:
        words = "its duplicate window is over ten minutes, and each id in it takes memory of the server"
        yield CHECKS.yellow(name, words, f"nats stream edit {name} --dupe-window=2m; the relay does not need it")


def _durability(info: dict[str, Any]) -> Iterator[Check]:
    config = info["config"]
    name, replicas = config["name"], int(config.get("num_replicas", 1))
    if config.get("storage") == "memory":
        yield CHECKS.yellow(name, "it is in memory: an ack is worth nothing after a restart", "use file storage")
    elif replicas == 1:
        yield CHECKS.yellow(
            name,
            "it has one replica: an ack outlives nats-server, but not its disk, nor, by default, a loss of power",
            f"nats stream edit {name} --replicas=3; with one: jetstream {{ sync_interval: always }} in nats-server",
        )
    cluster = info.get("cluster") or {}
    behind = [each["name"] for each in cluster.get("replicas") or [] if each.get("offline") or not each.get("current")]
    if behind:
        yield CHECKS.yellow(name, f"replica {behind[0]} is offline or behind", f"nats stream info {name}")


def _copies(name: str, infos: Iterable[dict[str, Any]]) -> Iterator[Check]:
    for each in infos:
        config = each["config"]
        origins = [
            (config.get("mirror") or {}).get("name"),
            *(source["name"] for source in config.get("sources") or []),
        ]
        if name in origins:
            words = f"stream {config['name']} copies it: there a batch comes message by message, without Nats-Batch-*"
            yield CHECKS.green(name, f"{words}; its consumers tell transactions by the Outbox-* headers")


async def _probed(jetstream: JetStream, name: str, subject: str) -> Check:
    match await jetstream.probe(subject):
        case Rejected(code=code) if code == BATCH_INCOMPLETE:
            return CHECKS.green(name, f"its leader takes atomic batches (probed on {subject})")
        case Rejected(code=code) if code == BATCHES_DISABLED:
            return CHECKS.red(
                name, "its leader says that atomic batches are off", f"nats stream edit {name} --allow-batch"
            )
        case Rejected(code=code) if code == OTHER_STREAM:
            remedy = "upgrade every nats-server of the cluster to 2.12.1 or later"
            return CHECKS.red(name, "the nats-server of its leader does not know atomic batches", remedy)
        case Rejected() as rejected if meaning(rejected) is Meaning.WEATHER:
            words = f"it cannot take messages just now: {rejected}"
            return CHECKS.yellow(name, words, f"nats stream info {name}")
        case Unknown(why=why):
            remedy = "look at the permissions of this user, and at the stream's leader: nats stream info"
            return CHECKS.red(name, f"publishing to {subject} cannot be probed: {why}", remedy)
        case other:
            return CHECKS.red(name, f"it answered a probe with {other}", f"nats stream info {name}")


async def _writers(jetstream: JetStream, name: str, info: dict[str, Any], known: Facts) -> Check:
    last = int(info["state"]["last_seq"])
    first = max(int(info["state"]["first_seq"]), last - TAIL + 1, 1)
    try:
        found = [each async for _, each in jetstream.messages(name, range(first, last + 1)) if each is not None]
    except Weather as weather:
        words = f"its messages cannot be read: {weather.message}"
        return CHECKS.yellow(name, words, f"allow this user to publish to $JS.API.STREAM.MSG.GET.{name}")
    # What lies before the last settled sequence of a stream that is chained was accepted by an operator.
    remembered = known.streams.get(name)
    accepted = remembered.last_sequence if remembered is not None and remembered.mode != SHARED else 0
    foreign = [each.subject.decode() for each in found if each.sequence > accepted and _is_foreign(seen(each), known)]
    if not foreign:
        return CHECKS.green(name, f"no other writer in its last {len(found)} messages")
    return _shared(name, info["config"], foreign, remembered)


def _is_foreign(message: Seen, known: Facts) -> bool:
    return not message.marker and not any(message.is_of(outbox_id) for outbox_id in known.outbox_ids)


def _shared(name: str, config: dict[str, Any], subjects: Sequence[str], remembered: StreamRow | None) -> Check:
    """With whom a stream is shared, by which fence, and what that costs."""
    lately = list(dict.fromkeys(reversed(subjects)))
    few = ", ".join(lately[:SUBJECTS]) + (", …" if len(lately) > SUBJECTS else "")
    with_whom = f"it has other writers ({len(subjects)} of its last messages, on {few})"
    if (why := next(of_sharing(config), None)) is not None:
        return CHECKS.yellow(
            name,
            f"{with_whom}, and {why}: so any message of theirs makes a batch of the outbox come too late",
            "give the outbox a stream of its own, or this one limits retention, without TTL, rollups, transforms and "
            "max_msgs_per_subject",
        )
    if remembered is not None and remembered.sharing is not None:
        remedy = "let each service write to subjects of its own"
        return CHECKS.yellow(name, f"{with_whom}: {remembered.sharing}", remedy)
    return CHECKS.green(name, f"{with_whom}; fenced by subject: what they write on other subjects costs nothing")
