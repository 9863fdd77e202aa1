"""The relay beside its surroundings: a log that nobody reads, closed descriptors, signals, and how it ends.

Fault and promise are named by each test; what is written to standard error is read as whoever collects it would.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outbox.embedded import Nats, Postgres, free_port
from tests.support.bed import Waited, rows, until, wait_until_sent
from tests.support.commands import ROOT
from tests.support.proxy import Proxy
from tests.support.servers import Stream

PATIENCE = 25.0


def defaults() -> None:
    """What a shell may have a background process ignore, and children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(environment: dict[str, str], *words: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """`outbox` as a process that is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "outbox", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "preexec_fn": defaults, **streams},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise Waited("the process goes on") from None


def stopped(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    return ended(process)


def add(url: str, stream: Stream, transactions: int = 1) -> None:
    """So many transactions, over one connection."""
    one = f"PERFORM outbox.add('{stream.prefix}.x', 'x'); COMMIT;"
    rows(url, f"DO $$ BEGIN FOR n IN 1..{transactions} LOOP {one} END LOOP; END $$")


def parsed(text: bytes) -> list[dict[str, Any]]:
    """Every line, each of which is one object of JSON."""
    return [json.loads(line) for line in text.splitlines()]


# --- a log that nobody reads


def full_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return reading, writing


def refusing_pipe() -> tuple[int, int]:
    """Somebody else has made it non-blocking, for all who have it."""
    reading, writing = full_pipe()
    os.set_blocking(writing, False)
    return reading, writing


def closed_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    os.close(reading)
    return os.open(os.devnull, os.O_RDONLY), writing


def full_disk() -> tuple[int, int]:
    return os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)


def stopped_terminal() -> tuple[int, int]:
    reading, writing = pty.openpty()
    termios.tcflow(writing, termios.TCOOFF)
    return reading, writing


def full_socket() -> tuple[int, int]:
    """What systemd gives for the journal."""
    reading, writing = socket.socketpair()
    writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return reading.detach(), writing.detach()


@pytest.mark.parametrize("sink", [full_pipe, refusing_pipe, closed_pipe, full_disk, stopped_terminal, full_socket])
def test_log_that_nobody_takes_stops_nothing(
    environment: dict[str, str], database: str, stream: Stream, sink: Callable[[], tuple[int, int]]
) -> None:
    """Fault: nobody reads standard error. Promise: all is published, and SIGTERM ends it in order."""
    reading, writing = sink()
    with started(environment, "relay", "--verbose", "--batch", "transaction", stderr=writing, stdout=writing) as relay:
        os.close(writing)
        add(database, stream, 80)
        wait_until_sent(database)
        assert stopped(relay) == 0
    os.close(reading)


def test_what_was_dropped_is_counted_and_told(environment: dict[str, str], database: str, stream: Stream) -> None:
    reading, writing = full_pipe()
    port = free_port()
    flags = ("--log", "json", "--verbose", "--batch", "transaction", "--listen", f"127.0.0.1:{port}")

    with started(environment, "relay", *flags, stderr=writing) as relay:
        os.close(writing)
        for _ in range(10):
            add(database, stream, 300)
            wait_until_sent(database)
            if lost := counted(port, "outbox_log_lines_dropped_total"):
                break
        assert lost > 0
        with os.fdopen(reading, "rb") as log:
            seen: list[dict[str, Any]] = []
            while not seen or seen[-1]["event"] != "LinesDropped":
                seen.append(json.loads(log.readline()))
            assert seen[-1]["lines"] >= lost
            assert seen[-1]["lines"] <= counted(port, "outbox_log_lines_dropped_total")
            relay.terminate()
            assert [each["event"] for each in parsed(log.read())][-1] == "Stopped"
        assert ended(relay) == 0


def test_last_words_get_out_and_hang_nobody(environment: dict[str, str], database: str) -> None:
    """Fault: a relay that halts, with a log that is full, or that has a reader."""
    rows(database, "UPDATE outbox.relay SET system_identifier = 42")
    reading, writing = full_pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 512)
    os.set_blocking(writing, True)
    with started(environment, "relay", stderr=writing) as relay:
        assert ended(relay) == 1
    os.close(writing)
    os.close(reading)
    with started(environment, "relay", stderr=subprocess.PIPE) as relay:
        assert relay.stderr
        assert b"outbox rebase" in relay.stderr.read()
        assert ended(relay) == 1


def test_libraries_and_the_interpreter_write_lines_of_the_log(
    environment: dict[str, str], database: str, stream: Stream, workplace: Path
) -> None:
    """libpq itself warns of a password file that others can read; warnings and lost errors are Python's."""
    passwords = workplace / "pgpass"
    passwords.write_text("nowhere:1:x:y:z\n")
    passwords.chmod(0o644)
    (workplace / "sitecustomize.py").write_text(
        "import sys, warnings, threading, asyncio, logging\n"
        "from outbox.relay import relay\n"
        "serve = relay.Relay._serve\n"
        "async def broken():\n    raise ValueError('from a task')\n"
        "async def strange(self, *a, **k):\n"
        "    warnings.warn('from a warning', UserWarning, stacklevel=1)\n"
        "    print('from a print', file=sys.stderr)\n"
        "    print('from another')\n"
        "    threading.Thread(target=lambda: 1 / 0).start()\n"
        "    asyncio.ensure_future(broken())\n"
        "    await asyncio.sleep(0.05)\n"
        "    __import__('gc').collect()\n"
        "    logging.getLogger('someone').error('two\\nlines')\n"
        "    return await serve(self, *a, **k)\n"
        "relay.Relay._serve = strange\n"
    )
    given = {
        **environment,
        "PGPASSFILE": str(passwords),
        "PYTHONPATH": f"{workplace}:{ROOT}",
        "OUTBOX_LOG": "json",
        "PYTHONWARNINGS": "always::UserWarning",
    }
    add(database, stream)
    with started(given, "relay", "--drain", stderr=subprocess.PIPE) as relay:
        assert relay.stderr
        lines = parsed(relay.stderr.read())
        assert ended(relay) == 0
    said = "\n".join(each["message"] for each in lines)
    prints = ("from a print", "from another")
    for words in (*prints, "has group or world access", "from a warning", "two lines", "a thread has ended"):
        assert words in said
    (task,) = [each for each in lines if "never retrieved" in each["message"]]
    assert "ValueError: from a task" in task["traceback"]
    assert {"time", "level", "pid", "event", "message"} <= set.intersection(*map(set, lines))


# --- every line is JSON, to the last word


def break_relay(folder: Path) -> None:
    """Have every relay die of something that nobody expected."""
    (folder / "sitecustomize.py").write_text(
        "from outbox.relay import relay\n"
        "async def broken(self, **k):\n    raise LookupError('postgresql://u:s3cr3t@h/d: \\u2192 odd')\n"
        "relay.Relay.run = broken\n"
    )


WAYS: dict[str, tuple[Sequence[str], dict[str, str], str, int]] = {
    "halt": ((), {}, "UPDATE outbox.relay SET system_identifier = 42", 1),
    "no outbox": ((), {"OUTBOX_SCHEMA": "none"}, "", 1),
    "denied": ((), {"OUTBOX_NATS_CREDENTIALS": "nobody.creds"}, "", 1),
    "wrong setting": ((), {"OUTBOX_WINDOW": "x", "OUTBOX_ON_DEAD": "y"}, "", 2),
    "no such flag": (("--no-such-flag",), {}, "", 2),
    "wrong value": (("--window", "many"), {}, "", 2),
    "wrong form of the log": (("--log", "xml"), {}, "", 2),
    "flags that go together": (("--log", "json", "--create-stream", "X"), {"OUTBOX_LOG": "human"}, "", 2),
    "unexpected": ((), {"BREAK": "1"}, "", 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_line_is_json_to_the_last_word(
    environment: dict[str, str], database: str, workplace: Path, way: str
) -> None:
    flags, more, statement, code = WAYS[way]
    (workplace / "outbox.toml").write_text('log = "json"\n')
    (workplace / "nobody.creds").write_text("not credentials\n")
    if statement:
        rows(database, statement)
    given = {**environment, **more}
    if given.pop("BREAK", ""):
        break_relay(workplace)
        given["PYTHONPATH"] = f"{workplace}:{ROOT}"
    with started(given, "relay", *flags, stderr=subprocess.PIPE, cwd=workplace) as relay:
        assert relay.stderr
        lines = parsed(relay.stderr.read())
        assert ended(relay) == code
    assert lines
    if code == 1:
        last = lines[-1]
        assert (last["event"], last["level"]) == ("Failed", "error")
        assert last["remedy"]
        assert bool(last["traceback"]) is (way == "unexpected")
        assert "s3cr3t" not in json.dumps(lines)


def test_defect_of_a_relay_is_in_its_log_with_a_traceback(environment: dict[str, str], workplace: Path) -> None:
    break_relay(workplace)
    given = {**environment, "PYTHONPATH": f"{workplace}:{ROOT}", "PYTHONIOENCODING": "ascii"}
    with started(given, "relay", stderr=subprocess.PIPE) as relay:
        assert relay.stderr
        said = relay.stderr.read().decode()
        assert ended(relay) == 1
    assert "Traceback" in said
    assert "sitecustomize.py" in said
    assert "report it" in said.splitlines()[-1]
    assert "s3cr3t" not in said


# --- descriptors, signals, ends


@pytest.mark.parametrize(
    ("words", "closed"), [("relay", (2,)), ("relay", (1,)), ("relay", (0, 1, 2)), ("status", (0, 1, 2))]
)
def test_closed_descriptors_are_nobody_elses(
    environment: dict[str, str], database: str, stream: Stream, closed: tuple[int, ...], words: str
) -> None:
    """Fault: started without standard streams. Promise: no socket gets their numbers; an orderly end is one."""

    def close() -> None:
        defaults()
        for each in closed:
            os.close(each)

    add(database, stream)
    with started(environment, words, preexec_fn=close) as process:
        if words == "relay":
            wait_until_sent(database)
            for each in closed:
                assert not Path(f"/proc/{process.pid}/fd/{each}").is_socket()
            process.terminate()
        assert ended(process) == 0


def test_signals_that_mean_nothing_here_are_told_and_ignored(
    environment: dict[str, str], database: str, stream: Stream
) -> None:
    with started(environment, "relay", "--log", "json", stderr=subprocess.PIPE) as relay:
        assert relay.stderr
        lines = map(json.loads, relay.stderr)
        assert any(each["event"] == "TookLead" for each in lines)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
            relay.send_signal(number)
        ignored = set[str]()
        while ignored != {"SIGHUP", "SIGUSR1", "SIGUSR2"}:
            ignored |= {each["signal"] for each in [next(lines)] if each["event"] == "Ignored"}
        add(database, stream)
        wait_until_sent(database)
        for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with contextlib.suppress(ProcessLookupError):
                relay.send_signal(number)
        assert ended(relay) == 0


SIGNALS_ITSELF = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("module", ["typer", "prometheus_client", "outbox.relay.relay"])
@pytest.mark.parametrize(
    ("number", "flags", "code"), [("SIGTERM", (), 0), ("SIGINT", (), 0), ("SIGQUIT", ("--drain",), 3)]
)
def test_relay_that_is_stopped_while_it_is_loaded(
    environment: dict[str, str], workplace: Path, module: str, number: str, flags: Sequence[str], code: int
) -> None:
    """Fault: a signal in the first second of the process. Promise: an orderly end, without a word."""
    (workplace / "sitecustomize.py").write_text(SIGNALS_ITSELF.format(module=module, number=number))
    given = {**environment, "PYTHONPATH": f"{workplace}:{ROOT}"}
    with started(given, "relay", *flags, stderr=subprocess.PIPE) as relay:
        assert relay.stderr
        assert relay.stderr.read() == b""
        assert ended(relay) == code


@pytest.mark.parametrize(
    ("held", "number"), [("paused", signal.SIGTERM), ("standby", signal.SIGINT), ("unreachable", signal.SIGTERM)]
)
def test_drain_that_was_stopped_says_so(
    environment: dict[str, str], database: str, stream: Stream, held: str, number: int
) -> None:
    """Fault: a relay is stopped before it is drained. Promise: its exit code is not that of a relay that is."""
    add(database, stream)
    rows(database, "UPDATE outbox.relay SET paused_at = now(), paused_why = 'a test'")
    begun = {"paused": "Paused", "standby": "StandingBy", "unreachable": "Unreachable"}[held]
    if held == "unreachable":
        environment["OUTBOX_NATS_URL"] = "nats://127.0.0.1:1"
    with contextlib.ExitStack() as stack:
        if held == "standby":
            leader = stack.enter_context(started(environment, "relay", "--log", "json", stderr=subprocess.PIPE))
            assert leader.stderr
            assert any(json.loads(line)["event"] == "TookLead" for line in leader.stderr)
        relay = stack.enter_context(started(environment, "relay", "--drain", "--log", "json", stderr=subprocess.PIPE))
        assert relay.stderr
        assert any(json.loads(line)["event"] == begun for line in relay.stderr)
        relay.send_signal(number)
        assert ended(relay) == 3


def test_collector_that_is_away_delays_no_end(environment: dict[str, str], database: str, stream: Stream) -> None:
    """Fault: nobody takes spans: refused, or never answered. Promise: the stop waits for them two seconds at most."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):
            given = {**environment, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OUTBOX_TRACES": "true"}
            with started(given, "relay", "--log", "json", stderr=subprocess.PIPE) as relay:
                add(database, stream)
                wait_until_sent(database)
                relay.terminate()
                assert relay.stderr
                lines = parsed(relay.stderr.read())
                assert ended(relay) == 0
            events = [each["event"] for each in lines]
            assert "Stopped" in events
            # A shutdown that was waited for to its end would have told that the spans could not be exported.
            assert not any("Failed to export" in each["message"] for each in lines[events.index("Stopped") :])


# --- an outage in the log


def counted(port: int, metric: str, label: str = "") -> float:
    """A counter of the relay that listens there, 0 before it answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{metric}{{") and label in line:
                return float(line.rpartition(" ")[2])
    return 0


@pytest.mark.parametrize("server", ["postgres", "nats"])
def test_outage_is_told_at_its_beginning_and_at_its_end(
    environment: dict[str, str], postgres: Postgres, nats: Nats, database: str, server: str
) -> None:
    """Fault: a server is away for many tries. Promise: a line each in the log; metrics count every one."""
    port, failures = free_port(), "outbox_connection_failures_total"
    with Proxy(postgres.port) as first, Proxy(nats.port) as second:
        environment["OUTBOX_DATABASE_URL"] = database.replace(f":{postgres.port}/", f":{first.port}/")
        environment["OUTBOX_NATS_URL"] = f"nats://127.0.0.1:{second.port}"
        with started(environment, "relay", "--listen", f"127.0.0.1:{port}", stderr=subprocess.PIPE) as relay:
            assert relay.stderr
            assert any(b"connected to nats" in line for line in relay.stderr)
            proxy = {"postgres": first, "nats": second}[server]
            proxy.refusing = True
            proxy.cut()
            until(lambda: counted(port, failures, server) >= 6)
            proxy.heal()
            lines: list[str] = []
            while not lines or "connected to nats" not in lines[-1]:
                lines.append(next(relay.stderr).decode())
            assert stopped(relay) == 0
    about = [line for line in lines if f"{server} cannot" in line or f"connected to {server}" in line]
    assert len(about) == 2, lines
    assert "cannot be used" in about[0]
    assert re.search(r"\(after [\d.]+ s\)$", about[1].strip())
    assert len(lines) <= 5


# --- commands: never a traceback


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    """What a command wrote to standard error; never a traceback, and at most a few lines."""
    words = done.stderr.decode()
    assert "Traceback" not in words
    assert "Exception ignored" not in words
    assert len(words.splitlines()) <= 4
    return words


def command(environment: dict[str, str], *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    given = {name: value for name, value in given.items() if value != "unset"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **more}
    return subprocess.run([sys.executable, "-m", "outbox", *words], env=given, timeout=60, check=False, **streams)


@pytest.mark.parametrize(
    "given",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "0", "TERM": "dumb", "HOME": "unset"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_whatever_the_terminal_can_show(environment: dict[str, str], database: str, given: dict[str, str]) -> None:
    """Fault: rows outside ASCII, on a terminal that takes no others, or has no width."""
    rows(database, "INSERT INTO outbox.events (subject, payload) VALUES ('größe.→', '\\xc3bc'), ('größe.→', '\\xff')")
    rows(database, "UPDATE outbox.relay SET paused_at = now(), paused_why = 'Maßnahme ☂'")
    rows(database, "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'by hand: größer 🦆'")
    for words in (["status"], ["dead", "list"], ["show", "1"]):
        done = command({**environment, **given}, *words)
        assert done.returncode == 0, said(done)
        assert done.stdout.strip()
        assert said(done) == ""


@pytest.mark.parametrize("words", ["status", "--help", "status --watch --json"])
def test_output_that_cannot_be_written(environment: dict[str, str], words: str) -> None:
    """Fault: a full disk, and a pipe that nobody reads. Promise: one error with its remedy; a silent end."""
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        done = command(environment, *words.split(), stdout=full)
    assert done.returncode == 1
    assert "No space left" in said(done)
    reading, writing = closed_pipe()
    done = command(environment, *words.split(), stdout=writing)
    os.close(reading)
    os.close(writing)
    assert (done.returncode, said(done)) == (141, "")


def test_errors_that_cannot_be_written_keep_their_exit_code(environment: dict[str, str]) -> None:
    for code, words in ((1, ["status", "--schema", "none"]), (2, ["no-such-command"])):
        for sink in (full_disk, closed_pipe):
            reading, writing = sink()
            assert command(environment, *words, stdout=writing, stderr=writing).returncode == code
            os.close(reading)
            os.close(writing)


@pytest.mark.parametrize("words", ["status --watch", "doctor", "verify"])
def test_interrupt_is_silent(environment: dict[str, str], words: str) -> None:
    """Fault: Ctrl-C while a command waits for a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given = {**environment, "OUTBOX_DATABASE_URL": f"postgresql://x@127.0.0.1:{silent.getsockname()[1]}/x"}
        with started(given, *words.split(), stderr=subprocess.PIPE) as process:
            silent.settimeout(PATIENCE)
            accepted, _ = silent.accept()
            process.send_signal(signal.SIGINT)
            assert process.stderr
            words_said = process.stderr.read()
            assert ended(process) in ((0, 130) if "watch" in words else (130,))
            assert words_said.strip() == b""
            accepted.close()


def test_folder_that_is_gone_and_files_that_are_none(environment: dict[str, str], workplace: Path) -> None:
    gone = workplace / "gone"
    gone.mkdir()
    done = command(environment, "status", cwd=gone, preexec_fn=gone.rmdir)
    assert (done.returncode, said(done)) == (0, "")
    for content in (b"\xff\x00\x01", b"window = " + b"[" * 100_000, b'listen = "\\u0000:1"\n'):
        (workplace / "outbox.toml").write_bytes(content)
        done = command(environment, "relay", "--drain", cwd=workplace)
        assert done.returncode in (1, 2)
        assert "defect" not in said(done)
    (workplace / "outbox.toml").unlink()
    word = "größe\udcfc"
    for more, words in (({}, ["pause", "--why", word]), ({"OUTBOX_SCHEMA": word}, ["status"])):
        done = command({**environment, **more}, *words)
        assert (done.returncode, "UTF-8" in said(done)) == (2, True)


def test_defect_is_one_line_and_a_traceback_on_request(environment: dict[str, str], workplace: Path) -> None:
    (workplace / "sitecustomize.py").write_text(
        "import outbox.operate.status\n"
        "def broken(*a):\n    raise LookupError('postgresql://u:s3cr3t@h/d\\n odd')\n"
        "outbox.operate.status.status = broken\n"
    )
    given = {**environment, "PYTHONPATH": f"{workplace}:{ROOT}"}
    done = command(given, "status")
    assert done.returncode == 1
    assert "LookupError" in said(done)
    assert "report it" in said(done)
    shown = command({**given, "OUTBOX_DEBUG": "1"}, "status").stderr.decode()
    assert "Traceback" in shown
    assert "s3cr3t" not in shown + said(done)
