"""SVG plots for the documentation, from the JSON of `benchmarks.peers` and of `outbox bench`.

Runs in the peers' virtual environment, where matplotlib is. The same figures give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]

mpl.use("svg")

from matplotlib import pyplot as plt  # type: ignore[import-not-found, unused-ignore]

IMAGES = Path(__file__).parent.parent / "docs" / "images"
INK, COLOURS = "#333333", ("#1f6feb", "#8b949e", "#d29922", "#2da44e")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#cccccc",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "outbox",
}

Case = Mapping[str, Any]
Series = Mapping[str, Sequence[Mapping[str, Any]]]


def figure(case: Case, name: str) -> Mapping[str, Any]:
    """A figure of a case: its median and its rounds."""
    found: Mapping[str, Any] = case["figures"][name]
    return found


def bars(series: Series, labels: Sequence[str], *, title: str, unit: str, log: bool = False) -> Any:
    """Horizontal bars, grouped by label: the median, its number, and a line from the lowest to the highest round."""
    drawn, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(labels) * (len(series) + 0.5)))
    height = 0.8 / len(series)
    every = [each["median"] for figures in series.values() for each in figures]
    for number, (name, figures) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * height for place in range(len(labels))]
        medians = [each["median"] for each in figures]
        reach = [
            [median - min(each["rounds"]) for median, each in zip(medians, figures, strict=True)],
            [max(each["rounds"]) - median for median, each in zip(medians, figures, strict=True)],
        ]
        axes.barh(places, medians, height * 0.9, label=name, color=COLOURS[number], xerr=reach, ecolor="#57606a")
        for place, each in zip(places, figures, strict=True):
            text = f"{each['median']:,.0f}" if max(every) >= 100 else f"{each['median']:.1f}"  # noqa: PLR2004 - digits
            axes.annotate(
                text, (max(each["rounds"]), place), xytext=(4, 0), textcoords="offset points", va="center", size=9
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=10 ** math.floor(math.log10(min(every))))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", size=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def peers(cases: Sequence[Case]) -> Any:
    """Rates by tool, on a logarithmic scale."""
    sizes = list(dict.fromkeys(case["parameters"]["events"] for case in cases))
    tools = list(dict.fromkeys(case["parameters"]["tool"] for case in cases))
    series = {
        _per(size): [figure(case, "drain_events_per_second") for case in cases if case["parameters"]["events"] == size]
        for size in sizes
    }
    return bars(series, tools, title="Draining a backlog to JetStream", unit="events/s, logarithmic", log=True)


def ceilings(cases: Sequence[Case]) -> Any:
    """The drain beside what the two servers allow, by events in a transaction."""
    names = {
        "drain_events_per_second": "drain",
        "publish_only_events_per_second": "publish only",
        "read_and_mark_only_events_per_second": "read and mark only",
    }
    series = {label: [figure(case, name) for case in cases] for name, label in names.items()}
    labels = [_per(case["parameters"]["events"]) for case in cases]
    return bars(series, labels, title="The drain and its two ceilings", unit="events/s")


def latency(cases: Sequence[Case]) -> Any:
    """From the commit to the stream, beside a bare awaited publish, by load."""
    names = {
        "commit_to_stored_p50_ms": "commit to stored, p50",
        "bare_acked_p50_ms": "bare publish, p50",
        "commit_to_stored_p99_ms": "commit to stored, p99",
        "bare_acked_p99_ms": "bare publish, p99",
    }
    series = {label: [figure(case, name) for case in cases] for name, label in names.items()}
    labels = [f"{_per(case['parameters']['events'])},\n{_load(case['parameters']['share'])}" for case in cases]
    return bars(series, labels, title="From COMMIT to the stream", unit="ms")


def _per(events: int) -> str:
    return f"{events} event{'s' if events > 1 else ''} in a transaction"


def _load(share: float) -> str:
    return f"writers at {share:.0%} of their most" if share else "no other writers"


DRAWINGS = {"peers": peers, "drain": ceilings, "latency": latency}


def main() -> None:
    """Draw what the files hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON of benchmarks.peers or of outbox bench")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plots")
    given = parser.parse_args()
    given.images.mkdir(parents=True, exist_ok=True)
    cases = [case for file in given.files for case in json.loads(file.read_text())["cases"]]
    with mpl.rc_context(STYLE):
        for name, draw in DRAWINGS.items():
            if found := [case for case in cases if case["case"] == name]:
                path = given.images / f"{name}.svg"
                drawn = draw(found)
                drawn.savefig(path, bbox_inches="tight", metadata={"Date": None})
                plt.close(drawn)
                print(path)


if __name__ == "__main__":
    main()
