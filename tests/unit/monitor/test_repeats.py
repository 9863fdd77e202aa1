"""What a log says of outages: when they begin, once a minute, and when they end."""

from __future__ import annotations

from outbox.core import telemetry
from outbox.core.telemetry import Happening
from outbox.monitor.repeats import CALM, MOST, Repeats

LONG = "connection to server failed: " + "the whole text " * 20
AWAY = telemetry.Unreachable(server="postgres", why=LONG, delay=1.0)
BACK = telemetry.Connected(server="postgres", version="18.1")
LEADS, NO_MORE = telemetry.TookLead(epoch=2), telemetry.LeadEnded()
DOUBT = telemetry.InDoubt(stream="S", why="maximum bytes exceeded")
SETTLED = telemetry.Settled(stream="S", last_sequence=7, stored=0, remaining=3)
MARKED = telemetry.Marked(stream="S", transactions=1, events=1, last_position=9)


def log(*happenings: tuple[float, Happening]) -> list[tuple[float, str]]:
    """What a log says, and when; it looks for what is over every second."""
    repeats, lines = Repeats(), list[tuple[float, str]]()
    now = 0.0
    for at, happening in happenings:
        while now + 1.0 < at:
            now += 1.0
            repeats, said = repeats.calm(now)
            lines += [(now, str(each)) for each in said]
        now = at
        repeats, calm = repeats.calm(now)
        repeats, said = repeats.take(happening, now)
        lines += [(now, str(each)) for each in calm + said]
    return lines


def later(first: float, seconds: float, *happenings: Happening) -> list[tuple[float, Happening]]:
    """The same over and over, once a second."""
    return [(first + at + place / 100, each) for at in range(int(seconds)) for place, each in enumerate(happenings)]


def test_outage_is_told_when_it_begins_each_minute_and_when_it_ends() -> None:
    said = log(*later(0, 130, AWAY), (130.0, BACK))
    assert [at for at, _ in said] == [0, 60, 120, 130]
    assert said[0][1] == str(AWAY)
    assert said[1][1] == "postgres cannot be used, next try in 1.0 s: as before (61 times in 60 s)"
    assert said[-1][1] == "connected to postgres 18.1 (after 130.0 s)"
    assert sum(LONG in words for _, words in said) == 1


def test_another_reason_is_told_with_the_next_word() -> None:
    other = telemetry.Unreachable(server="postgres", why="the database system is starting up", delay=1.0)
    said = log(*later(0, 50, AWAY), *later(50, 20, other))
    assert [at for at, _ in said] == [0, 60]
    assert "starting up" in said[1][1]


def test_troubles_do_not_hide_each_other() -> None:
    nats = telemetry.Unreachable(server="nats", why="x", delay=1.0)
    died = telemetry.Paused(why="by hand")
    said = log(*later(0, 3, AWAY, nats), (3.0, died), (3.1, died))
    assert [words for _, words in said] == [str(AWAY), str(nats), str(died), str(died)]


def test_server_that_lets_in_and_cannot_work_is_one_outage() -> None:
    """Terms that begin and fail: its end is told when it has been quiet for a while."""
    said = log(*later(0, 120, BACK, LEADS, NO_MORE, AWAY), (120.0, BACK), (120.1, LEADS), (150.0, MARKED))
    words = [line for _, line in said]
    first_round = [str(each) for each in (BACK, LEADS, NO_MORE, AWAY)]
    assert words[:4] == first_round
    assert sum("cannot be used" in line for line in words) <= 4
    assert len(words) <= 12
    end = [at for at, line in said if line.startswith("connected") and at > 100]
    assert end
    assert 120 + CALM <= end[0] <= 122 + CALM
    assert words[-1] == str(LEADS)


def test_next_outage_is_told_from_its_beginning() -> None:
    said = log((0.0, AWAY), (1.0, BACK), (30.0, AWAY), (31.0, BACK))
    assert [at for at, _ in said] == [0, 1, 30, 31]


def test_outage_right_after_one_is_told_at_once_and_its_end_when_it_lasts() -> None:
    said = log((0.0, AWAY), (1.0, BACK), (2.0, AWAY), (3.0, BACK), (20.0, MARKED))
    assert [at for at, _ in said] == [0, 1, 2, 13]


def test_stream_that_is_full_for_long() -> None:
    said = log(*later(0, 60, DOUBT, SETTLED), (60.5, MARKED), (61.0, MARKED))
    assert [words for _, words in said] == [str(DOUBT), str(SETTLED), f"{MARKED} (after 60.5 s)"]


def test_one_doubt_is_told_as_it_was() -> None:
    said = log((0.0, DOUBT), (0.1, SETTLED), (0.2, MARKED), (60.0, DOUBT), (60.1, SETTLED), (60.2, MARKED))
    assert [words for _, words in said] == [str(DOUBT), str(SETTLED)] * 2


def test_what_blocks_is_told_by_its_reason() -> None:
    first, second = (telemetry.Blocked(stream="", why=f"transaction {n}: nowhere") for n in (1, 2))
    free = telemetry.Unblocked(stream="")
    said = log((0.0, first), (1.0, free), (1.1, second), (2.0, free), (2.1, second), (3.0, free), (3.1, second))
    words = [line for _, line in said]
    assert str(first) in words
    assert str(second) in words
    assert words.count(str(second)) == 1


def test_what_is_known_is_bounded_and_forgotten_when_it_stops() -> None:
    remarks = [telemetry.Remark(source="otel", kind="retry in %s", words=f"retry in {n}") for n in range(100)]
    said = log(*((float(at), each) for at, each in enumerate(remarks)))
    assert [at for at, _ in said] == [0, 60]
    repeats = Repeats()
    for number in range(2 * MOST):
        repeats, _ = repeats.take(telemetry.Blocked(stream="", why=f"reason {number}"), float(number))
    assert len(repeats.troubles) == MOST
    repeats, _ = Repeats().take(remarks[0], 0.0)
    repeats, _ = repeats.calm(100.0)
    assert not repeats.troubles
