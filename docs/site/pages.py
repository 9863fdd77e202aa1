"""Which pages the site has, and where each is written. Knows the navigation in `mkdocs.yml`, and nothing of MkDocs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = "docs"
CONFIG = Path(__file__).with_name("mkdocs.yml")
ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "benchmarks.md": "benchmarks/README.md",
}


def source_of(page: str) -> str:
    """The file in the repository that a page of the site is made from."""
    return ELSEWHERE.get(page, f"{DOCS}/{page}")


def expanded(entry: Any) -> Any:
    """The navigation with each folder replaced by its pages, its README first."""
    if isinstance(entry, dict):
        return {title: expanded(below) for title, below in entry.items()}
    if isinstance(entry, list):
        return [each for below in entry for each in _spread(expanded(below))]
    return _folder(entry) if entry.endswith("/") else entry


def _spread(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [entry]


def _folder(folder: str) -> list[str]:
    found = [path.relative_to(ROOT / DOCS).as_posix() for path in (ROOT / DOCS / folder).rglob("*.md")]
    return sorted(found, key=lambda page: (not page.endswith("README.md"), page))


def sections(nav: Any) -> list[tuple[str, list[str]]]:
    """Each top entry of the navigation with all its pages."""
    found = []
    for entry in expanded(nav):
        ((title, below),) = entry.items()
        found.append((title, pages_in(below)))
    return found


def pages_in(entry: Any) -> list[str]:
    """Every page that this part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    below = entry.values() if isinstance(entry, dict) else entry
    return [page for each in below for page in pages_in(each)]
