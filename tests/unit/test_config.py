"""Settings: where each comes from, every mistake at once, and nothing secret in any word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from outbox.cli.app import app
from outbox.config import BatchMode, LogFormat, Settings
from outbox.jetstream.credentials import options
from outbox.postgres.session import CONNECTION, _kept
from outbox.sources import Loaded, WrongSettings, find, load
from outbox.text import masked
from tests.support.commands import outbox

NOWHERE = Path("nowhere.toml")
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"


def mistakes(environment: Mapping[str, str], file: Path = NOWHERE, **flags: Any) -> list[str]:
    with pytest.raises(WrongSettings) as error:
        load(environment, file, **flags)
    return error.value.mistakes


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "outbox.toml"
    file.write_text('batch = "transaction"\nwindow = 2\nschema = "from_toml"\n')
    return file


def test_flag_over_environment_over_file_over_default(toml: Path) -> None:
    found = load({"OUTBOX_WINDOW": "3", "OUTBOX_SCHEMA": "from_environment"}, toml, schema="from_flag", log=None)
    assert found.settings.schema == "from_flag"
    assert (found.settings.window, found.settings.batch) == (3, BatchMode.TRANSACTION)
    assert found.settings.log is LogFormat.HUMAN
    assert found.origins == {"schema": "flag", "window": "OUTBOX_WINDOW", "batch": str(toml)}


def test_every_setting_can_come_from_a_file(tmp_path: Path) -> None:
    assert not [name for name in Settings.model_fields if name.endswith("_file")]
    (tmp_path / "given").write_text("what it says\n")
    files = {f"OUTBOX_{name.upper()}_FILE": str(tmp_path / "given") for name in Settings.model_fields}
    assert find(Settings.model_fields, files, NOWHERE).values == dict.fromkeys(Settings.model_fields, "what it says")


def test_secrets_are_read_without_the_last_newline(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(" two words \n")
    settings = load({"OUTBOX_NATS_USER": "u", "OUTBOX_NATS_PASSWORD_FILE": str(secret)}, NOWHERE).settings
    assert options(settings) == {"user": "u", "password": " two words "}


def test_every_mistake_at_once(tmp_path: Path) -> None:
    file = tmp_path / "outbox.toml"
    file.write_text('nats_pasword = "x"\non_dead = "stop"\n')
    (tmp_path / "empty").write_text("\n")
    found = mistakes(
        {
            "OUTBOX_WINDOWS": "1",
            "OUTBOX_NATS_TOKEN": "s3cr3t",
            "OUTBOX_NATS_TOKEN_FILE": "/x",
            "OUTBOX_NATS_PASSWORD_FILE": "/nonexistent/x",
            "OUTBOX_NATS_USER_FILE": str(tmp_path / "empty"),
            "OUTBOX_NATS_NKEY_SEED": "s3cr3t",
            "OUTBOX_DATABASE_URL": "password=my s3cr3t",
        },
        file,
        window=99,
    )
    words = (
        "no setting 'nats_pasword': did you mean nats_password?",
        "OUTBOX_NATS_USER_FILE: ",
        "OUTBOX_NATS_PASSWORD_FILE: /nonexistent/x cannot be read: No such file",
        "OUTBOX_NATS_TOKEN and OUTBOX_NATS_TOKEN_FILE are both given",
        "OUTBOX_WINDOWS is no setting: did you mean OUTBOX_WINDOW?",
        "setting database_url (OUTBOX_DATABASE_URL): is neither a URL",
        "setting nats_nkey_seed (OUTBOX_NATS_NKEY_SEED): is not the seed",
        "setting window (flag): ",
        f"setting on_dead ({file}): ",
    )
    assert len(found) == len(words)
    for each in words:
        assert sum(each in mistake for mistake in found) == 1, (each, found)
    assert "s3cr3t" not in str(found)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NATS_USER": "u"}, "nats_password (OUTBOX_NATS_PASSWORD): goes together with nats_user"),
        ({"NATS_PASSWORD": "s3cr3t"}, "goes together with nats_user"),
        ({"NATS_TOKEN": "s3cr3t", "NATS_NKEY_SEED": SEED}, "nats_token, nats_nkey_seed"),
        ({"NATS_TOKEN": "s3cr3t", "NATS_CREDENTIALS": __file__}, "nats_token, nats_credentials"),
        ({"NATS_TOKEN": "s3cr3t", "NATS_URL": "nats://u:s3cr3t@n"}, "the user in nats_url, nats_token"),
        ({"NATS_TLS_CERT": __file__}, "nats_tls_key (OUTBOX_NATS_TLS_KEY): goes together with nats_tls_cert"),
        ({"NATS_TLS_KEY": __file__}, "goes together with nats_tls_cert"),
        ({"NATS_TLS_CA": "/nonexistent"}, "does not point to a file"),
        ({"NATS_CREDENTIALS": "/nonexistent"}, "does not point to a file"),
        ({"NATS_DOMAIN": "a.b"}, "letters"),
        ({"NATS_URL": "http://u:s3cr3t@n"}, "is not nats://HOST:PORT"),
        ({"NATS_URL": "nats://u:s3cr3t/x@n"}, "percent-encoded"),
        ({"NATS_URL": "nats://u:s3cr3t#x@n:1"}, "percent-encoded"),
        ({"NATS_URL": "nats://u:s3cr3t[@n"}, "percent-encoded"),
        ({"NATS_URL": ","}, "is not nats://HOST:PORT"),
        ({"DATABASE_URL": "postgresql://u:s3cr3t/x@h/db"}, "percent-encoded"),
        ({"DATABASE_URL": "postgresql://u:s3c@s3cr3t@h/db"}, "percent-encoded"),
        ({"DATABASE_URL": "postgresql://u:s3cr3t%zz@h/db"}, "percent-encoded"),
        ({"LISTEN": "9464"}, "is not HOST:PORT"),
        ({"LISTEN": ":99999"}, "is not HOST:PORT"),
    ],
    ids=str,
)
def test_contradictions_and_what_does_not_fit(environment: dict[str, str], words: str) -> None:
    (found,) = mistakes({f"OUTBOX_{name}": value for name, value in environment.items()})
    assert words in found
    assert "s3cr3t" not in found


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"schema = ", "is not valid TOML"), (b"\xff", "it is not UTF-8"), (b"[nats]\nurl = 1\n", "no setting 'nats'")],
)
def test_file_that_cannot_be_used(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "outbox.toml"
    file.write_bytes(content)
    (found,) = mistakes({}, file)
    assert words in found


def test_variables_that_are_not_meant_for_us() -> None:
    """The tests' own; what Kubernetes says of a service called outbox; and empty ones, which count as not given."""
    strangers = {
        "OUTBOX_TESTS_KEEP": "1",
        "OUTBOX_PORT": "tcp://10.0.0.1:9464",
        "OUTBOX_SERVICE_HOST": "10.0.0.1",
        "OUTBOX_SERVICE_PORT_METRICS": "9464",
        "OUTBOX_RELAY_PORT_9464_TCP_ADDR": "10.0.0.1",
        "OUTBOX_NATS_TOKEN": "",
        "OUTBOX": "x",
    }
    assert load(strangers, NOWHERE) == Loaded(settings=Settings(), origins={})


