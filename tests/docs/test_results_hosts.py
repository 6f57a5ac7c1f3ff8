"""The page on reliability says of five hosts what docs/results/hosts.json holds."""

import json
from pathlib import Path

from benchmarks.hosts import relative_difference
from benchmarks.hosts_parts import LONG, RANKS, ROLLOUT_TIMEOUT, SERVERS, SHORT

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "docs" / "results" / "hosts.json").read_text())
PAGE = (ROOT / "docs" / "explanation" / "reliability.md").read_text()
WORDS = " ".join(PAGE.split("## Several hosts")[1].split("\n## ")[0].split())
RUNS = FOUND["runs"]
FAULTS = [fault for run in RUNS for fault in run["faults"]]


def count(what, hosts=None):
    return sum(
        what in fault["what"] and fault["host"] in (hosts or [fault["host"]]) for fault in FAULTS
    )


def test_the_losses():
    most = max(relative_difference(one["one"], one["two"]) for one in FOUND["losses"].values())
    assert most == FOUND["difference"] < 1e-6
    assert f"differ from those of one process by {most:.1e} at most" in WORDS
    assert f"{FOUND['steps']} steps" in WORDS
    assert not FOUND["quick"]


def test_the_faults():
    assert f"{len(RUNS)} runs with {len(FAULTS)} faults" in WORDS
    killed = [count("killed", hosts) for hosts in (SERVERS, RANKS, ["teacher"])]
    assert min(killed) > 0
    assert "rollout servers ({}), ranks ({}), the teacher ({})".format(*killed) in WORDS
    assert f"Frozen: servers ({count('frozen')})" in WORDS
    writes, takes = count("while it writes"), count("while it takes weights")
    assert (
        f"Unplugged: hosts ({count('unplugged')}), of which servers that wrote ({writes}) or took "
        f"weights ({takes})"
    ) in WORDS
    assert f"for {SHORT:g} s or {LONG:g} s, at `--rollout_timeout {ROLLOUT_TIMEOUT}`" in WORDS


def test_the_outcome():
    assert all(run["equal"] for run in RUNS)
    resumed, lost, repeated = (
        sum(run[name] for run in RUNS) for name in ("resumed", "lost", "repeated")
    )
    assert [code for run in RUNS for codes in run["codes"] for code in codes] == [1] * 2 * resumed
    assert resumed == count("killed", RANKS)
    assert f"started again after each kill of a rank ({resumed})" in WORDS
    assert f"gave up a server that wrote ({lost})" in WORDS
    assert f"transfer of weights was repeated ({repeated})" in WORDS
