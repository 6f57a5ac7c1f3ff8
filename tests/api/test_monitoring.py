"""The documented metrics are those of a live server, as a real Prometheus sees them too."""

import contextlib
import math
import re
import shutil
import subprocess
import time

import httpx
import pytest
import yaml

from teacher_server.app import TeacherApp
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.monitoring import ALERTS, PROMETHEUS, ROOT, alerts, drawn, exposed, metrics_in
from tests.support.server import free_port, serving

KEY = "a-key-that-no-server-would-guess"
ROW = re.compile(r"\| `(teacher_\w+)` \| (\w+) \|(.*?)\|")


def ask(url):
    """Send requests that bring tokens of every kind, and a refusal."""
    sequences = [{"token_ids": [2, 65, 1, 70, 71], "completion_start": 3}]
    prompts = {"prompts": [[2, 65, 1]], "max_new_tokens": 2, "temperature": 0}
    for path, body, status in (
        ("score", {"sequences": sequences, "top_k": 4}, 200),
        ("score", {"sequences": sequences, "top_k": 0}, 422),
        ("generate", prompts, 200),
    ):
        assert httpx.post(f"{url}/v1/{path}", json=body, timeout=60).status_code == status


def test_the_table_of_metrics_is_what_a_server_shows(teacher):
    page = (ROOT / "docs" / "how-to" / "operating.md").read_text()
    written = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall(page)
    }
    assert len(written) >= 15
    ask(teacher.url)
    shown = {}
    for family in exposed(teacher.url):
        if family.name.startswith("teacher_"):
            name = family.name + "_total" * (family.type == "counter")
            labels = {label for sample in family.samples for label in sample.labels}
            shown[name] = (family.type, labels - {"le"})
    assert shown == written


def test_the_dashboard_and_the_alerts_ask_for_what_a_server_shows(teacher):
    ask(teacher.url)
    shown = {sample.name for family in exposed(teacher.url) for sample in family.samples}
    asked = {name for text in drawn() for name in metrics_in(text)}
    assert sum(name.startswith("vllm:") for name in asked) >= 6
    if teacher.backend != "vllm":
        asked = {name for name in asked if not name.startswith("vllm:")}
    assert asked - shown == set()
    assert {name for rule in alerts() for name in metrics_in(rule["expr"])} - shown == set()


@contextlib.contextmanager
def prometheus(targets, folder):
    """URL of a Prometheus with this project's configuration, at these targets every second."""
    config = yaml.safe_load(PROMETHEUS.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [url.removeprefix("http://") for url in targets]}]
    job["authorization"]["credentials_file"] = str(folder / "teacher.key")
    (folder / "teacher.key").write_text(KEY)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(ALERTS, folder)
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yml'}",
             f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def answer(url, expression):
    """Values of every series; raises unless Prometheus takes the expression."""
    response = httpx.get(f"{url}/api/v1/query", params={"query": expression})
    assert response.status_code == 200, (expression, response.text)
    return [float(series["value"][1]) for series in response.json()["data"]["result"]]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_answers_every_query_of_the_dashboard(teacher, tmp_path):
    """A server with keys stands beside the teacher: the same file serves both."""
    settings = Settings(str(teacher.folder), backend="transformers")
    locked = TeacherApp(settings, Metrics(), ApiKeys([KEY]))
    seen = 'count(count_over_time(teacher_state{state="ready"}[10s]) >= 4)'
    with serving(locked) as other, prometheus([teacher.url, other], tmp_path) as url:
        until = time.monotonic() + 60
        while True:
            ask(teacher.url)
            with contextlib.suppress(httpx.TransportError):
                if answer(url, seen) == [2.0]:
                    break
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.2)
        values = {text: answer(url, text) for text in drawn()}
        health = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert answer(url, "up") == [1.0, 1.0]
    own = "vllm:" if teacher.backend == "vllm" else "teacher_"
    assert [text for text in drawn() if own in text and not values[text]] == []
    if teacher.backend == "transformers":
        numbers = [value for text in drawn() if "vllm:" not in text for value in values[text]]
        assert all(map(math.isfinite, numbers))
    assert {(rule["name"], rule["health"]) for rule in health} == {
        (rule["alert"], "ok") for rule in alerts()
    }
