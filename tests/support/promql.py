"""PromQL without a Prometheus: what an expression names, and the subset that our alerts use, evaluated.

Reads the unit tests of `promtool test rules`, so that one file says what must fire, with promtool installed or not.
It differs in one thing: `increase` does not extrapolate to the edges of its range. Knows nothing of outbox.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Final

import promql_parser as promql

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
NAME: Final = "__name__"
LOOK_BACK: Final = 300.0
OF_SCRAPES: Final = frozenset({"job", "instance"})
MATCH: Mapping[str, Callable[[str, str], bool]] = {
    "MatchOp.Equal": operator.eq,
    "MatchOp.NotEqual": operator.ne,
    "MatchOp.Re": lambda value, pattern: re.fullmatch(pattern, value) is not None,
    "MatchOp.NotRe": lambda value, pattern: re.fullmatch(pattern, value) is None,
}
COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
COMPUTE: Mapping[str, Callable[[float, float], float]] = {"-": operator.sub, "+": operator.add, "/": operator.truediv}
AGGREGATE: Mapping[str, Callable[[list[float]], float]] = {
    "max": max,
    "min": min,
    "sum": sum,
    "count": lambda values: float(len(values)),
    "group": lambda _: 1.0,
}


# --- what an expression names


def selectors(expression: promql.Expr) -> list[Any]:
    """The selectors of metrics in an expression."""
    found: list[Any] = []
    promql.walk(expression, lambda each: found.append(each) if isinstance(each, promql.VectorSelector) else None)
    return found


def labels_of(expression: Any, exported: Mapping[str, frozenset[str]]) -> frozenset[str]:  # noqa: PLR0911 - one each
    """The labels that the result has. Fails where a metric does not exist, or a label that is named is not there."""
    match expression:
        case promql.VectorSelector(name=name):
            assert name, "name every metric"
            assert name in exported, f"there is no metric {name}"
            there = exported[name] | OF_SCRAPES
            matched = {each.name for each in expression.matchers.matchers}
            assert matched <= there, f"{name} has no label {matched - there}"
            return there
        case promql.MatrixSelector():
            return labels_of(expression.vector_selector, exported)
        case promql.ParenExpr(expr=inner):
            return labels_of(inner, exported)
        case promql.AggregateExpr(expr=inner, modifier=modifier):
            kept = frozenset(modifier.labels if modifier else ())
            there = labels_of(inner, exported)
            assert not modifier or modifier.type is promql.AggModifierType.By, "say by, not without"
            assert kept <= there, f"no label {kept - there} in {inner.prettify()}"
            return kept
        case promql.BinaryExpr(lhs=left, rhs=right, modifier=modifier, op=op):
            here, there = labels_of(left, exported), labels_of(right, exported)
            if modifier and modifier.matching:
                assert set(modifier.matching.labels) <= here & there, f"{modifier.matching.labels} on both sides"
            return here | there if str(op) == "or" or isinstance(left, promql.Call) else here
        case promql.Call(func=function, args=arguments):
            there = frozenset[str]().union(*(labels_of(each, exported) for each in arguments))
            assert function.name != "histogram_quantile" or "le" in there, "a quantile needs le"
            return there - {"le"} if function.name == "histogram_quantile" else there
        case promql.NumberLiteral() | promql.StringLiteral():
            return frozenset()
    raise TypeError(f"no rule for {expression!r}")


# --- samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Series by their labels, a value for each interval from time 0; None: no sample, NaN: the series ended."""

    interval: float
    series: Mapping[Labels, list[float | None]]

    def within(self, selector: Any, begin: float, end: float) -> dict[Labels, list[float]]:
        """The values of each series that is selected, later than `begin` and not later than `end`."""
        found = {}
        for labels, values in self.series.items():
            if chosen(selector, dict(labels)):
                first, last = int(begin // self.interval) + 1, int(end // self.interval)
                found[labels] = [value for value in values[max(first, 0) : last + 1] if value is not None]
        return found

    def at(self, selector: Any, now: float) -> Vector:
        """The latest value of each series that is selected, unless it has ended or is too old."""
        found = self.within(selector, now - LOOK_BACK, now)
        return {labels: values[-1] for labels, values in found.items() if values and not math.isnan(values[-1])}


def chosen(selector: Any, labels: dict[str, str]) -> bool:
    """Whether a selector takes the series with these labels."""
    matchers = selector.matchers.matchers
    return selector.name == labels[NAME] and all(MATCH[str(m.op)](labels.get(m.name, ""), m.value) for m in matchers)


def series(text: str) -> Labels:
    """The labels of a series as promtool's tests write it."""
    selector = promql.parse(text)
    assert isinstance(selector, promql.VectorSelector)
    assert selector.name
    return frozenset({NAME: selector.name, **{m.name: m.value for m in selector.matchers.matchers}}.items())


def values(text: str) -> list[float | None]:
    """The values of a series as promtool's tests write them: `1 2`, `0+15x4`, `1x4`, `_`, `_x4`, `stale`."""
    found: list[float | None] = []
    for word in text.split():
        if word == "stale":
            found.append(float("nan"))
        elif gap := re.fullmatch(r"_(?:x(\d+))?", word):
            found += [None] * int(gap[1] or 1)
        else:
            parts = re.fullmatch(r"(-?\d+)([+-]\d+)?(?:x(\d+))?", word)
            assert parts, word
            found += [float(parts[1]) + n * float(parts[2] or 0) for n in range(int(parts[3] or 0) + 1)]
    return found


# --- evaluating


def value_of(expression: Any, samples: Samples, now: float) -> Any:
    """A number or a `Vector`: the expression at this time."""
    match expression:
        case promql.NumberLiteral(val=number):
            return number
        case promql.ParenExpr(expr=inner):
            return value_of(inner, samples, now)
        case promql.VectorSelector():
            return samples.at(expression, now)
        case promql.AggregateExpr(op=op, expr=inner, modifier=modifier):
            found = value_of(inner, samples, now)
            kept = set(modifier.labels if modifier else ())
            groups = groupby(
                sorted(found, key=lambda each: sorted(only(each, kept))), key=lambda each: only(each, kept)
            )
            return {labels: AGGREGATE[str(op)]([found[each] for each in members]) for labels, members in groups}
        case promql.BinaryExpr(lhs=left, op=op, rhs=right, modifier=modifier):
            return combined(str(op), value_of(left, samples, now), value_of(right, samples, now), modifier)
        case promql.Call(func=function, args=arguments):
            return called(function.name, arguments, samples, now)
    raise TypeError(f"no rule for {expression!r}")


def only(labels: Labels, kept: Iterable[str]) -> Labels:
    """The labels that are kept."""
    return frozenset(each for each in labels if each[0] in kept)


def combined(op: str, left: Any, right: Any, modifier: Any) -> Any:
    """A set operation of two vectors; or a comparison, which filters, or a calculation, with a number on one side."""
    if op in {"and", "unless"}:
        there = {only(labels, modifier.matching.labels) for labels in right}
        wanted = op == "and"
        return {k: v for k, v in left.items() if (only(k, modifier.matching.labels) in there) is wanted}
    if op in COMPARE and isinstance(left, dict):
        return {labels: value for labels, value in left.items() if COMPARE[op](value, right)}
    if isinstance(left, dict):
        return {nameless(labels): COMPUTE[op](value, right) for labels, value in left.items()}
    return {nameless(labels): COMPUTE[op](left, value) for labels, value in right.items()}


def called(name: str, arguments: Any, samples: Samples, now: float) -> Any:
    """The functions that we use; over a range, each series that has enough samples."""
    if name == "time":
        return now
    (range_,) = arguments
    found = samples.within(range_.vector_selector, now - range_.range.total_seconds(), now)
    alive = {labels: [each for each in values if not math.isnan(each)] for labels, values in found.items()}
    if name == "last_over_time":
        return {labels: values[-1] for labels, values in alive.items() if values}
    assert name == "increase", f"{name} is not known here"
    return {nameless(labels): grown(values) for labels, values in alive.items() if len(values) > 1}


def grown(counted: list[float]) -> float:
    """How much a counter has grown, over its resets."""
    return sum(after - before if after >= before else after for before, after in pairwise(counted))


def nameless(labels: Labels) -> Labels:
    """The labels without the metric's name."""
    return frozenset(each for each in labels if each[0] != NAME)


# --- alerts


def firing(rules: list[dict[str, Any]], samples: Samples, now: float) -> set[Labels]:
    """The alerts that fire at this time, with their labels, when the rules were evaluated at each interval."""
    fires: set[Labels] = set()
    times = [n * samples.interval for n in range(int(now // samples.interval) + 1)]
    for rule in rules:
        expression, wait = promql.parse(rule["expr"]), seconds(rule.get("for", "0s"))
        since: dict[Labels, float] = {}
        for at in times:
            active = value_of(expression, samples, at)
            since = {labels: since.get(labels, at) for labels in map(nameless, active)}
        own = frozenset({"alertname": rule["alert"], **rule["labels"]}.items())
        fires |= {labels | own for labels, begin in since.items() if times[-1] - begin >= wait}
    return fires


def seconds(text: str) -> float:
    """A duration as Prometheus writes it; promtool takes 0m, which the parser does not."""
    return 0.0 if text.startswith("0") else promql.parse_duration(text).total_seconds()
