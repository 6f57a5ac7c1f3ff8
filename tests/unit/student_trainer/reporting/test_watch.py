"""`report --watch` serves one page on the loopback address, through all that a run can do."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest

from student_trainer.commands.main import main
from student_trainer.reporting.runs import LIVE_FILE, find_runs_so_far
from student_trainer.reporting.watch import status_lines

TOKENS = {}  # of the servers, by port


@contextlib.contextmanager
def watching(*folders, port=None):
    words = [] if port is None else [f"--port={port}"]
    program = [sys.executable, "-m", "student_trainer", "report", "--watch", *words]
    with subprocess.Popen(
        [*program, *map(str, folders)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            address = r"watching at http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32}) .*\n"
            port, token = re.fullmatch(address, line).groups()
            TOKENS[int(port)] = token
            yield process, int(port)
        finally:
            process.kill()


def get(port, path="/content", token=None, **headers):
    path += f"?token={TOKENS[port] if token is None else token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


def status(port):
    return re.search(r"<p class=status role=status>(.*?)</p>", get(port)[1])[1]


def live(folder, *steps, cut=""):
    folder.mkdir(exist_ok=True)
    lines = [{"max_steps": 40}, *({"step": step, "train/loss": 1.0 / step} for step in steps)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + cut
    (folder / LIVE_FILE).write_text(text)


def ended(folder, *steps):
    history = [{"step": step, "train/loss": 1.0 / step} for step in steps]
    text = json.dumps({"log_history": history, "max_steps": 40})
    (folder / "trainer_state.json").write_text(text)


def test_a_run_is_followed_from_before_its_first_step_to_its_end(tmp_path):
    run = tmp_path / "run"
    with watching(run) as (process, port):
        assert status(port) == f"{run}: no step is logged yet; waiting."
        live(run, 1, 10, cut='{"step": 20, "tra')
        assert "run: training, step 10 of 40, logged at " in status(port)
        assert "<polyline" in get(port)[1]
        live(run, 1, 10, 20)
        assert "step 20 of 40" in status(port)
        live(run, 1)  # the run was started anew
        assert "step 1 of 40" in status(port)
        (run / "trainer_state.json").write_text('{"log_hist')  # is being written
        (run / LIVE_FILE).unlink()
        answer, said = get(port)
        assert (answer.status, "not valid JSON" in said) == (503, True)
        ended(run, 1, 40)
        assert status(port) == "run: ended after step 40 of 40."
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    assert {path.name for path in run.iterdir()} == {"trainer_state.json"}  # no page was written


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    run = tmp_path_factory.mktemp("watched") / "run"
    run.mkdir()
    ended(run, 1, 40)
    with watching(run) as (process, port):
        yield process, port


def test_nothing_is_sent_again_that_has_not_changed(served):
    _, port = served
    first, body = get(port)
    again, nothing = get(port, **{"If-None-Match": first.getheader("ETag")})
    assert (again.status, nothing) == (304, "")
    whole = get(port, "/")[1]
    assert f"<main>{body}</main>" in whole


def test_the_script_is_the_one_that_the_policy_allows(served):
    answer, page = get(served[1], "/")
    policy = answer.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert answer.getheader("Cache-Control") == "no-store"


@pytest.mark.parametrize(
    "path",
    ["/trainer_state.json", "/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd",
     "/content/.."],
)  # fmt: skip
def test_there_is_one_page_and_no_way_to_a_file(served, path):
    answer, said = get(served[1], path)
    assert (answer.status, said) == (404, "there is one page, at /\n")


def test_a_foreign_name_for_this_machine_is_refused(served):
    _, port = served
    assert get(port, Host=f"evil.example:{port}")[0].status == 403
    assert get(port, Host=f"localhost:{port}")[0].status == 200


def test_who_does_not_know_the_token_reads_nothing(served):
    """Each user of a machine can connect to its loopback address."""
    _, port = served
    for path in ("/", "/content", "/trainer_state.json"):
        for token in ("", "x", TOKENS[port][:-1], TOKENS[port] + "é"):
            answer, said = get(port, path, token=urllib.parse.quote(token))
            assert (answer.status, said) == (403, "open the address that the command printed\n")
    assert get(port, "/")[0].status == 200
    assert TOKENS[port] not in get(port, "/")[1]


def test_each_start_has_another_token(served, tmp_path):
    with watching(tmp_path) as (_, port):
        assert TOKENS[port] != TOKENS[served[1]]


def test_it_writes_for_nobody(served):
    connection = http.client.HTTPConnection("127.0.0.1", served[1], timeout=20)
    connection.request("POST", "/", body="x")
    assert connection.getresponse().status == 501


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_listens_on_the_loopback_address_alone(served):
    process, port = served
    listening = []
    for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and int(address.split(":")[1], 16) == port:
            listening.append(address.split(":")[0])
    assert listening == ["0100007F"]


def test_a_port_that_is_taken_is_named(tmp_path, served, capsys):
    (tmp_path / "run").mkdir()
    assert main(["report", "--watch", str(tmp_path / "run"), f"--port={served[1]}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--port {served[1]}: " in line
    assert "leave it out for one that is free" in line


def test_a_quiet_run_may_have_stopped(tmp_path):
    live(tmp_path / "run", 1, 10)
    now = time.time()
    os.utime(tmp_path / "run" / LIVE_FILE, (now - 600, now - 600))
    found, missing = find_runs_so_far([tmp_path / "run", tmp_path / "later"])
    assert status_lines(found, missing, now) == [
        f"{tmp_path / 'later'}: no step is logged yet; waiting.",
        "run: step 10 of 40; nothing was logged for 10 minutes, so it may have stopped.",
    ]


def test_a_browser_that_goes_away_is_no_news(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    ended(run, 1, 40)
    with watching(run) as (process, port):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", port)) as browser:
                at_once = struct.pack("ii", 1, 0)  # closing it resets the connection
                browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
                path = f"/?token={TOKENS[port]}"
                browser.sendall(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        assert get(port)[0].status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_samples_that_are_half_written_are_tried_again(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "results.json").write_text('{"model": "m", "problems": 1, "n": 1, "pass@1": 1.0}')
    (folder / "samples.jsonl").write_text('{"task_id": "1", "pas')
    with watching(tmp_path / "later", folder) as (_, port):
        answer, said = get(port)
        assert (answer.status, "samples.jsonl: not valid JSON" in said) == (503, True)


def test_before_any_run_has_begun_the_page_says_nothing_of_intervals(tmp_path):
    with watching(tmp_path / "run") as (_, port):
        assert "95 %" not in get(port)[1]
