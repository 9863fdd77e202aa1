"""Files for Kubernetes and systemd, and the guide: they fit their schemas, what they name exists, the SQL runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

from outbox.cli import options
from outbox.config import Settings
from outbox.operate import status
from tests.support.bed import rows
from tests.support.documents import blocks, check_command, invocations, named, run

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNIT = DEPLOY / "systemd" / "outbox-relay@.service"
SETTINGS = DEPLOY / "systemd" / "shop.env"
DOCKERFILE = (DEPLOY.parents[1] / "Dockerfile").read_text()
# Kinds that no cluster has by itself, so their schemas are nowhere to be had.
FOREIGN_KINDS = {"Kustomization", "PodMonitor"}
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [
    each for path in sorted(KUBERNETES.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())
]
PODS: dict[str, dict[str, Any]] = {
    each["metadata"]["name"]: each["spec"]["template"] for each in OBJECTS if each["kind"] in {"Deployment", "Job"}
}
SECRETS = {each["metadata"]["name"]: each["stringData"] for each in OBJECTS if each["kind"] == "Secret"}
each_pod = pytest.mark.parametrize("name", PODS)


def check_setting(variable: str) -> None:
    """Fails unless this is a setting, or the file of one."""
    name = variable.removeprefix("OUTBOX_").lower()
    assert {name, name.removesuffix("_file")} & Settings.model_fields.keys(), variable


def check_settings(variables: Mapping[str, str | Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless all are settings, or the files of settings, and what they say is accepted."""
    for variable, value in variables.items():
        check_setting(variable)
        monkeypatch.setenv(variable, str(value))
    options.settings()


def the(kind: str) -> dict[str, Any]:
    """The only object of its kind."""
    (found,) = (each for each in OBJECTS if each["kind"] == kind)
    return found


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The variables that are given to a container alone."""
    return {each["name"]: each["value"] for each in container["env"]}


# --- the guide


def test_roles_of_the_guide_are_enough(database: str, tmp_path: Path) -> None:
    """The SQL and the command as they are, but for the names of the roles, which all databases of a server share."""
    guide, suffix = DEPLOY / "README.md", database.rpartition("/")[2]

    def own(text: str) -> str:
        return re.sub(r"\b(shop|outbox_relay|outbox_operator)\b", rf"\1_{suffix}", text)

    rows(database, f"CREATE ROLE shop_{suffix} LOGIN")
    rows(database, own(named(guide, "sql")["roles"]))
    (migrate,) = (words for block in blocks(guide, "sh") for words in invocations(block) if "--relay-role" in words)
    owner = {"OUTBOX_DATABASE_URL": database}
    run(sys.executable, "-m", "outbox", *map(own, migrate), folder=tmp_path, environment=owner)

    rows(database.replace("postgres@", f"shop_{suffix}@"), named(guide, "sql")["an event"])
    for role in ("outbox_relay", "outbox_operator"):
        assert status.status(database.replace("postgres@", f"{role}_{suffix}@")).pending_transactions == 1


# --- Kubernetes


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda each: f"{each['kind']}-{each.get('metadata', {}).get('name')}")
def test_object_fits_the_schema_of_kubernetes(thing: dict[str, Any]) -> None:
    if thing["kind"] not in FOREIGN_KINDS:
        kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)


def test_kustomization_names_every_file() -> None:
    commented = re.findall(r"# - (\S+\.yaml)", (KUBERNETES / "kustomization.yaml").read_text())
    named = {*KUSTOMIZATION["resources"], *commented, "kustomization.yaml", "secrets.example.yaml"}
    assert {path.name for path in KUBERNETES.iterdir()} == named


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomization_is_built() -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = [each["kind"] for each in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == [
        "ConfigMap", "Deployment", "Job", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"
    ]  # fmt: skip
    (image,) = KUSTOMIZATION["images"]
    assert done.stdout.count(f"image: {image['newName']}:{image['newTag']}\n") == len(PODS)


@each_pod
def test_command_and_settings_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,), (volume,) = PODS[name]["spec"]["containers"], PODS[name]["spec"]["volumes"]
    check_command(container["args"])
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    assert container["envFrom"] == [{"configMapRef": {"name": generated["name"]}}]
    for key, secret in SECRETS[volume["secret"]["secretName"]].items():
        (tmp_path / key).write_text(secret)
    variables = dict(literal.split("=", 1) for literal in generated["literals"]) | environment(container)
    files = {
        name: tmp_path / Path(path).name for name, path in environment(container).items() if name.endswith("_FILE")
    }
    check_settings(variables | files, monkeypatch)
    assert container["image"] in {each["name"] for each in KUSTOMIZATION["images"]}


@each_pod
def test_secrets_are_files_that_are_there(name: str) -> None:
    (container,), (volume,) = PODS[name]["spec"]["containers"], PODS[name]["spec"]["volumes"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert mount["readOnly"]
    there = {f"{mount['mountPath']}/{key}" for key in SECRETS[volume["secret"]["secretName"]]}
    assert {path for name, path in environment(container).items() if name.endswith("_FILE")} == there
    assert volume["secret"]["defaultMode"] == 0o440, "the group of the pod may read them, nobody may write"


def test_secrets_are_no_real_ones() -> None:
    values = [value for data in SECRETS.values() for value in data.values()]
    assert all("CHANGE-ME" in value for value in values)


@each_pod
def test_pod_has_no_rights(name: str) -> None:
    pod = PODS[name]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert the("ServiceAccount")["metadata"]["name"] == pod["serviceAccountName"]
    inside = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    context = pod["securityContext"]
    assert (str(context["runAsUser"]), str(context["runAsGroup"])) == inside
    assert context["fsGroup"] == context["runAsGroup"]
    assert context["runAsNonRoot"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == wanted
    assert "memory" in container["resources"]["limits"]


def test_rollouts_and_drains_leave_a_relay_that_can_take_over() -> None:
    relay = the("Deployment")["spec"]
    assert relay["replicas"] == 2
    assert relay["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert the("PodDisruptionBudget")["spec"]["minAvailable"] == 1
    assert relay["template"]["spec"]["terminationGracePeriodSeconds"] >= 10


def test_probes_and_scraping_find_the_port_of_listen() -> None:
    pod = PODS["outbox-relay"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert container["args"][container["args"].index("--listen") + 1] == f"0.0.0.0:{port['containerPort']}"
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert the("NetworkPolicy")["spec"]["ingress"] == [{"ports": [{"port": port["containerPort"]}]}]
    (endpoint,) = the("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]


def test_selectors_choose_the_relays_and_the_policy_all() -> None:
    relay, migrate = (PODS[name]["metadata"]["labels"] for name in ("outbox-relay", "outbox-migrate"))
    (term,) = PODS["outbox-relay"]["spec"]["affinity"]["podAntiAffinity"].popitem()[1]
    chosen = [the(kind)["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor")]
    for selector in (*chosen, term["podAffinityTerm"]["labelSelector"]):
        assert selector["matchLabels"].items() <= relay.items()
        assert not selector["matchLabels"].items() <= migrate.items()
    both = the("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
    assert both <= relay.items()
    assert both <= migrate.items()


# --- systemd


def directives(key: str) -> list[str]:
    """The values of a key of the unit, without those that are comments."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def installed(directory: Path) -> Path:
    """The unit as an instance, with a program that is there."""
    path = directory / UNIT.name.replace("@", "@shop")
    path.write_text(
        re.sub(r"^ExecStart=\S+", f"ExecStart={shutil.which('true')}", UNIT.read_text(), flags=re.MULTILINE)
    )
    return path


