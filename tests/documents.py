"""Reading documents, and the environment in which their examples run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def blocks(document: Path, language: str) -> Iterator[str]:
    """The fenced blocks of this language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def named(document: Path, language: str) -> dict[str, str]:
    """The blocks of this language by the name in their first line, which is a comment."""
    found = [re.match(r"(?:#|--) (.+)\n", block) for block in blocks(document, language)]
    named = [match.group(1) if match else "" for match in found]
    return dict(zip(named, blocks(document, language), strict=True))


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(document: Path) -> list[str]:
    """What stands between backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def section(document: Path, title: str) -> str:
    """The text under a heading, to the next heading of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", document.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{document.name} has no section {title}"
    return found.group(1)


def first_cells(text: str) -> list[str]:
    """What stands between backticks in the first cells of the tables in `text`."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def anchors(document: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def libpq(url: str) -> dict[str, str]:
    """The connection as libpq's environment variables."""
    parts = psycopg.conninfo.conninfo_to_dict(url)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
    return {variable: str(parts[name]) for name, variable in names.items()}
