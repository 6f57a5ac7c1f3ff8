"""The files of the compose profile `monitoring` fit together, and alerts fire when they should."""

import shutil
import subprocess

import pytest
import yaml

from tests.support.monitoring import ALERTS, PROMETHEUS, ROOT, panels

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Prometheus is not installed"
)


@pytest.fixture(scope="module")
def services():
    found = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return {name: it for name, it in found.items() if it.get("profiles") == ["monitoring"]}


def test_nobody_but_this_machine_reaches_what_runs_without_root(services):
    assert services.keys() == {"prometheus", "grafana"}
    for service in services.values():
        assert service["user"] in ("nobody", "472")
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        assert [port.split(":")[1].lstrip("-") for port in service["ports"]] == ["127.0.0.1"]
        assert service["image"].partition(":")[2][-1].isdigit()


def test_every_file_is_where_a_container_looks_for_it(services):
    def there(service, path):
        for mount in service["volumes"]:
            source, target = mount.split(":")[:2]
            if source.startswith(".") and path.startswith(target):
                return (ROOT / source / path.removeprefix(target).lstrip("/")).exists()
        return False

    [command] = services["prometheus"]["command"]
    assert there(services["prometheus"], command.split("--config.file=")[1].split()[0])
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert there(services["grafana"], home)
    job = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"][0]
    assert f"> {job['authorization']['credentials_file']} " in command


def test_panels_stand_side_by_side(services):
    taken = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


# What is seen, a value each minute, and the one alert that has been raised after half an hour.
CASES = {
    "none runs": ([], "TeacherNotReady"),
    "it is down": (
        [
            ('up{job="teacher", instance="a"}', "0x40"),
        ],
        "TeacherNotReady",
    ),
    "its engine is dead": (
        [
            ('up{job="teacher", instance="a"}', "1x40"),
            ('teacher_state{job="teacher", instance="a", state="ready"}', "0x40"),
        ],
        "TeacherNotReady",
    ),
    "one in ten is refused": (
        [
            ('up{job="teacher", instance="a"}', "1x40"),
            ('teacher_requests_total{instance="a", route="/v1/score", status="200"}', "0+90x40"),
            ('teacher_requests_total{instance="a", route="/v1/score", status="429"}', "0+10x40"),
        ],
        "TeacherRejects",
    ),
    "one in fifty takes minutes": (
        [
            ('up{job="teacher", instance="a"}', "1x40"),
            ('teacher_request_seconds_bucket{instance="a", route="/v1/score", le="1"}', "0+98x40"),
            (
                'teacher_request_seconds_bucket{instance="a", route="/v1/score", le="300"}',
                "0+100x40",
            ),
            (
                'teacher_request_seconds_bucket{instance="a", route="/v1/score", le="+Inf"}',
                "0+100x40",
            ),
        ],
        "TeacherSlow",
    ),
    "all is well": (
        [
            ('up{job="teacher", instance="a"}', "1x40"),
            ('teacher_state{job="teacher", instance="a", state="ready"}', "1x40"),
            ('teacher_requests_total{instance="a", route="/v1/score", status="200"}', "0+100x40"),
            ('teacher_requests_total{instance="a", route="/v1/score", status="422"}', "0+50x40"),
            ('teacher_request_seconds_bucket{instance="a", route="/v1/score", le="1"}', "0+99x40"),
            (
                'teacher_request_seconds_bucket{instance="a", route="/v1/score", le="+Inf"}',
                "0+100x40",
            ),
        ],
        None,
    ),
}


@needs_promtool
def test_each_alert_fires_for_its_reason_alone(tmp_path):
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    tests = []
    for what, (series, alert) in CASES.items():
        expected = [] if alert is None else [{"labels": f'{{alertname="{alert}"}}', "value": 1}]
        tests.append(
            {
                "name": what,
                "interval": "1m",
                "input_series": [{"series": name, "values": seen} for name, seen in series],
                "promql_expr_test": [{"expr": firing, "eval_time": "30m", "exp_samples": expected}],
            }
        )
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_rules():
    done = subprocess.run(
        ["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 rules found" in done.stdout
