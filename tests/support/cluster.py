"""Three nats-servers as one cluster on the loopback interface, and what a test asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nats.errors

from outbox.embedded import free_port
from tests.support.bed import Broker, Stored, until
from tests.support.servers import own_nats


class Cluster:
    """Three servers, each of which can be killed, frozen and started again."""

    def __init__(self, directory: Path) -> None:
        routes = [free_port() for _ in range(3)]
        others = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
        self.servers = {
            f"n{number}": own_nats(
                directory / f"n{number}",
                config=f"server_name: n{number}\n"
                f"cluster {{ name: three, listen: 127.0.0.1:{route}, routes: [{others}] }}",
            )
            for number, route in enumerate(routes, start=1)
        }
        self.url = ",".join(server.url for server in self.servers.values())

    @property
    def broker(self) -> Broker:
        """Through the first server that runs."""
        return Broker(next(server.url for server in self.servers.values() if server.running))

    def create_stream(self, name: str, *subjects: str, **config: Any) -> None:
        """A stream with three replicas, as soon as the cluster can make one."""

        def made() -> bool:
            given = {"name": name, "subjects": list(subjects), "num_replicas": 3, "allow_atomic": True, **config}
            answer = self._asked(f"STREAM.CREATE.{name}", given)
            return bool(answer) and "error" not in answer

        until(made, patience=40, what="a stream with three replicas")
        self.leader(name)

    def leader(self, name: str) -> str:
        """The server that leads the stream, as soon as there is one."""

        def led() -> str:
            answer = self._asked(f"STREAM.INFO.{name}")
            return str((answer.get("cluster") or {}).get("leader") or "")

        return until(led, patience=40, what="a stream leader")

    def delete_stream(self, name: str) -> None:
        """Delete it, if the cluster answers now."""
        self._asked(f"STREAM.DELETE.{name}")

    def step_down(self, name: str) -> None:
        """Let another server lead the stream."""
        self._asked(f"STREAM.LEADER.STEPDOWN.{name}")

    def read(self, name: str) -> list[Stored]:
        """The whole stream, as soon as the cluster lets it be read."""
        stored: list[Stored] = []

        def found() -> bool:
            try:
                stored[:] = self.broker.read(name)
            except nats.errors.Error:
                return False
            return True

        until(found, patience=40, what="a cluster that can be read")
        return stored

    def _asked(self, call: str, body: object = None) -> dict[str, Any]:
        """The answer, or nothing while the cluster has no leader that could answer."""
        try:
            return self.broker.api(call, body, timeout=2)
        except nats.errors.Error:
            return {}


@contextmanager
def three_nodes(directory: Path) -> Iterator[Cluster]:
    """A cluster that runs; stopped at the end."""
    cluster = Cluster(directory)
    with ExitStack() as stack:
        for server in cluster.servers.values():
            stack.enter_context(server)
        yield cluster
