"""Alert rules and dashboards fit the metrics there are. That alerts fire is for tests/e2e/test_alerts.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import InvalidRequest, Overloaded, StartupError, TandemError, subclasses
from deploy.monitoring.dashboards import dashboard
from router.cluster_metrics import ROLES, STATES
from router.families import Family
from router.metrics import FAMILIES
from router.request_metrics import OUTCOMES, REFUSALS

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
ALERTS = [
    "TandemDown", "TandemNoWorkers", "TandemErrors", "TandemTtftOverSlo", "TandemItlOverSlo", "TandemRefusing",
    "TandemKvCacheFull", "TandemHandoffFailures", "TandemStoreCorruption", "TandemIndexLost", "TandemControllerGone",
    "TandemPreempting",
]  # fmt: skip
OF_PROMETHEUS = {"up", "le", "job", "instance"}
VALUES = {"outcome": OUTCOMES, "reason": REFUSALS, "role": ROLES, "state": STATES, "objective": ("ttft", "itl")}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def samples() -> dict[str, Family]:
    """Name on the page -> its metric."""
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {f"{family.name}{part}": family for family in FAMILIES for part in parts.get(family.kind, ("",))}


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every alert and every panel."""
    yield from ((rule["alert"], rule["expr"]) for rule in rules())
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def test_there_are_exactly_these_alerts() -> None:
    assert sorted(rule["alert"] for rule in rules()) == sorted(ALERTS)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
    headings = re.findall(r"^#+ (\w+)$", (FOLDER.parents[1] / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert rule["alert"] in headings, "an alert without a runbook"
    assert re.fullmatch(r"\d+[smh]", rule["for"])


def test_queries_use_metrics_labels_and_values_that_there_are() -> None:
    known = samples()
    for where, expression in expressions():
        names = set(re.findall(r"tandem_\w+", expression))
        assert names <= known.keys(), (where, names - known.keys())
        labels = {label for name in names for label in known[name].labels} | OF_PROMETHEUS
        for clause in re.findall(r"(?:by|on|ignoring) \(([\w, ]*)\)", expression):
            assert {*re.findall(r"\w+", clause)} <= labels, (where, clause)
        for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', expression):
            assert label in labels, (where, label)
            matching = [name for name in VALUES.get(label, ()) if re.fullmatch(value, name)]
            assert label not in VALUES or matching, (where, label, operator, value)


def test_errors_are_those_of_the_server() -> None:
    """A code that is added to the tree must be counted as somebody's fault."""
    (expression,) = [rule["expr"] for rule in rules() if rule["alert"] == "TandemErrors"]
    (pattern,) = re.findall(r'outcome=~"([^"]*)"', expression)
    others = {code for base in (InvalidRequest, Overloaded, StartupError) for code in subclasses(base)}
    ours = set(subclasses(TandemError)) - others
    assert {code for code in OUTCOMES if re.fullmatch(pattern, code)} == ours


def test_thresholds_of_latency_come_from_the_deployment() -> None:
    for rule in rules():
        if rule["alert"].endswith("OverSlo"):
            assert "tandem_slo_seconds" in rule["expr"]
            assert not re.search(r"[<>] *[\d.]", rule["expr"])


def test_the_dashboard_file_is_what_the_list_of_panels_says() -> None:
    """Else: python -m deploy.monitoring.dashboards > deploy/monitoring/grafana/dashboards/tandem.json"""
    written = json.loads((FOLDER / "grafana" / "dashboards" / "tandem.json").read_text())
    assert written == dashboard()


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_prometheus_and_grafana_are_told_where_things_are() -> None:
    prometheus = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert [FOLDER / name for name in prometheus["rule_files"]] == [FOLDER / "alerts.yaml"]
    (job,) = prometheus["scrape_configs"]
    down = next(rule["expr"] for rule in rules() if rule["alert"] == "TandemDown")
    assert down == f'up{{job="{job["job_name"]}"}} == 0'
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    used = {target["datasource"]["uid"] for panel in dashboard()["panels"] for target in panel.get("targets", ())}
    assert used == {source["uid"]}
