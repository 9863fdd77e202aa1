"""The command line: parse, call one function, print, exit with 0 (done), 1 (failed), 2 (usage) or 3 (not drained).

Knows typer, rich and what fits a terminal. Must not decide anything, and must not speak SQL.
"""

import os

# rich takes a width of 0, which some programs leave in COLUMNS, at its word, and as soon as it is loaded.
if not os.environ.get("COLUMNS", "").strip("0"):
    os.environ.pop("COLUMNS", None)
