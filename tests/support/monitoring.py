"""The expressions and rules of docker/monitoring, and the metrics that a server exposes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "monitoring"
PROMETHEUS = FOLDER / "prometheus" / "prometheus.yml"
ALERTS = FOLDER / "prometheus" / "alerts.yml"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "teacher.json"


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard that have expressions."""
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def drawn() -> list[str]:
    """Return every expression of the dashboard, for all servers and over ten seconds."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [text.replace("$instance", ".+").replace("$__rate_interval", "10s") for text in found]


def alerts() -> list[dict[str, Any]]:
    return yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]


def metrics_in(expression: str) -> set[str]:
    """Return the names of the metrics that an expression reads."""
    return set(re.findall(r"\b(?:teacher_|process_|vllm:)\w+", expression))


def exposed(url: str) -> list[Metric]:
    """Return the metric families of a server's ``/metrics``."""
    return list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))
