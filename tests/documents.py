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


def libpq(url: str) -> dict[str, str]:
    """The connection as libpq's environment variables."""
    parts = psycopg.conninfo.conninfo_to_dict(url)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
    return {variable: str(parts[name]) for name, variable in names.items()}