def test_several_servers() -> None:
    settings = Settings(nats_url="nats://a:1, tls://b , c:2")
    assert settings.nats_servers == ["nats://a:1", "tls://b", "nats://c:2"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:s3cr3t@h/db?sslmode=require", "postgresql://u:***@h/db?sslmode=require"),
        ("postgresql://u@h/db?password=s3cr3t&sslmode=require", "postgresql://u@h/db?password=***&sslmode=require"),
        ("postgresql://u:s3c,r3t@h1,h2/db", "postgresql://u:***@h1,h2/db"),
        ("host=h password=s3cr3t&x dbname=db", "host=h password=*** dbname=db"),
        (r"password = 's3 cr\'3t' sslpassword=s3cr3t\ x h=1", "password = *** sslpassword=*** h=1"),
        ("PASSWORD='s3cr3t", "PASSWORD=***"),
        ("nats://u:s3cr3t@a,nats://s3cr3t@b:1,nats://c", "nats://u:***@a,nats://***@b:1,nats://c"),
        ('password authentication failed for user "x"', 'password authentication failed for user "x"'),
    ],
)
def test_masking(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_settings_do_not_show_their_secrets() -> None:
    settings = Settings(database_url="postgresql://u:s3cr3t@h/db", nats_url="nats://u:s3cr3t@h", nats_nkey_seed=None)
    secrets = Settings(nats_token="s3cr3t")
    assert "s3cr3t" not in f"{settings!r} {settings} {secrets!r}"


def test_what_libpq_is_told_elsewhere_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = tmp_path / "services"
    service.write_text("[shop]\nhost=a,b\nport=1,2\nkeepalives_idle=77\nconnect_timeout=3\n")
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    ours = {name: str(value) for name, value in CONNECTION.items()}

    def kept(url: str) -> dict[str, str]:
        return {name: str(value) for name, value in _kept(url).items()}

    assert kept("postgresql:///") == ours
    assert kept("postgresql:///?connect_timeout=9") == {**ours, "connect_timeout": "9"}
    assert kept("service=shop") == {**ours, "keepalives_idle": "77", "connect_timeout": "3"}
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "11")
    assert kept("postgresql:///") == {**ours, "connect_timeout": "11"}
    with pytest.raises(psycopg.ProgrammingError):
        kept("nonsense")


