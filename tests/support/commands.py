"""The command line as a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def outbox(environment: dict[str, str], *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `outbox`, as 80 columns wide; never a traceback."""
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
