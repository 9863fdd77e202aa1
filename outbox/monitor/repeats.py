"""What a log says of what repeats: how it begins, a word a minute while it lasts, and how it ended. Pure.

An outage fails once a second, for hours. A trouble that is back within seconds of its end, as where a server lets us in
and cannot work, is the same one: it has ended when it has been quiet for a while.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from outbox.core import telemetry
from outbox.core.telemetry import Happening, Level

MINUTE = 60.0  # between two words on the same trouble
CALM = 10.0  # so long after its end it is not back
AS_BEFORE = "as before"
MOST = 200  # troubles that are known at a time

Key = tuple[str, ...]
POSTGRES: Key = ("server", "postgres")
LEAD: Key = ("lead",)
# What each term says: not worth a line where terms fail over and over.
OF_TERMS = (
    telemetry.Connected,
    telemetry.TookLead,
    telemetry.StandingBy,
    telemetry.LeadEnded,
    telemetry.Careful,
    telemetry.Settled,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What is to be said; of what has happened before, how often since when, in seconds. `ended`: it is over."""

    happening: Happening
    times: int = 0
    seconds: float = 0.0
    ended: bool = False

    def __str__(self) -> str:
        if self.ended:
            return f"{self.happening} (after {self.seconds:.1f} s)"
        return f"{self.happening} ({self.times} times in {self.seconds:.0f} s)" if self.times else str(self.happening)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One that is there, or that ended a moment ago: `cured` is when. `back` says that it came back after an end."""

    since: float
    last: float
    said: float
    why: str
    times: int = 1
    cured: float | None = None
    back: bool = False
    held: tuple[Happening, ...] = ()  # what waits to be said until it has been quiet

    @property
    def lasts(self) -> bool:
        """True while it repeats what was said already."""
        return self.back or (self.cured is None and self.times > 1)

    def end(self, happening: Happening) -> Said:
        """The word that it is over."""
        return Said(happening=happening, times=self.times, seconds=(self.cured or self.last) - self.since, ended=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """The troubles of now. `take` and `calm` give the next value and what is to be said; any clock gives `now`."""

    troubles: Mapping[Key, Trouble] = field(default_factory=dict)

    def take(self, happening: Happening, now: float) -> tuple[Repeats, list[Said]]:
        """Take in what happened."""
        if (key := _trouble(happening)) is not None:
            return self._failed(key, happening, now)
        if over := self._over(happening):
            return self._ended(over, happening, now)
        if isinstance(happening, OF_TERMS) and (covering := self._covering(happening)) is not None:
            trouble = self.troubles[covering]
            return self._with(covering, dataclasses.replace(trouble, held=(*trouble.held, happening))), []
        return self, [] if happening.level is Level.DEBUG else [Said(happening=happening)]

    def calm(self, now: float) -> tuple[Repeats, list[Said]]:
        """Forget what has been quiet for a while, and say what waited for that."""
        quiet = [key for key, each in self.troubles.items() if _quiet(key, each, now)]
        if not quiet:
            return self, []
        said = []
        for each in map(self.troubles.__getitem__, quiet):
            said += [each.end(held) if not place else Said(happening=held) for place, held in enumerate(each.held)]
        left = {key: each for key, each in self.troubles.items() if key not in quiet}
        return Repeats(troubles=left), said

    def _failed(self, key: Key, happening: Happening, now: float) -> tuple[Repeats, list[Said]]:
        why = str(getattr(happening, "why", ""))
        known = self.troubles.get(key)
        if known is None or _quiet(key, known, now):
            fresh = Trouble(since=now, last=now, said=now, why=why)
            return self._with(key, fresh), [Said(happening=happening)]
        returns = known.cured is not None and not known.back
        again = dataclasses.replace(
            known, times=known.times + 1, last=now, cured=None, held=(), back=known.back or returns
        )
        if not returns and now - known.said < MINUTE:
            return self._with(key, again), []
        if why and why == known.why:
            happening = dataclasses.replace(happening, why=AS_BEFORE)  # type: ignore[call-arg]  # those with a why
        said = Said(happening=happening, times=again.times, seconds=now - known.since)
        return self._with(key, dataclasses.replace(again, said=now, why=why)), [said]

    def _ended(self, over: list[Key], happening: Happening, now: float) -> tuple[Repeats, list[Said]]:
        after, said = self, list[Said]()
        for key in over:
            known = self.troubles[key]
            trouble = dataclasses.replace(known, cured=now, held=(happening,) if known.back else ())
            after = after._with(key, trouble)
            if not trouble.back and (trouble.times > 1 or happening.level is not Level.DEBUG):
                said = [trouble.end(happening)]
        return after, said

    def _over(self, happening: Happening) -> list[Key]:
        """The troubles of which this is the end."""
        prefix = _cured(happening)
        if prefix is None:
            return []
        return [key for key, each in self.troubles.items() if key[: len(prefix)] == prefix and each.cured is None]

    def _covering(self, happening: Happening) -> Key | None:
        """The trouble in whose shadow this happens, or None."""
        above = [POSTGRES, LEAD]
        if isinstance(happening, telemetry.Settled):
            above.append(("doubt", happening.stream))
        return next((key for key in above if key in self.troubles and self.troubles[key].lasts), None)

    def _with(self, key: Key, trouble: Trouble) -> Repeats:
        known = sorted(self.troubles, key=lambda each: self.troubles[each].last)[1 - MOST :]
        return Repeats(troubles={each: self.troubles[each] for each in known} | {key: trouble})


def _quiet(key: Key, trouble: Trouble, now: float) -> bool:
    """True if it is over for good; of what nobody says that it ended, if it has not happened for a while."""
    if trouble.cured is not None:
        return now - trouble.cured >= CALM
    return key[0] == "remark" and now - trouble.last >= MINUTE


def _trouble(happening: Happening) -> Key | None:  # noqa: PLR0911 - a return for each kind
    """Of which trouble this is a sign, or None."""
    match happening:
        case telemetry.Unreachable(server=server):
            return ("server", server)
        case telemetry.LostLead():
            return LEAD
        case telemetry.InDoubt(stream=stream):
            return ("doubt", stream)
        case telemetry.Blocked(stream=stream, why=why):
            return ("blocked", stream, why)
        case telemetry.HousekeepingFailed():
            return ("housekeeping",)
        case telemetry.Remark(source=source, kind=kind):
            return ("remark", source, kind)
        case _:
            return None


def _cured(happening: Happening) -> Key | None:
    """How the names of the troubles begin of which this is the end, or None."""
    match happening:
        case telemetry.Connected(server=server):
            return ("server", server)
        case telemetry.TookLead() | telemetry.StandingBy():
            return LEAD
        case telemetry.Marked(stream=stream):
            return ("doubt", stream)
        case telemetry.HousekeepingWorks():
            return ("housekeeping",)
        case telemetry.Unblocked(stream=stream):
            return ("blocked", stream)
        case _:
            return None