# --- outbox config


def shown(*flags: str, **environment: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["config", *flags], env={"COLUMNS": "80", **environment})
    return done.exit_code, done.output


def test_config_shows_every_setting_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outbox.toml").write_text("window = 2\n")
    (tmp_path / "token").write_text("s3cr3t")
    environment = {"OUTBOX_DATABASE_URL": "postgresql://u:s3cr3t@h/db", "OUTBOX_NATS_TOKEN_FILE": "token"}
    code, text = shown("--json", **environment)
    assert code == 0
    found = {row["name"]: row for row in json.loads(text)}
    assert list(found) == list(Settings.model_fields)
    assert found["database_url"] == {
        "name": "database_url",
        "variable": "OUTBOX_DATABASE_URL",
        "value": "postgresql://u:***@h/db",
        "source": "OUTBOX_DATABASE_URL",
    }
    assert (found["nats_token"]["value"], found["nats_token"]["source"]) == ("***", "OUTBOX_NATS_TOKEN_FILE: token")
    assert (found["window"]["value"], found["window"]["source"]) == ("2", "outbox.toml")
    assert (found["nats_user"]["value"], found["nats_user"]["source"]) == (None, "default")
    code, table = shown(**environment)
    assert code == 0
    assert all(name in table for name in Settings.model_fields)
    assert max(map(len, table.splitlines())) <= 80
    assert "s3cr3t" not in text + table


def test_wrong_settings_end_every_command_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outbox.toml").write_text("window = \n")
    done = outbox({"OUTBOX_SHEMA": "x"}, "config")
    assert done.returncode == 2
    assert "OUTBOX_SHEMA" in done.stderr
    assert "valid TOML" in done.stderr


@pytest.mark.parametrize("url", ["user:secret@nats:4222", "h0:4222,user:secret@h1", "secret@nats", "tls://u:secret@h"])
def test_secret_in_a_nats_url_is_never_shown(url: str) -> None:
    assert "secret" not in str(Settings(nats_url=url).shown("nats_url"))


def test_password_that_ends_the_host_is_refused() -> None:
    """libpq would take it for a port and a database."""
    with pytest.raises(ValueError, match="percent-encoded"):
        Settings(database_url="postgresql://user:123/ss@host/db")
