"""The command itself, on trivial cells: what runs, what is skipped, what is left behind."""

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import psutil
import pytest
import yaml

from student_trainer.commands.main import main

STEP = "tests.support.study_step"


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


class World:
    """A study of two cells in a row, measured, over two seeds."""

    def __init__(self, folder):
        self.file = folder / "study.yaml"
        self.output = folder / "out"
        self.journal = folder / "journal"
        self.cells = {
            "data": self.step(add=1, seed="{seed}"),
            "a": self.step(add=0.5, inputs=["{data}"]),
            "b": self.step(add=0.25, inputs=["{data}"]),
        }
        self.measure = {"command": STEP, "flags": {"inputs": ["{model}"]}}
        self.tables = {}
        self.others = {}

    def step(self, **flags):
        return {"command": STEP, "flags": {**flags, "journal": str(self.journal)}}

    def write(self):
        content = {
            "title": "Steps", "seeds": [0, 1], "cells": self.cells, "measure": self.measure,
            "tables": {"t": {"cells": ["a", "b"], "differences": [["a", "b"]]}, **self.tables},
            **self.others,
        }  # fmt: skip
        self.file.write_text(yaml.safe_dump(content, sort_keys=False))

    def words(self, *words):
        self.write()
        return ["study", str(self.file), f"--output_dir={self.output}", *words]

    def run(self, *words):
        """The exit code, and the cells that ran."""
        # The journal is a file that a flag names: its content must not make a study a new one.
        code = main(self.words(*words))
        ran = self.journal.read_text().split() if self.journal.exists() else []
        self.journal.unlink(missing_ok=True)
        return code, ran


def test_a_second_run_has_nothing_to_do(world, capsys):
    code, ran = world.run()
    assert code == 0
    assert ran == [f"seed-{seed}/{name}" for seed in (0, 1) for name in ("data", "a", "b")]
    out = capsys.readouterr().out
    assert "[1/10] seed-0/data: " in out
    assert " elapsed, about 0 s left" in out.splitlines()[9]
    assert world.run() == (0, [])


def test_a_changed_cell_runs_again_with_its_descendants(world):
    world.run()
    world.cells["a"]["flags"]["add"] = 0.75
    assert world.run() == (0, ["seed-0/a", "seed-1/a"])
    world.cells["data"]["flags"]["add"] = 2
    assert len(world.run()[1]) == 6


def test_a_dry_run_tells_what_is_done_and_runs_nothing(world, capsys):
    world.run("--only", "a", "--seeds", "1")
    world.cells["a"]["flags"]["add"] = 0.75
    capsys.readouterr()
    assert world.run("--dry_run") == (0, [])
    out = capsys.readouterr().out
    states = {line.split()[-1]: line[:8].strip() for line in out.splitlines() if "/" in line[:16]}
    assert states["seed-1/data"] == "done"
    assert states["seed-1/a"] == "changed"
    assert states["seed-0/data"] == states["seed-1/b"] == "to do"
    assert f"$ python -m {STEP} --add=0.25" in out
    assert out.splitlines()[-1] == "1 of 10 are done"


def test_results_are_means_with_intervals_and_paired_differences(world):
    world.run()
    results = json.loads((world.output / "results.json").read_text())
    # data is 1 and 2 at the two seeds, a adds .5 and b .25.
    assert results["cells"]["a"]["values"] == {"0": 1.5, "1": 2.5}
    assert results["cells"]["a"]["mean"] == 2.0
    # Standard error sqrt(.5 / 2) = .5, and t(1) = 12.7062.
    assert results["cells"]["a"]["interval"] == [-4.3531, 8.3531]
    (difference,) = results["differences"]["t"]
    assert (difference["cell"], difference["base"]) == ("a", "b")
    assert difference["mean"] == 0.25
    assert difference["interval"] == [0.25, 0.25]
    markers = [json.loads(path.read_text()) for path in world.output.glob("seed-*/*.done.json")]
    assert len(markers) == 10
    assert results["seconds"] == pytest.approx(sum(m["seconds"] for m in markers), abs=0.06)
    text = (world.output / "results.md").read_text()
    assert "| a | 2.000 ± 6.353 | 2 |" in text
    assert "| a − b | 0.250 ± 0.000 | 2 | yes |" in text
    root = ET.parse(world.output / "t.svg").getroot()
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 2


