"""Every recipe runs as it stands in its page, from top to bottom, and prints what the page says that it prints."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.embedded import Nats
from tests.support.bed import Broker, until
from tests.support.documents import DOCS, ROOT, blocks, libpq, named

RECIPES = sorted(path for path in (DOCS / "recipes").glob("*.md") if path.name != "README.md")
UUID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
MODULES = ("outbox", "uvicorn")  # commands that are run as modules of this interpreter


class Shell:
    """The few things that the command lines of recipes do, in a folder of their own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        self._port = str(_free_port())
        self._background: list[subprocess.Popen[bytes]] = []

    def run(self, line: str) -> str:
        """The line's standard output; what stands behind `||` runs if what is before it fails, as a shell has it."""
        line = line.replace("8000", self._port)
        if line.endswith("&"):
            self._start(line.removesuffix("&"))
            return ""
        if line.startswith("curl "):
            return _curl(*shlex.split(line)[1:])
        fails, _, line = line.rpartition(" || ")
        before = self._command(fails, succeeds=False) if fails else ""
        return before + self._command(line, succeeds=True)

    def _words(self, line: str) -> list[str]:
        name, *rest = shlex.split(line)
        return [sys.executable, *(["-m", name] if name in MODULES else []), *rest]

    def _command(self, line: str, *, succeeds: bool) -> str:
        done = subprocess.run(
            self._words(line),
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode == 0) is succeeds, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _start(self, line: str) -> None:
        log = (self._folder / "background.log").open("wb")
        with log:
            process = subprocess.Popen(
                self._words(line), cwd=self._folder, env=self._environment, stdout=log, stderr=log
            )
        self._background.append(process)
        until(lambda: process.poll() is not None or _accepts(int(self._port)))

    def close(self) -> None:
        for process in self._background:
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _curl(option: str, method: str, url: str) -> str:
    """The answer's body, whatever its status, as a line of its own."""
    assert option == "-X"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
            return f"{answer.read().decode()}\n"
    except urllib.error.HTTPError as error:
        with error:
            return f"{error.read().decode()}\n"


def same_but_for_ids(text: str) -> str:
    """The text with each UUID replaced by its number: which are equal matters, what they are does not."""
    found = list(dict.fromkeys(match[0] for match in UUID.finditer(text)))
    return UUID.sub(lambda match: f"UUID {found.index(match[0])}", text)


@pytest.fixture
def shell(database: str, nats: Nats, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, {**libpq(database), "OUTBOX_NATS_URL": nats.url})
    yield shell
    shell.close()
    broker = Broker(nats.url)
    for name in broker.api("STREAM.NAMES")["streams"] or []:
        broker.api(f"STREAM.DELETE.{name}")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe: Path, shell: Shell, tmp_path: Path) -> None:
    for name, text in named(recipe, "python").items():
        (tmp_path / name).write_text(text)
    (lines,), (transcript,) = blocks(recipe, "sh"), blocks(recipe, "text")
    heard = "".join(shell.run(line) for line in lines.splitlines())
    assert same_but_for_ids(heard) == same_but_for_ids(transcript)


def test_every_recipe_is_in_the_list() -> None:
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "recipes" / "README.md").read_text())
    assert sorted(listed) == [path.name for path in RECIPES]
