"""Prometheus' and Grafana's files: they parse, fit together, and name only metrics that the server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from server.adapters.cache import AdapterCache
from server.engine.merged import MergedStats
from server.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))


def _load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def _declared() -> set[str]:
    """Every series name that the server can expose."""
    metrics = Metrics()
    metrics.watch_adapter_cache(AdapterCache(0).stats, lambda: MergedStats(entries=0, bytes=0, evictions=0))
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    return {family.name + suffix for family in metrics.registry.collect() for suffix in suffixes[family.type]}


def _alert_rules() -> list[dict[str, Any]]:
    return [rule for group in _load("alerts.yml")["groups"] for rule in group["rules"]]


def _panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(path.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]


def _expressions() -> dict[str, str]:
    found = {f"alert {rule['alert']}": rule["expr"] for rule in _alert_rules()}
    for path in DASHBOARDS:
        for panel in _panels(path):
            for target in panel["targets"]:
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = target["expr"]
    return found


@pytest.mark.parametrize("where", _expressions())
def test_every_metric_named_is_declared(where: str) -> None:
    names = set(re.findall(r"\bmhr_\w+", _expressions()[where]))
    assert names or "up{" in _expressions()[where]
    assert names <= _declared()


def test_every_metric_of_the_server_is_on_a_dashboard() -> None:
    shown = " ".join(_expressions().values())
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in _declared()}
    assert {family for family in families if family not in shown} == set()


@pytest.mark.parametrize("where", _expressions())
def test_every_label_named_belongs_to_its_metric(where: str) -> None:
    labels = _labels_by_metric()
    for name, selector in re.findall(r"\b(mhr_\w+)\{([^}]*)\}", _expressions()[where]):
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) - {"instance"}
        assert used <= labels.get(re.sub(r"_(bucket|sum|count|total)$", "", name), set())


def _labels_by_metric() -> dict[str, set[str]]:
    declared = [metric for metric in vars(Metrics()).values() if isinstance(metric, Counter | Gauge | Histogram)]
    return {metric._name: set(metric._labelnames) for metric in declared}


def test_dashboards_use_the_provisioned_data_source() -> None:
    source = _load("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    for path in DASHBOARDS:
        for panel in _panels(path):
            assert panel["datasource"]["uid"] == source["uid"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    for path in DASHBOARDS:
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for place in (panel["gridPos"] for panel in panels):
            cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
            assert not cells & taken
            assert place["x"] + place["w"] <= 24
            taken |= cells


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in _alert_rules():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_prometheus_reads_the_rules_and_the_compose_service() -> None:
    config = _load("prometheus.yml")
    assert [(DEPLOY / name).exists() for name in config["rule_files"]] == [True]
    job = config["scrape_configs"][0]
    assert job["job_name"] == "mhr"
    assert job["static_configs"][0]["targets"] == ["server:8000"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", str(DEPLOY / "prometheus.yml")],
        ["check", "rules", str(DEPLOY / "alerts.yml")],
        ["test", "rules", str(Path(__file__).with_name("alerts_test.yml"))],
    ],
    ids=["config", "rules", "cases"],
)
def test_promtool_accepts_the_files(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
