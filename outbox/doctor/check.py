"""What `outbox doctor` says of one thing: green, yellow or red, what was found, and the remedy. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Colour(StrEnum):
    """Green is as it should be; yellow works and is worth a look; red breaks a promise, or nothing is sent."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line. `area` is database, outbox or stream; `name` is what was looked at; `remedy` is empty if green."""

    area: str
    name: str
    colour: Colour
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Checks:
    """Makes the lines of one area."""

    area: str

    def green(self, name: str, found: str) -> Check:
        """As it should be."""
        return Check(area=self.area, name=name, colour=Colour.GREEN, found=found)

    def yellow(self, name: str, found: str, remedy: str) -> Check:
        """It works, and is worth a look."""
        return Check(area=self.area, name=name, colour=Colour.YELLOW, found=found, remedy=remedy)

    def red(self, name: str, found: str, remedy: str) -> Check:
        """It breaks a promise, or nothing is sent."""
        return Check(area=self.area, name=name, colour=Colour.RED, found=found, remedy=remedy)
