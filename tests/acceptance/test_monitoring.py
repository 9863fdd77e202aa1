"""Alerts and dashboard: their metrics and labels exist, their commands too, and alerts fire when they should."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.support import promql
from tests.support.documents import check_command, invocations
from tests.support.exported import EXPORTED

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
MONITORING = DEPLOY / "monitoring"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY.parents[1] / "docker-compose.yml").read_text())["services"]
RULES = [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
CASES = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())
SEVERITIES = {"critical", "warning", "info"}
BOARD: dict[str, Any] = json.loads((MONITORING / "grafana" / "outbox.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = {each["name"]: each for each in BOARD["templating"]["list"]}
SCRAPED = EXPORTED | {"up": frozenset[str]()}
PROMTOOL = shutil.which("promtool")
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']}-{panel['title']}")


def named_labels(template: str) -> set[str]:
    """The labels that an annotation or a legend shows."""
    return set(re.findall(r"\$labels\.(\w+)", template)) | set(re.findall(r"\{\{(\w+)\}\}", template))


# --- alerts


@each_rule
def test_alert_says_what_is_wrong_and_what_to_run(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("Outbox")
    assert rule["labels"]["severity"] in SEVERITIES
    assert rule["annotations"].keys() == {"summary", "description", "remedy"}
    commands = re.findall(r"`(outbox [^`]+)`", rule["annotations"]["remedy"])
    assert commands
    for words in itertools.chain.from_iterable(map(invocations, commands)):
        check_command(words)


@each_rule
def test_alert_asks_for_what_is_exported(rule: dict[str, Any]) -> None:
    labels = promql.labels_of(promql_parser.parse(rule["expr"]), SCRAPED)
    assert named_labels(" ".join(rule["annotations"].values())) <= labels


@pytest.mark.parametrize("case", CASES["tests"], ids=lambda case: case["name"])
def test_alerts_fire_as_their_tests_say(case: dict[str, Any]) -> None:
    """The file that promtool reads, on our own evaluator: it needs no Prometheus."""
    inputs = {promql.series(each["series"]): promql.values(each["values"]) for each in case["input_series"]}
    samples = promql.Samples(interval=promql.seconds(case["interval"]), series=inputs)
    for check in case["promql_expr_test"]:
        assert check["expr"] == 'ALERTS{alertstate="firing"}'
        wanted = [dict(promql.series(each["labels"])) for each in check["exp_samples"]]
        for each in wanted:
            assert (each.pop(promql.NAME), each.pop("alertstate")) == ("ALERTS", "firing")
        fires = promql.firing(RULES, samples, promql.seconds(check["eval_time"]))
        assert fires == {frozenset(each.items()) for each in wanted}, check["eval_time"]


def test_each_alert_fires_in_some_test_and_on_series_that_exist() -> None:
    fired = re.findall(r'ALERTS\{alertname="(\w+)"', (MONITORING / "alerts_test.yml").read_text())
    assert set(fired) == {rule["alert"] for rule in RULES}
    for each in (series for case in CASES["tests"] for series in case["input_series"]):
        labels = dict(promql.series(each["series"]))
        name = labels.pop(promql.NAME)
        assert labels.keys() == SCRAPED[name] | promql.OF_SCRAPES, each["series"]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "words", ["check rules alerts.yml", "test rules alerts_test.yml", "check config prometheus.yml"]
)
def test_promtool(words: str) -> None:
    done = subprocess.run([str(PROMTOOL), *words.split()], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_documented_with_its_severity() -> None:
    rows = [line.split("|") for line in (DEPLOY / "README.md").read_text().splitlines() if line.startswith("| `Outbox")]
    documented = {name: row[2].strip() for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert documented == {rule["alert"]: rule["labels"]["severity"] for rule in RULES}


# --- Prometheus and Grafana of the compose file


def test_prometheus_scrapes_the_relays_of_the_compose_file() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    (relay,) = discovery["names"]
    command = COMPOSE[relay]["command"]
    assert command[command.index("--listen") + 1].split(":") == ["0.0.0.0", str(discovery["port"])]
    (down,) = (promql_parser.parse(rule["expr"]) for rule in RULES if rule["expr"].startswith("up{"))
    (selector,) = promql.selectors(down)
    assert promql.chosen(selector, {promql.NAME: "up", "job": job["job_name"]})
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["prometheus"]["volumes"])
    wanted = ["prometheus.yml", *config["rule_files"]]
    assert mounts == {f"./docs/deploy/monitoring/{name}": f"/etc/prometheus/{name}" for name in wanted}


def test_grafana_is_provisioned_with_the_data_source_and_the_dashboard() -> None:
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["grafana"]["volumes"])
    provisioning = MONITORING / "grafana" / "provisioning"
    assert mounts["./docs/deploy/monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "outbox.yml").read_text())["datasources"]
    assert (source["url"], source["type"], source["isDefault"]) == ("http://prometheus:9090", "prometheus", True)
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "outbox.yml").read_text())["providers"]
    there = mounts["./docs/deploy/monitoring/grafana/outbox.json"]
    assert Path(there).parent == Path(provider["options"]["path"])
    assert COMPOSE["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == there


# --- the dashboard


@each_panel
def test_panel_is_explained_and_has_a_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["type"] in {"stat", "timeseries", "state-timeline", "table"}
    if panel["type"] == "stat":
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"]


@each_panel
def test_panel_asks_the_chosen_source_for_what_is_exported(panel: dict[str, Any]) -> None:
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    for asker in (panel, *panel["targets"]):
        assert asker["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        expression = promql_parser.parse(target["expr"].replace("$__rate_interval", "1m"))
        labels = promql.labels_of(expression, EXPORTED)
        assert named_labels(target["legendFormat"]) <= labels, target["legendFormat"]
        for selector in promql.selectors(expression):
            chosen = {(each.name, each.value) for each in selector.matchers.matchers}
            assert chosen == {("job", "$job"), ("schema", "$schema")}, target["expr"]


def test_every_metric_is_on_the_dashboard() -> None:
    """What nobody looks at need not be exported."""
    targets = [target["expr"].replace("$__rate_interval", "1m") for panel in PANELS for target in panel["targets"]]
    shown = {each.name for target in targets for each in promql.selectors(promql_parser.parse(target))}
    of_histograms = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in EXPORTED} <= of_histograms


def test_variables_are_read_from_what_every_relay_exports() -> None:
    assert VARIABLES.keys() == {"datasource", "job", "schema"}
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for name in ("job", "schema"):
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[name]["query"]["query"])
        assert asked
        assert asked[2] == name
        assert name in promql.labels_of(promql_parser.parse(asked[1]), EXPORTED)


def cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """The cells of the grid that a panel covers."""
    place = panel["gridPos"]
    yield from itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))


def test_panels_have_ids_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    covered = list(itertools.chain.from_iterable(map(cells, BOARD["panels"])))
    assert len(set(covered)) == len(covered)
    assert {x for x, _ in covered} == set(range(24))
    assert len(covered) == 24 * (1 + max(y for _, y in covered)), "there are holes"


def test_first_row_tells_whether_it_is_healthy() -> None:
    first = [panel for panel in PANELS if panel["gridPos"]["y"] == 0]
    assert {panel["type"] for panel in first} == {"stat"}
    titles = {panel["title"] for panel in first}
    assert titles >= {"Lag", "Backlog", "Leader", "Dead letters", "Blocked", "Paused"}
