"""The subjects of a benchmark, written as patterns: `own.{0..99}` is a hundred of them, in turn. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expanded(pattern: str) -> list[str]:
    """The subjects of a pattern, in order: each `{low..high}` in it stands for the numbers from low to high."""
    found = RANGE.search(pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [
        each for number in numbers for each in expanded(pattern[: found.start()] + str(number) + pattern[found.end() :])
    ]


def turns(patterns: Sequence[str], events: int, prefix: str) -> list[list[str]]:
    """The subjects of each event of a transaction, in turn over the transactions: as many turns for each event.

    The first event takes the first pattern and so on; the last pattern is for all that follow. Without patterns each
    event has one subject, its number.
    """
    given = patterns or [str(number) for number in range(1, events + 1)]
    found = [expanded(f"{prefix}.{given[min(number, len(given) - 1)]}") for number in range(events)]
    length = math.lcm(*map(len, found))
    return [each * (length // len(each)) for each in found]
