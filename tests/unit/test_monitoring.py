"""Alerts and dashboard: they say what they claim, about metrics that there are."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from plugin import events
from plugin.images.store import Images
from plugin.metrics import Metrics
from plugin.settings import Settings

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
ALERTS = MONITORING / "alerts.yaml"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = DASHBOARD["panels"]

# A metric of ours with the labels that are asked for; `by` and the like are looked at apart.
METRIC = re.compile(r"\b((?:ebi|process)_\w+)(?:\{([^}]*)\})?")
LABEL = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|ignoring|on)\s*\(([^)]*)\)")
FROM_THE_SCRAPE = {"instance", "job"}


def promtool(*arguments: str, text: str = "") -> str:
    """What promtool says; what it complains of is the failure."""
    # `make setup` puts it there.
    tool = shutil.which("promtool", path=f"{os.environ.get('EBI_CACHE', ROOT / '.cache')}/bin:{os.environ['PATH']}")
    assert tool, "there is no promtool: run make setup"
    done = subprocess.run(
        [tool, *arguments], cwd=MONITORING, input=text, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> dict[str, str]:
    """The expression of each alert."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def shown() -> dict[str, str]:
    """The expression of each query on the dashboard, with what Grafana puts in for its variables."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "5m")
        .replace("$instance", "a|b")
        for panel in PANELS
        for target in panel["targets"]
    }


EXPRESSIONS = {**alerts(), **shown()}


@pytest.fixture(scope="module")
def exposition(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All that the driver exports once everything has happened."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"))
    metrics = Metrics(settings, Images(settings.data_dir / "images", settings))
    for event in (
        events.Call("NodeStageVolume", "OK", 0.1),
        events.Step("unlock_wait", 0.1, ok=True),
        events.ImageOperation("encrypt", 1, 0.1, ok=True),
        events.DeviceEvent("add", "ebi-vol-a"),
    ):
        metrics.record(event)
    return generate_latest(metrics.registry).decode()


@pytest.fixture(scope="module")
def exported(exposition: str) -> dict[str, dict[str, set[str]]]:
    """The values of each label, by the names of what is exported."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def test_the_rules_are_sound() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", ALERTS.name)


def test_each_alert_fires_when_it_should_and_not_otherwise() -> None:
    promtool("test", "rules", "alerts_test.yaml")
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one.get("exp_alerts")}
    assert fired == set(alerts()), "every alert has an example"


def test_each_query_of_the_dashboard_can_be_asked(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(shown().values())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "rules.yaml"))


def test_what_is_exported_is_named_as_prometheus_advises(exposition: str) -> None:
    promtool("check", "metrics", text=exposition)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_asks_only_for_what_is_exported(name: str, exported: dict[str, dict[str, set[str]]]) -> None:
    expression, labels = EXPRESSIONS[name], set(FROM_THE_SCRAPE)
    for metric, selector in METRIC.findall(expression):
        assert metric in exported, metric
        labels |= exported[metric].keys()
        for label, _, _ in LABEL.findall(selector):
            assert label in exported[metric].keys() | FROM_THE_SCRAPE, f"{metric} has no label {label}"
    grouped = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
    assert grouped <= labels


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_asks_only_for_values_that_occur(name: str, exported: dict[str, dict[str, set[str]]]) -> None:
    occurring = {"step": steps(), "state": exported["ebi_images"]["state"], "result": {"ok", "failed"}}
    occurring["kind"] = exported["ebi_mapped_devices"]["kind"] | exported["ebi_store_bytes"]["kind"]
    for _, selector in METRIC.findall(EXPRESSIONS[name]):
        for label, operator, values in LABEL.findall(selector):
            if label in occurring and operator in ("=", "=~"):
                assert set(values.split("|")) <= occurring[label]


def steps() -> set[str]:
    """The names of all steps in the driver's own words."""
    texts = (path.read_text() for path in (ROOT / "plugin").rglob("*.py"))
    return {name for text in texts for name in re.findall(r'(?:events\.step\(|\bstep=)"(\w+)"', text)}


def test_every_metric_of_ours_is_on_the_dashboard(exported: dict[str, dict[str, set[str]]]) -> None:
    stems = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in exported if name.startswith("ebi_")}
    asked = " ".join(shown().values())
    # A counter's time of creation is a sample beside it, under the counter's name without _total.
    missing = {stem for stem in stems if stem not in asked and f"{stem}_total" not in exported}
    assert missing == set()


def test_panels_stand_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, "the grid has 24 columns"
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_can_be_told_apart_and_ask_the_chosen_data_source() -> None:
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = {name for text in texts(DASHBOARD) for name in re.findall(r"\$\{?([a-z]\w*)", text)}
    assert used == variables


def texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(part)
