"""The figures of scale in the docs are docs/results/scale.json, and the model gives the same."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.scale import point, points
from benchmarks.scale_model import COSTS, WORKLOAD, Costs, Workload

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "docs" / "results" / "scale.json").read_text())
COSTS_MEASURED = Costs(**RESULTS["costs"])
TEXT = (ROOT / "docs" / "explanation" / "performance.md").read_text()
SECTION = TEXT.split("## How far it scales")[1].split("\n## ")[0]
WORDS = " ".join(SECTION.split())
SERVERS = (ROOT / "docs" / "how-to" / "rollout-servers.md").read_text()


def line(one):
    parts = one["parts"]
    seconds = [
        one["seconds"], parts["weights"] + parts["control"], parts["train"], parts["client"],
        parts["rollouts"] + parts["teacher"],
    ]  # fmt: skip
    split = f"{one['teacher']} / {one['rollout']} / {one['trainer']}"
    cells = [f"{one['gpus']:,}", f"{one['completions']:,}", split]
    cells += [f"{value:.1f}" for value in seconds]
    return f"| {' | '.join([*cells, format(one['efficiency'], '.2f')])} |"


def test_the_page_has_each_point():
    said = [text for text in SECTION.splitlines() if text.count("|") == 10 and " / " in text]
    assert [text for text in said if "teacher" not in text] == [
        line(one) for batch in ("growing", "fixed") for one in RESULTS["points"]
        if one["batch"] == batch
    ]  # fmt: skip


def test_the_results_are_what_the_model_gives():
    assert RESULTS["workload"] == asdict(WORKLOAD)
    measured = ("client_rollout", "client_request", "client_token")
    assert replace(COSTS_MEASURED, **{name: getattr(COSTS, name) for name in measured}) == COSTS
    for one in RESULTS["points"][:4]:
        work = replace(Workload(**RESULTS["workload"]), completions=one["completions"])
        found = asdict(point(one["batch"], work, COSTS_MEASURED, one["gpus"]))
        assert found.pop("parts") == pytest.approx(one["parts"])
        assert found == pytest.approx({name: one[name] for name in found})
    before = points(replace(COSTS_MEASURED, together=False), (64,))
    said = [one["seconds"] for one in RESULTS["one server after another"] if one["gpus"] == 64]
    assert [one.seconds for one in before] == pytest.approx(said)


def test_the_first_limit_is_the_batch():
    limited = [one for one in RESULTS["points"] if one["limit"] != "none"]
    assert {one["batch"] for one in limited} == {"fixed"}
    assert min(one["gpus"] for one in limited) == 64
    assert {one["limit"] for one in limited} == {"time to write the longest completion"}


def test_the_steps_before_and_after_the_mend():
    both = zip(RESULTS["one server after another"], RESULTS["points"], strict=True)
    for before, after in both:
        if after["batch"] == "growing" and after["gpus"] >= 64:
            row = f"| {after['gpus']:,} | {before['seconds']:.1f} | {after['seconds']:.1f} |"
            assert row in SECTION.splitlines()


def test_the_clients_own_cost():
    one = COSTS_MEASURED.client_rollout + COSTS_MEASURED.client_request
    one += WORKLOAD.mean * COSTS_MEASURED.client_token
    assert f"{1e3 * one:.1f} ms of processor time" in WORDS
    assert f"so {1 / one:.0f} completions a second" in WORDS
    assert f"{25e9 / 8 / 392 / 1e6:.1f} million tokens" in WORDS


@pytest.mark.parametrize(("student", "gigabytes"), [("0.5B", 1), ("7B", 14), ("32B", 64)])
def test_what_weights_cost_a_step(student, gigabytes):
    seconds = [times * gigabytes / rate for rate in (40, 2.5) for times in (1, 2)]
    cells = [f"{one:.2g} s" for one in seconds]
    assert f"| {student} | {gigabytes} GB | {' | '.join(cells)} |" in SERVERS