def test_a_table_may_compare_another_metric(world):
    world.tables["u"] = {"metric": "loss", "cells": ["a", "b"], "differences": [["a", "b"]]}
    world.run()
    results = json.loads((world.output / "results.json").read_text())
    assert results["cells"]["a"]["values"] == {"0": 1.5, "1": 2.5}
    assert results["other_metrics"]["loss"]["a"]["values"] == {"0": -1.5, "1": -2.5}
    assert {name: one["mean"] for name, (one,) in results["differences"].items()} == {
        "t": 0.25,
        "u": -0.25,
    }
    text = (world.output / "results.md").read_text()
    assert "| cell | loss | seeds |" in text
    assert "| a | -2.000 ± 6.353 | 2 |" in text
    assert text.startswith("# Steps\n\npass@1, loss: mean")


def test_a_metric_that_is_not_measured_is_named_with_its_place(world, capsys):
    world.tables["u"] = {"metric": "speed", "cells": ["a"]}
    assert world.run()[0] == 2
    assert "has no 'speed'; there is pass@1, loss" in capsys.readouterr().err


def test_a_report_is_written_of_what_is_there(world, capsys):
    world.run("--seeds", "0")
    (world.output / "results.json").unlink()
    assert world.run("--report") == (0, [])
    results = json.loads((world.output / "results.json").read_text())
    assert results["cells"]["a"]["n"] == 1
    assert results["cells"]["a"]["interval"] is None
    world.output = world.output / "nothing"
    assert world.run("--report")[0] == 2
    assert "holds no measured cell" in capsys.readouterr().err


def test_what_is_made_once_counts_once(world):
    world.cells["data"]["flags"]["seed"] = 5
    assert world.run() == (0, ["shared/data", "shared/a", "shared/b"])
    cell = json.loads((world.output / "results.json").read_text())["cells"]["a"]
    assert cell == {"values": {"all": 6.5}, "mean": 6.5, "interval": None, "n": 1}


def test_seeds_of_earlier_runs_stay_in_the_report(world):
    world.run("--seeds", "0")
    world.run("--seeds", "1")
    cells = json.loads((world.output / "results.json").read_text())["cells"]
    assert cells["b"]["values"] == {"0": 1.25, "1": 2.25}


def weights(world):
    found = world.output.rglob("*.safetensors")
    return sorted(str(path.parent.relative_to(world.output)) for path in found)


@pytest.fixture
def dropping(world):
    """A study whose weights are deleted; `a` is made of `data`, and `b` of `a`."""
    world.others["drop_weights"] = True
    world.cells = {
        "data": world.step(add=1, seed="{seed}", weights=True),
        "a": world.step(add=0.5, inputs=["{data}"], weights=True),
        "b": world.step(add=0.25, inputs=["{a}"], weights=True),
    }
    return world


def test_weights_that_nobody_needs_any_more_are_deleted(dropping):
    assert dropping.run("--seeds", "0")[0] == 0
    # The measures are the ends, and are no models here.
    assert weights(dropping) == []
    assert dropping.run("--seeds", "0") == (0, [])
    assert dropping.run()[1] == ["seed-1/data", "seed-1/a", "seed-1/b"]
    dropping.others.clear()
    assert dropping.run("--seeds", "0") == (0, [])


def test_what_a_new_cell_needs_is_made_again(dropping):
    dropping.run("--seeds", "0")
    dropping.cells["c"] = dropping.step(add=2, inputs=["{a}"], weights=True)
    dropping.tables["u"] = {"cells": ["c"]}
    assert dropping.run("--seeds", "0") == (0, ["seed-0/data", "seed-0/a", "seed-0/c"])
    assert weights(dropping) == []


