"""Compose file and image: well-formed, and every command, setting and file in them exists. Nothing is started."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from outbox.cli.app import app
from outbox.config import Settings
from outbox.sources import load

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
CONSTRAINTS, IMAGE = ROOT / ".ci" / "constraints.txt", ROOT / "docs" / "deploy" / "requirements.txt"
DOCKERFILE = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]


def instructions(name: str) -> list[str]:
    """The arguments of an instruction of the Dockerfile, for each time that it is there."""
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE if line.startswith(f"{name} ")]


def test_it_fits_the_schema_of_compose() -> None:
    schema = resources.files("check_jsonschema.builtin_schemas.vendor").joinpath("compose-spec.json")
    jsonschema.validate(COMPOSE, json.loads(schema.read_text()))


def test_services() -> None:
    without_profile = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert without_profile == {"postgres", "nats", "migrate", "relay"}
    assert {name for name in SERVICES if SERVICES[name].get("profiles") == ["monitoring"]} == {"prometheus", "grafana"}
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
        needs = service.get("depends_on", {})
        if isinstance(needs, list):
            assert needs == ["prometheus"]
            continue
        for name, needed in needs.items():
            if needed["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name], name
            else:
                assert needed["condition"] == "service_completed_successfully"
                assert SERVICES[name]["restart"] == "no"
    assert SERVICES["relay"]["depends_on"].keys() == {"migrate", "nats"}
    assert SERVICES["migrate"]["depends_on"].keys() == {"postgres"}


def test_data_is_in_named_volumes_files_are_read_only_and_ports_are_local() -> None:
    volumes = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert (
        {name for name, *_ in volumes if not name.startswith(".")} == COMPOSE["volumes"].keys() == {"postgres", "nats"}
    )
    for here, _, *mode in (volume for volume in volumes if volume[0].startswith(".")):
        assert (ROOT / here).exists(), here
        assert mode == ["ro"]
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", OURS)
def test_containers_of_ours_have_no_rights(name: str) -> None:
    assert OURS[name]["read_only"]
    assert OURS[name]["cap_drop"] == ["ALL"]
    assert OURS[name]["security_opt"] == ["no-new-privileges:true"]


def test_relay_is_healthy_when_it_is_ready() -> None:
    """By the Python of the image: there is neither curl nor wget."""
    relay = OURS["relay"]
    _, program, option, code = relay["healthcheck"]["test"]
    assert (program, option) == ("python", "-c")
    ast.parse(code)
    port = relay["command"][relay["command"].index("--listen") + 1].rpartition(":")[2]
    assert f'urlopen("http://127.0.0.1:{port}/readyz"' in code


def test_images_have_a_version() -> None:
    bases = [line.split()[0] for line in instructions("FROM")]
    assert len(set(bases)) == 1, "the packages were made for another Python"
    for image in [service["image"] for service in SERVICES.values()] + bases:
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image), image
    version = metadata.version("outbox-relay")
    assert {service["image"] for service in OURS.values()} == {f"outbox-relay:{version}"}
    assert f'org.opencontainers.image.version="{version}"' in (ROOT / "Dockerfile").read_text()


def test_the_image_runs_the_command_and_not_as_root() -> None:
    assert instructions("ENTRYPOINT") == ['["outbox"]']
    (user,) = instructions("USER")
    assert user == "10001:10001"
    assert any("useradd --system --uid 10001 --gid 10001 --no-create-home" in line for line in DOCKERFILE)
    assert DOCKERFILE.index(f"USER {user}") > max(index for index, line in enumerate(DOCKERFILE) if "RUN" in line)


def packages(path: Path) -> dict[str, list[str]]:
    """The blocks of a list of packages by the package's name: one, or one for each range of Python's versions."""
    blocks = re.split(r"\n(?=\w)", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    found: dict[str, list[str]] = {}
    for block in blocks:
        found.setdefault(canonicalize_name(block.partition("==")[0]), []).append(block)
    return found


def versions(blocks: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+==([\w.+!]+)", block)[1] for block in blocks}  # type: ignore[index]


def askers(blocks: list[str]) -> set[str]:
    """Who asks for a package, as the list says of itself; the project is one of them."""
    found = re.findall(r"^ +#(?: via)? +([\w.-]+)(?: \(pyproject\.toml\))?$", "\n".join(blocks), re.MULTILINE)
    return {canonicalize_name(each) for each in found if each != "via"}


def wanted(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for by itself, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    return [each for each in map(Requirement, own) if each.name != project["name"]]


@pytest.mark.parametrize(
    ("path", "extras"), [(CONSTRAINTS, ("demo", "dev", "docs", "traces")), (IMAGE, ("traces",))], ids=["all", "image"]
)
def test_list_of_packages_fits_the_project_and_itself(path: Path, extras: tuple[str, ...]) -> None:
    """Nothing that an index serves today is asked: `.ci/lock` made the lists, and the tests ran with them."""
    there = packages(path)
    for requirement in wanted(*extras):
        blocks = there[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(each, prereleases=True) for each in versions(blocks)), requirement
        assert "outbox-relay" in askers(blocks)
    direct = {canonicalize_name(each.name) for each in wanted(*extras)}
    for name, blocks in there.items():
        assert askers(blocks) <= {*there, "outbox-relay"}, f"{name} is asked for by one that is not there"
        assert askers(blocks) - {"outbox-relay"} or name in direct, f"nobody asks for {name}"


def test_image_has_the_versions_that_were_tested_with_their_hashes() -> None:
    tested = packages(CONSTRAINTS)
    for name, blocks in packages(IMAGE).items():
        assert versions(blocks) <= versions(tested[name])
        assert all("--hash=sha256:" in block for block in blocks)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_what_was_tested_is_installed(file: str) -> None:
    """Every install of the project takes the constraints, but that which tries the newest of everything."""
    installs = [line for line in (ROOT / file).read_text().splitlines() if re.search(r"pip install .*-e ", line)]
    assert installs
    assert all("-c .ci/constraints.txt" in line for line in installs if "--upgrade" not in line)


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    here = [arguments for arguments in instructions("COPY") if not arguments.startswith("--from=")]
    copied = {source for arguments in here for source in arguments.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