def systemd() -> int:
    """The version of systemd on this machine; 0 if there is none."""
    if shutil.which("systemd-analyze") is None:
        return 0
    said = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(said.split()[1])


@pytest.mark.skipif(systemd() < 250, reason="systemd 250 is not installed")
@pytest.mark.parametrize("words", [["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]])
def test_systemd_knows_every_line_and_finds_it_hardened(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(["systemd-analyze", *words, installed(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""


def test_unit_runs_a_command_with_settings_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((program, *words),) = (line.split() for line in directives("ExecStart"))
    assert Path(program).name == "outbox"
    check_command(words)
    assert directives("EnvironmentFile") == ["/etc/outbox/%i.env"]
    lines = [line for line in SETTINGS.read_text().splitlines() if not line.startswith("#")]
    given = dict(line.split("=", 1) for line in (*lines, *directives("Environment")))
    assert given["OUTBOX_DATABASE_URL_FILE"] == "%d/database-url"
    (tmp_path / "database-url").write_text("postgresql://outbox_relay@postgres/shop\n")
    check_settings(given | {"OUTBOX_DATABASE_URL_FILE": str(tmp_path / "database-url")}, monkeypatch)
    for line in directives("#Environment"):
        check_setting(line.split("=")[0])


def test_unit_hands_over_the_credentials_that_its_settings_name() -> None:
    for mark in ("", "#"):
        loaded = {line.split(":")[0] for line in directives(f"{mark}LoadCredential")}
        assert loaded == {line.rpartition("%d/")[2] for line in directives(f"{mark}Environment")} != set()


def test_unit_is_restarted_for_ever_and_given_time_to_stop() -> None:
    wanted = {
        "Type": "notify",
        "WatchdogSec": "30",
        "Restart": "always",
        "StartLimitIntervalSec": "0",
        "User": "outbox",
    }
    assert {key: directives(key) for key in wanted} == {key: [value] for key, value in wanted.items()}
    (stop,) = directives("TimeoutStopSec")
    assert int(stop) >= 10
