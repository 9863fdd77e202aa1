"""The command line: as a process of its own, and, where only its words and its exit code matter, within this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from outbox.cli.app import main

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]


def process(environment: Mapping[str, str], *words: str, cwd: Path | None = None) -> Done:
    """Run `outbox` as a process, as 80 columns wide; never a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "outbox", *words],
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )
    assert "Traceback" not in done.stderr
    return done


def outbox(environment: Mapping[str, str], *words: str, cwd: Path | None = None) -> Done:
    """What `outbox` does, without the half second that a process takes; a relay has one of its own all the same.

    Nobody answers its questions. A traceback is an error of the test.
    """
    if words[0] in ("relay", "demo", "bench") or "COLUMNS" in environment:
        return process(environment, *words, cwd=cwd)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(sys, "argv", ["outbox", *words]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO()))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Done(["outbox", *words], code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())
