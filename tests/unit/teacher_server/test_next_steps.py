"""The next steps that a ready server tells: few lines, the right address, never a key."""

import socket
import types

import pytest

from teacher_server.adapters import LoraModule
from teacher_server.limits.auth import ApiKeys
from teacher_server.serve import next_steps
from teacher_server.settings import Settings

KEY = "k" * 32


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return Settings(str(tmp_path))


def test_without_keys_each_line_is_a_command_or_about_this_log(settings):
    lines = next_steps(settings, "http://127.0.0.1:8000", ApiKeys(()))
    assert len(lines) <= 6
    assert "student-trainer distill --teacher_url http://127.0.0.1:8000 " in lines[0]
    assert lines[1].endswith("curl http://127.0.0.1:8000/v1/info")
    assert lines[2].endswith("teacher-server bench http://127.0.0.1:8000")
    assert "--log-requests" in lines[3]


def test_with_keys_the_variable_is_named_and_no_key(settings):
    text = "\n".join(next_steps(settings, "https://teacher:8000", ApiKeys([KEY])))
    assert KEY not in text
    assert 'curl -H "Authorization: Bearer $TEACHER_API_KEY" https://teacher:8000/v1/info' in text
    assert "export TEACHER_API_KEY=" in text
    assert text.count("\n") < 6


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_other_machines_are_told_this_ones_name(settings, host):
    lines = next_steps(settings, f"http://{host}:8000", ApiKeys(()))
    assert f"--teacher_url http://{socket.gethostname()}:8000 " in lines[0]


def test_an_adapter_is_named_after_the_address(settings):
    served = types.SimpleNamespace(
        log_requests=False, adapters=[LoraModule("math", "m"), LoraModule("code", "c")]
    )
    lines = next_steps(served, "http://127.0.0.1:8000", ApiKeys(()))
    assert "--teacher_url http://127.0.0.1:8000#math " in lines[0]
