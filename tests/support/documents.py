"""Reading documents: their blocks, names and command lines, and the environment in which their examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg
import typer.main

from outbox.cli.app import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
ENDS_OF_COMMANDS = {"&&", "||", "|", ";", "&"}


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


def invocations(text: str) -> Iterator[list[str]]:
    """The words behind `outbox` in a command line, once for each time that it is called there."""
    words = shlex.split(text)
    for index, word in enumerate(words[:-1]):
        if Path(word).name == "outbox" and re.fullmatch(r"[a-z]+", words[index + 1]):
            behind = words[index + 1 :]
            ends = [place for place, each in enumerate(behind) if each in ENDS_OF_COMMANDS]
            yield behind[: ends[0]] if ends else behind


def check_command(words: list[str]) -> None:
    """Fails unless the command line would be accepted: command, flags and the values of choices.

    A command by its name alone is spoken of, not run: it may have arguments that it needs.
    """
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in commands, f"there is no command outbox {words[0]}"
    if below := getattr(commands[words[0]], "commands", None):
        assert not words[1:] or words[1] in below, f"there is no command outbox {' '.join(words[:2])}"
        commands, words = below, words[1:]
    if words[1:]:
        commands[words[0]].make_context(words[0], words[1:])


def flags() -> set[str]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    below = [command for group in commands.values() for command in getattr(group, "commands", {}).values()]
    return {flag for command in (*commands.values(), *below) for parameter in command.params for flag in parameter.opts}


def run(*command: str, folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
