"""Every benchmark's command line, and the processes that benchmarks start."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

import benchmarks
from benchmarks.harness import Worker, argument_parser, print_report, run_apart

# All of the folder but what benchmarks share, and the half that TRL's own environment runs.
NAMES = sorted(
    path.stem
    for path in Path(benchmarks.__file__).parent.glob("*.py")
    if path.stem
    not in (
        "__init__",
        "accuracy_real",
        "against_trl_real",
        "harness",
        "hosts_parts",
        "scale_model",
        "real_models",
        "real_texts",
        "trl_gkd",
    )
)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_help_and_a_quick_way(name, monkeypatch, capsys):
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text
    assert module.__doc__.splitlines()[0] in text
    assert f"python -m benchmarks.{name} " in text


def test_a_parser_has_threads_only_where_they_mean_something(capsys):
    assert argument_parser("Doc.", quick="less", threads=2).parse_args([]).threads == 2
    assert argument_parser("Doc.", quick="less", threads=0).parse_args(["--threads=3"]).threads == 3
    with pytest.raises(SystemExit):
        argument_parser("Doc.", quick="less").parse_args(["--threads=3"])
    assert "--threads" in capsys.readouterr().err


def doubled(parent, factor):
    sys.stdout.write("what a library says")
    while True:
        parent.send(factor * parent.recv())


def deaf(parent):
    os._exit(9)


def test_a_worker_answers_and_prints_nothing_on_standard_output(capfd):
    with Worker(doubled, 2) as worker:
        assert [worker.ask(1), worker.ask([3])] == [2, [3, 3]]
    assert worker.process.exitcode == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "what a library says" in captured.err


def test_a_quiet_worker_prints_nothing(capfd):
    with Worker(doubled, 2, quiet=True) as worker:
        assert worker.ask(1) == 2
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_ends_is_named_with_its_status():
    with Worker(deaf) as worker, pytest.raises(RuntimeError, match="deaf ended with status 9"):
        worker.receive()


def test_a_function_runs_in_a_process_of_its_own():
    assert run_apart(os.getpid) != os.getpid()


def test_the_last_line_is_json(capsys):
    print_report("Title", ["a", "b"], [["x", 0.5]], {"figure": 1}, notes=["note"])
    assert capsys.readouterr().out.splitlines()[-1] == '{"figure": 1}'
