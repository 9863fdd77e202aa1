"""How fast `outbox verify` compares: the command as users run it, from its start to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from outbox.bench.drain import LONGEST
from outbox.bench.figures import Figures
from outbox.bench.site import RelayProcess, Site
from outbox.errors import OutboxError

RETENTION = {"a consumer": "limits", "direct gets": "workqueue"}


def verify(site: Site, *, read_by: str, transactions: int, events: int, payload: int) -> Figures:
    """Send a backlog, and compare the stream with it; the stream's retention decides how it is read."""
    site.prepare(retention=RETENTION[read_by])
    site.load(transactions, events, payload)
    with RelayProcess(site, "--drain") as relay:
        relay.ended(LONGEST)
    before, began = os.times(), time.monotonic()
    command = [sys.executable, "-m", "outbox", "verify", "--json"]
    done = subprocess.run(command, env=site.environment, cwd=site.folder, capture_output=True, check=False)
    took, after = time.monotonic() - began, os.times()
    total = transactions * events
    if done.returncode or sum(each["messages"] for each in json.loads(done.stdout)) != total:
        raise OutboxError(f"not all was found as it should be: {(done.stderr or done.stdout)[-500:].decode()}")
    site.prepare()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"verify_messages_per_second": total / took, "verify_cpu_us_per_message": cpu / total * 1e6}
