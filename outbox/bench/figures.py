"""What a case of the benchmark came to: named figures by round, their medians, tables and JSON. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rich.table import Table

Figures = Mapping[str, float]
Say = Callable[[str], None]


class Kind(StrEnum):
    """What can be measured."""

    DRAIN = "drain"
    SUSTAINED = "sustained"
    LATENCY = "latency"
    WRITER = "writer"
    VERIFY = "verify"
    FLAT = "flat"
    MEMORY = "memory"
    IDLE = "idle"


class Storage(StrEnum):
    """Of the stream: on one server in a file or in memory, or in files of three servers."""

    FILE = "file"
    MEMORY = "memory"
    R3 = "r3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A case, its parameters, and the figures of each round. A figure's unit is the end of its name."""

    name: str
    parameters: Mapping[str, Any]
    rounds: Sequence[Figures]

    def median(self, figure: str) -> float:
        """The median of a figure over the rounds."""
        return statistics.median(each[figure] for each in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """For machines: every figure with its median and all rounds."""
        figures = {
            name: {"median": self.median(name), "rounds": [each[name] for each in self.rounds]}
            for name in self.rounds[0]
        }
        return {"case": self.name, "parameters": dict(self.parameters), "figures": figures}


def quantiles(values: Iterable[float], prefix: str) -> dict[str, float]:
    """p50, p95 and p99 of some milliseconds, by nearest rank."""
    ordered = sorted(values)
    ranks = {50: 0.5, 95: 0.95, 99: 0.99}
    return {
        f"{prefix}_p{name}_ms": ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
        for name, share in ranks.items()
    }


def table(cases: Sequence[Case]) -> Table:
    """Cases of one name side by side, a figure a line: the median, and in brackets the lowest and the highest round."""
    shown = Table(title=cases[0].name, title_justify="left")
    shown.add_column("")
    for case in cases:
        shown.add_column(", ".join(f"{name} {value}" for name, value in case.parameters.items()), justify="right")
    for name in cases[0].rounds[0]:
        shown.add_row(name.replace("_", " "), *(_cell(case, name) for case in cases))
    return shown


def _cell(case: Case, name: str) -> str:
    values = [each[name] for each in case.rounds]
    spread = f" ({_number(min(values))}-{_number(max(values))})" if len(values) > 1 else ""
    return _number(case.median(name)) + spread


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits are enough
