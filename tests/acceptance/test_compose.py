"""The deployment files: they are well-formed, and every command and setting in them exists. Nothing is started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from outbox.cli import app
from outbox.config import Settings, load

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILE = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]


def instructions(name: str) -> list[str]:
    """The arguments of an instruction of the Dockerfile, for each time that it is there."""
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE if line.startswith(f"{name} ")]


def test_services() -> None:
    assert SERVICES.keys() == {"postgres", "nats", "migrate", "relay"}
    assert OURS.keys() == {"migrate", "relay"}


@pytest.mark.parametrize("name", OURS)
def test_commands_and_settings_exist(name: str) -> None:
    command, *flags = OURS[name]["command"]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[command].make_context(command, flags)
    environment: dict[str, str] = OURS[name]["environment"]
    assert environment
    for variable in environment:
        assert variable.removeprefix("OUTBOX_").lower() in Settings.model_fields
    settings = load(environment).settings
    assert settings.database_url == environment["OUTBOX_DATABASE_URL"]
    assert settings.nats_servers == [environment["OUTBOX_NATS_URL"]]


def test_urls_lead_to_the_services() -> None:
    database = SERVICES["postgres"]["environment"]
    user, password, name = (database[f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB"))
    for service in OURS.values():
        assert service["environment"]["OUTBOX_DATABASE_URL"] == f"postgresql://{user}:{password}@postgres:5432/{name}"
        assert service["environment"]["OUTBOX_NATS_URL"] == "nats://nats:4222"


def test_each_waits_for_what_it_needs() -> None:
    for service in SERVICES.values():
        for name, needed in service.get("depends_on", {}).items():
            if needed["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name], name
            else:
                assert needed["condition"] == "service_completed_successfully"
                assert SERVICES[name]["restart"] == "no"
    assert SERVICES["relay"]["depends_on"].keys() == {"migrate", "nats"}
    assert SERVICES["migrate"]["depends_on"].keys() == {"postgres"}


def test_data_is_in_named_volumes_and_ports_are_local() -> None:
    used = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == COMPOSE["volumes"].keys() == {"postgres", "nats"}
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_have_a_version() -> None:
    images = [service["image"] for service in SERVICES.values()] + instructions("FROM")
    for image in images:
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]*", image), image


def test_the_image_runs_the_command_and_not_as_root() -> None:
    assert instructions("ENTRYPOINT") == ['["outbox"]']
    user = instructions("USER")[-1]
    assert user.split(":")[0] not in {"root", "0"}
    assert any(f"useradd --system --uid 10001 --no-create-home {user}" in line for line in DOCKERFILE)
    assert DOCKERFILE.index(f"USER {user}") > max(index for index, line in enumerate(DOCKERFILE) if "RUN" in line)


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {source for arguments in instructions("COPY") for source in arguments.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
