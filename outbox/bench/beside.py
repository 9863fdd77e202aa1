"""The drain in a stream that others write to: beside a foreign writer, and beside the relays of other outboxes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from outbox.bench.figures import Figures
from outbox.bench.foreign import Foreign
from outbox.bench.site import SCHEMA, RelayProcess, Site, schemas
from outbox.bench.subjects import expanded
from outbox.config import Settings
from outbox.errors import OutboxError
from outbox.operate.verify import verify

AUTO: Mapping[str, str] = {}
SHARED = {"OUTBOX_STREAM_MODE": "shared"}
SENT = """
SELECT coalesce(sum(event_count), 0), extract(epoch FROM max(sent_at))::float8 FROM {}.transactions
 WHERE sent_at IS NOT NULL"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What each outbox has to send."""

    transactions: int
    events: int
    payload: int
    subjects: Sequence[str]

    @property
    def total(self) -> int:
        """Events of one outbox."""
        return self.transactions * self.events


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """From the first lead to the last mark, or to the moment when the drain was stopped; seconds since 1970."""

    began: float
    ended: float
    sent: int

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.sent / (self.ended - self.began)


def foreign(site: Site, *, backlog: Backlog, rate: float, subjects: Sequence[str], seconds: float) -> Figures:
    """The drain alone in `auto`, alone in `shared`, and beside a foreign writer; each in a new stream.

    A drain that is not done after `seconds` is stopped, and its rate is of what was sent by then.
    """
    auto = _drained(site, backlog, AUTO, seconds)
    shared = _drained(site, backlog, SHARED, seconds)
    site.prepare()
    onto = [each for subject in subjects for each in expanded(f"{SCHEMA}.{subject}")]
    with Foreign(site.folder, site.nats_url, rate=rate, payload=backlog.payload, subjects=onto) as writer:
        beside = _drained(site, backlog, AUTO, seconds, prepared=True)
        achieved = writer.stored_per_second(beside.began, beside.ended)
    _verify(site, SCHEMA)
    site.prepare()
    return {
        "alone_auto_events_per_second": auto.rate,
        "alone_shared_events_per_second": shared.rate,
        "beside_foreign_events_per_second": beside.rate,
        "beside_foreign_transactions_per_second": beside.rate / backlog.events,
        "foreign_messages_per_second": achieved,
        "shared_of_auto": shared.rate / auto.rate,
        "beside_foreign_of_auto": beside.rate / auto.rate,
        "beside_foreign_of_shared": beside.rate / shared.rate,
        "beside_foreign_sent_of_backlog": beside.sent / backlog.total,
    }


def together(site: Site, *, backlog: Backlog, outboxes: int, seconds: float) -> Figures:
    """One outbox alone in `shared`, and several that drain as much each into one stream at the same time."""
    alone = _drained(site, backlog, SHARED, seconds)
    several = _drained(site, backlog, AUTO, seconds, outboxes=outboxes)
    for schema in schemas(outboxes):
        _verify(site, schema)
    site.prepare()
    return {
        "one_alone_shared_events_per_second": alone.rate,
        "together_events_per_second": several.rate,
        "together_of_one_alone": several.rate / alone.rate,
        "together_sent_of_backlogs": several.sent / backlog.total / outboxes,
    }


def _drained(
    site: Site,
    backlog: Backlog,
    environment: Mapping[str, str],
    seconds: float,
    *,
    outboxes: int = 1,
    prepared: bool = False,
) -> Drained:
    if not prepared:
        site.prepare(outboxes)
    names = schemas(outboxes)
    for schema in names:
        site.load(backlog.transactions, backlog.events, backlog.payload, subjects=backlog.subjects, schema=schema)
    with contextlib.ExitStack() as stack:
        given = [RelayProcess(site, "--drain", schema=schema, environment=environment) for schema in names]
        relays = [stack.enter_context(relay) for relay in given]
        began = min([relay.wait_until_it_leads() for relay in relays])
        deadline = time.monotonic() + seconds
        done = all(relay.ends_within(max(0.0, deadline - time.monotonic())) for relay in relays)
        stopped = time.time()
        found = list(_sent(site, names))
    ended = max(at for _, at in found) if done else stopped
    return Drained(began=began, ended=ended, sent=sum(sent for sent, _ in found))


def _sent(site: Site, names: Sequence[str]) -> Iterator[tuple[int, float]]:
    """Events that are marked, and when the last ones were, of each outbox."""
    for name in names:
        ((sent, at),) = site.sql(SENT.format(name))
        yield int(sent), float(at or 0)


def _verify(site: Site, schema: str) -> None:
    """Each transaction is in the stream whole, once and in order, or the run does not count."""
    given = Settings(database_url=site.database_url, nats_url=site.nats_url, schema=schema)
    # A stream whose relay had drained before the first foreign message is not known as shared.
    wrong = [each for one in asyncio.run(verify(given)) for each in one.anomalies if each.kind != "foreign"]
    if wrong:
        raise OutboxError(f"{schema} is not in the stream as it should be, and the run does not count: {wrong[:3]}")
