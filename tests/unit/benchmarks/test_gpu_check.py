"""`benchmarks.gpu`: its parts' ends, its time limit, what it keeps, and one part for real."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu
from benchmarks.gpu import (
    DONE,
    LEAST_SECONDS,
    NO_TIME,
    PARTS,
    QUICK,
    Part,
    content_key,
    figures,
    quick,
    run,
    run_part,
    tables,
)
from benchmarks.gpu_parts import loss
from tests.support.http import until

HERE = "tests.unit.benchmarks.gpu_stand_ins"


def part(name, limit=60.0, **arguments):
    return Part(name, f"{HERE}:{name}", limit, arguments)


@pytest.fixture
def at_once(monkeypatch):
    """Parts that are no processes: their outcome is their name."""
    seen = []

    def run_part(part, device, limit):
        seen.append((part.name, limit))
        return gpu.Result(part.name, part.name.split()[0], 1.0, [{"number": 1}])

    monkeypatch.setattr(gpu, "run_part", run_part)
    return seen


def test_a_part_that_fails_lacks_something_or_crashes_costs_only_itself():
    found = [run_part(part(name), "cpu", 60.0) for name in ("fails", "lacks", "crashes")]
    assert [one.status for one in found] == [
        "failed: ValueError: a reason",
        "left out: No module named 'this'",
        f"failed: work {HERE}:crashes cpu {{}} ended with status 9; out of RAM?",
    ]
    assert [one.rows for one in found] == [[{"number": 0}], [], [{"number": 0}]]


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    file = tmp_path / "pid"
    for limit in (2, 10, 40):  # in which it starts, however busy the machine is
        found = run_part(part("hangs", file=str(file)), "cpu", limit)
        assert found.status == f"ended after {limit} s"
        if found.rows:
            break
    assert found.rows == [{"number": 0}]
    until(lambda: not _runs(int(file.read_text())), 20)


def _runs(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_second_run_measures_what_is_not_done_and_fresh_measures_all(tmp_path, at_once):
    file = tmp_path / "kept.json"
    parts = [Part(name, HERE, 60.0) for name in ("done", "failed: no", "done again")]
    for fresh, expected in ((False, 3), (False, 1), (True, 3)):
        at_once.clear()
        _, results = run(parts, "cpu", file=file, minutes=5, fresh=fresh)
        assert len(at_once) == expected
        assert [one.status for one in results] == ["done", "failed:", "done"]
    kept = json.loads(file.read_text())
    assert kept["machine"]["device"] == "cpu"
    assert len(kept["parts"]) == 3
    assert list(tmp_path.iterdir()) == [file]


def test_parts_that_no_time_is_left_for_are_named(tmp_path, at_once):
    parts = [Part(f"done {n}", HERE, 60.0) for n in range(3)]
    seconds = LEAST_SECONDS + 1
    _, results = run(parts, "cpu", file=tmp_path / "a.json", minutes=seconds / 60, fresh=False)
    assert [one.status for one in results] == [DONE] * 3
    assert all(limit <= seconds for _, limit in at_once)
    _, results = run(parts, "cpu", file=tmp_path / "b.json", minutes=0.1, fresh=False)
    assert [one.status for one in results] == [NO_TIME] * 3


def test_a_result_is_of_a_size_a_machine_and_a_code():
    one = PARTS[0]
    key = content_key(one, "cuda", {"device": "a"}, "code")
    assert key == content_key(one, "cuda", {"device": "a"}, "code")
    other = Part(one.name, one.function, one.limit + 1, {**one.arguments})
    assert key == content_key(other, "cuda", {"device": "a"}, "code")
    assert (
        len(
            {
                key,
                content_key(PARTS[1], "cuda", {"device": "a"}, "code"),
                content_key(one, "cuda", {"device": "b"}, "code"),
                content_key(one, "cuda", {"device": "a"}, "other code"),
            }
        )
        == 4
    )


def test_every_part_has_a_name_of_its_own_a_quick_size_and_a_function_that_takes_it():
    assert len({one.name for one in PARTS}) == len(PARTS)
    small = quick(PARTS, "cpu")
    assert {one.function for one in small} == {one.function for one in PARTS} == {*QUICK}
    for one in (*PARTS, *small):
        module, name = one.function.split(":")
        file = Path(gpu.__file__).parents[1] / (module.replace(".", "/") + ".py")
        assert f"def {name}(" in file.read_text()


def test_tables_have_a_column_for_each_figure_and_the_summary_the_worst_of_each_aim():
    case = {"case": "N=1"}
    rows = [
        {**case, "method": "ours, Triton", "ms": 2.0, "peak MiB": 100, "× matmuls": 1.2},
        {**case, "method": "Liger", "ms": 4.0, "peak MiB": 400, "× matmuls": 2.4},
        {"case": "N=2", "method": "ours, Triton", "ms": 3.0, "peak MiB": 9, "× matmuls": 1.4},
        {"case": "N=2", "method": "Liger", "ms": "not installed"},
        {"of the bare": 0.9, "error": 1e-6},
    ]
    results = [gpu.Result("some", DONE, 1.0, rows), gpu.Result("none", "failed: no")]
    (table,) = tables(results)
    assert table.splitlines()[2].split() == [
        "case", "method", "ms", "peak", "MiB", "×", "matmuls", "of", "the", "bare", "error"
    ]  # fmt: skip
    assert table.splitlines()[-1].split() == ["–", "–", "–", "–", "–", "0.900", "1e-06"]
    assert figures(results) == {
        "benchmark": "gpu", "done": 1, "parts": 2, "failed": 1, "worst × matmuls": 1.4,
        "worst time / Liger": 0.5, "worst memory / Liger": 0.25,
        "teacher, of the bare forward pass": 0.9,
    }  # fmt: skip


def test_the_command_runs_a_part_keeps_it_and_ends_with_a_line_of_json(tmp_path, capsys):
    """Those that need more than a few seconds are run by `--device cpu --quick`."""
    file = tmp_path / "kept.json"
    words = ["--device=cpu", "--quick", f"--output={file}", "--parts", "loss, 152k"]
    for _ in range(2):
        gpu.main(words)
        lines = capsys.readouterr().out.splitlines()
        assert json.loads(lines[-1]) == {"benchmark": "gpu", "done": 1, "parts": 1, "failed": 0}
    (one,) = json.loads(file.read_text())["parts"].values()
    by_method = {row["method"]: row for row in one["rows"] if "frozen" not in row["case"]}
    assert [*by_method] == ["bare matmuls", "ours, PyTorch", "dense"]
    assert by_method["ours, PyTorch"]["gradient error"] < 0.01
    assert by_method["ours, PyTorch"]["gradient error"] < by_method["dense"]["gradient error"]


def test_without_liger_its_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(loss, "METHODS", ("Liger",))
    rows = [*loss.measure("cpu", vocab_size=70, width=4, positions=[3])]
    assert [row["ms"] for row in rows if row["method"] == "Liger"] == ["not installed"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device=cpu"], "--device cpu needs --quick"),
        (["--device=cpu", "--quick", "--parts", "nothing"], "--parts 'nothing': the parts are"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.skipif("torch" in sys.modules and sys.modules["torch"].cuda.is_available(),
                    reason="there is a GPU")  # fmt: skip
def test_without_a_gpu_the_error_says_what_runs_there(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "use --device cpu --quick" in capsys.readouterr().err
