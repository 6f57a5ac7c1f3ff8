"""`teacher-server bench` against a server whose engine computes nothing, over a real socket."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from teacher_server.app import TeacherApp
from teacher_server.cli import main
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.engine import Engine
from tests.support.server import free_port, serving

KEY = "k" * 32


class Obedient(Engine):
    """An engine without the tokens by which tests let one misbehave."""

    facts = replace(
        Engine.facts, tokenizer=Engine.facts.tokenizer.model_copy(update={"vocab_size": 90})
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    app = TeacherApp(Settings(str(folder)), Metrics(), ApiKeys([KEY]))
    app.ready(Obedient())
    with serving(app) as address:
        yield address


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)


def test_help_loads_no_library():
    code = (
        "import sys\n"
        "from teacher_server.cli import main\n"
        "try:\n    main(['bench', '--help'])\n"
        "finally:\n    print('LOADED', sorted({'torch', 'numpy', 'pydantic', 'fastapi', 'uvicorn',"
        " 'httpx'} & sys.modules.keys()))\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in shown.stdout
    assert "--max-concurrency" in shown.stdout


def test_it_runs_where_no_server_is_installed(url):
    """The packages of the extra `teacher` are not there."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'fastapi', 'uvicorn', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "from teacher_server.cli import main\n"
        f"sys.exit(main(['bench', {url!r}, '--quick', '--output-len', '4', '--kind', 'score']))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_row_for_each_kind_and_concurrency(url, capsys):
    assert main(["bench", url, "--quick", "--json", "--output-len", "4", "--seed", "7"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = told["rows"]
    assert [(row["kind"], row["max_concurrency"]) for row in rows] == [
        ("score", 1), ("score", 4), ("generate", 1), ("generate", 4),
    ]  # fmt: skip
    assert told["workload"] == {
        "requests": 8, "input_len": 60, "output_len": 4, "top_k": 64, "seed": 7
    }  # fmt: skip
    for row in rows:
        assert row["failed"] == 0
        assert 0 < row["p50_seconds"] <= row["p99_seconds"]
        assert row["requests_per_second"] > 0
        assert row["tokens_per_second"] > row["requests_per_second"]
        assert 0 < row["mean_server_seconds"] < row["mean_seconds"]
    assert set(told["limits"]) == {"score", "generate"}


def test_two_runs_send_other_sequences_as_the_server_may_cache_them(url, capsys):
    seeds = set()
    for _ in range(2):
        assert main(["bench", url, "--quick", "--json", "--kind", "score"]) == 0
        seeds.add(json.loads(capsys.readouterr().out)["workload"]["seed"])
    assert len(seeds) == 2


def test_the_table_ends_with_what_limits(url, capsys):
    words = ["--num-prompts", "3", "--max-concurrency", "2", "--kind", "score", "--output-len", "4"]
    assert main(["bench", url, *words]) == 0
    out = capsys.readouterr().out
    assert "3 requests a row, each 60 + 4 tokens, top 64." in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("   score")] == [
        ["score", "2"]
    ]
    assert " limits" in out.splitlines()[-1]
    assert KEY not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{url}", "--input-len", "100"], "are 132 tokens; the server takes 64"),
        (["{url}", "--top-k", "101"], "--top-k 101 is over the server's limit; lower it to 100"),
        (["{url}/a"], "/a/v1/info answers 404: GET /a/v1/info: Not Found"),
        (["{url}/v1"], "/v1' is more than the address of a server; give http://127.0.0.1:"),
        (["teacher:8000"], "URL 'teacher:8000' must look like http://host:8000: give http://te"),
        (["http://[::1"], "must look like http://host:8000"),
        (["{free}"], "Connection refused; is the server running"),
        (["http://user:secret@host"], "holds a user or a password"),
        (["http://:secret@host"], "holds a user or a password"),
    ],
    ids=["long", "top k", "prefix", "path", "no scheme", "broken", "nobody", "password", "no user"],
)
def test_what_cannot_be_measured_is_one_line(url, capsys, words, said):
    places = {"url": url, "free": f"http://127.0.0.1:{free_port()}"}
    assert main(["bench", *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("teacher-server: error: ")
    assert said in error
    assert "secret" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "said"),
    [("", "wants a key in TEACHER_API_KEY"), ("w" * 32, "wants another key")],
    ids=["none", "wrong"],
)
def test_a_key_that_is_missing_or_wrong_is_said(url, capsys, monkeypatch, key, said):
    monkeypatch.setenv("TEACHER_API_KEY", key)
    assert main(["bench", url]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "w" * 32 not in error


def test_requests_that_fail_are_counted_and_the_first_is_told(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    settings = Settings(str(tmp_path))
    app = TeacherApp(settings, Metrics(), ApiKeys([KEY]))
    app.ready(Engine())  # ids from 97 on: some sequences crash it, or never end
    app.admission.request_timeout = 0.2
    with serving(app) as address:
        words = [
            "--num-prompts",
            "120",
            "--max-concurrency",
            "16",
            "--kind",
            "score",
            "--seed",
            "0",
        ]
        assert main(["bench", address, *words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["failed"] < 120
    assert row["first_failure"].startswith("50")


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_numbers_are_positive(capsys, value):
    assert main(["bench", "http://h", "--num-prompts", value]) == 2
    assert f"'{value}' is no whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "x", str(2**63)])
def test_a_seed_that_no_request_can_have_is_refused(capsys, value):
    assert main(["bench", "http://h", "--seed", value]) == 2
    assert f"'{value}' is no whole number from 0 to" in capsys.readouterr().err