def test_weights_stay_until_all_that_flows_from_them_is_done(dropping):
    """The base of an adapter is read by the adapter's measure, whose flags do not name it."""
    dropping.cells["b"]["flags"]["add"] = "much"
    assert dropping.run("--seeds", "0")[0] == 1
    assert weights(dropping) == ["seed-0/a", "seed-0/data"]


def test_weights_behind_a_link_are_kept(dropping, tmp_path):
    del dropping.others["drop_weights"]
    dropping.run("--seeds", "0")
    made, elsewhere = dropping.output / "seed-0" / "data", tmp_path / "published"
    made.rename(elsewhere)
    made.symlink_to(elsewhere)
    dropping.others["drop_weights"] = True
    dropping.cells["c"] = dropping.step(add=2, inputs=["{a}"])
    dropping.tables["u"] = {"cells": ["c"]}
    assert dropping.run("--seeds", "0")[0] == 0
    assert list(elsewhere.glob("*.safetensors"))
    assert "seed-0/a" not in weights(dropping)


def test_weights_are_kept_by_default(dropping):
    del dropping.others["drop_weights"]
    dropping.run("--seeds", "0")
    assert weights(dropping) == ["seed-0/a", "seed-0/b", "seed-0/data"]


def test_a_failed_cell_stops_the_run_with_its_log_and_loses_nothing(world, capsys):
    world.cells["b"]["flags"]["add"] = "much"
    code, ran = world.run("--seeds", "0")
    assert code == 1
    assert ran == ["seed-0/data", "seed-0/a"]
    error = capsys.readouterr().err
    assert "seed-0/b ended with 2" in error
    assert "invalid float value: 'much'" in error
    world.cells["b"]["flags"]["add"] = 0.25
    assert world.run("--seeds", "0") == (0, ["seed-0/b"])


def test_files_of_others_are_never_deleted(world, capsys):
    world.output.mkdir()
    (world.output / "thesis.tex").write_text("years of work")
    assert world.run() == (2, [])
    assert "holds files that are not of a study" in capsys.readouterr().err
    assert [path.name for path in world.output.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("seeds", "count"), [("0..2", 3), ("4", 1), ("4,4,1", 2)])
def test_seeds_are_a_range_or_a_list(world, capsys, seeds, count):
    world.run("--dry_run", "--seeds", seeds)
    assert capsys.readouterr().out.splitlines()[-1] == f"0 of {5 * count} are done"


@pytest.mark.parametrize("seeds", ["x", "3..1", "1-3"])
def test_other_seeds_are_refused(world, capsys, seeds):
    assert world.run("--seeds", seeds) == (2, [])
    assert f"--seeds {seeds} is neither" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_cell_behind_and_is_resumed(world, number):
    gate = world.file.with_name("gate")
    world.cells["b"]["flags"]["wait_for"] = str(gate)
    process = subprocess.Popen([sys.executable, "-m", "student_trainer", *world.words()])
    pid_file = world.output / "seed-0/b/pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    cell = int(pid_file.read_text())

    # The folder is taken meanwhile: a second run would overwrite what the first one writes.
    second = subprocess.run(
        [sys.executable, "-m", "student_trainer", *world.words()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert "another study runs seed-0 there" in second.stderr

    process.send_signal(number)
    process.wait(timeout=30)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    wait_until(lambda: not alive(cell))
    world.journal.unlink()
    gate.touch()
    code, ran = world.run("--seeds", "0")
    assert (code, ran) == (0, ["seed-0/b"])


def wait_until(condition):
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited 30 s in vain")


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_every_process_of_a_study_imports_is_light():
    """A study starts a process for each cell: seconds of imports would be paid each time."""
    code = "import sys, student_trainer.study.runner; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
