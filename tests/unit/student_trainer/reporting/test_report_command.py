"""`student-trainer report` shows what is in the folders, of one run and of several."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from student_trainer.commands.main import main
from student_trainer.reporting.names import grouped
from student_trainer.reporting.runs import find_runs, wilson_interval


def training_run(folder, *, last=0.5, checkpoint=None):
    history = [
        {"step": step, "loss": loss, "divergence": loss, "teacher_top_k_mass": 0.9,
         "student_top_k_mass": 0.8, "completion_length": 7.0, "seconds_step": 2.0,
         "seconds_teacher": 0.5, "seconds_forward_backward": 1.0, "stall_fraction": 0.25}
        for step, loss in ((1, 2.0), (10, last))
    ]  # fmt: skip
    history.append({"step": 10, "eval_loss": last + 0.1, "eval_divergence": last + 0.1})
    place = folder if checkpoint is None else folder / f"checkpoint-{checkpoint}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def shown_samples(folder, divergence):
    evaluations = [
        {"step": step, "divergence": [d, 0.0],
         "support": [[["a b", 0.75, 0.125], ["<i>", None, 0.5]], []],
         "completion": f"own {step}", "passed": step > 0}
        for step, d in ((0, 1.0), (10, divergence))
    ]  # fmt: skip
    sample = {"name": "rows:1", "prompt": "what?", "source": "dataset", "tokens": ["a b", "<c>"],
              "evaluations": evaluations}  # fmt: skip
    (folder / "_held_out_samples.json").write_text(json.dumps({"beta": 0.5, "samples": [sample]}))


def evaluation_run(folder, model, *, score, passed=True):
    folder.mkdir(parents=True)
    results = {"model": str(model), "problems": 100, "n": 1, "pass@1": score}
    results |= {"perplexity": 1.5, "divergence": 0.25}
    (folder / "results.json").write_text(json.dumps(results))
    sample = {"task_id": "T/0", "completion": "return 1", "passed": passed}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")


class Words(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.words, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def page_of(tmp_path, *words):
    output = tmp_path / "page.html"
    assert main(["report", *map(str, words), f"--output={output}"]) == 0
    page = output.read_text()
    assert not {"script", "link", "img"} & {tag for tag, _ in Words(page).tags}
    return page


def rows_of(page):
    return [
        [re.sub(r"<[^>]*>", " ", cell).split() for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in re.findall(r"<tr[^>]*>(<td>.*?)</tr>", page)
    ]


def test_one_run_has_its_curves_and_where_its_time_went(tmp_path):
    page = page_of(tmp_path, training_run(tmp_path / "run"))
    text = " ".join(Words(page).words)
    assert "Divergence in training" in text
    assert "Coverage: mass on the support" in text
    assert "waiting for the teacher 5.0 s" in text
    assert "forward and backward 10.0 s" in text
    assert "the rest 5.0 s" in text
    assert "Held-out pass@1" not in text  # nothing of that was logged
    assert page.count("<figure>") == 5
    assert rows_of(page) == [[["run"], ["10"], ["0.5"], ["0.5"], ["0.6"], ["2"], ["25", "%"]]]


def test_several_runs_share_each_chart_and_their_scores_stand_beside_them(tmp_path):
    first, second = training_run(tmp_path / "a" / "one"), training_run(tmp_path / "a" / "two")
    evaluation_run(tmp_path / "a" / "scores" / "one", first, score=0.5)
    evaluation_run(tmp_path / "a" / "scores" / "two", second, score=0.75, passed=False)
    evaluation_run(tmp_path / "other", "elsewhere", score=0.25)
    page = page_of(tmp_path, tmp_path / "a", tmp_path / "other")
    rows = rows_of(page)
    runs, evaluations = rows[:2], rows[2:]
    assert [row[0] for row in runs] == [["one"], ["two"]]
    assert [row[0] for row in evaluations] == [["scores/one"], ["scores/two"], ["other"]]
    assert runs[0][1] == evaluations[0][3] == ["0.500", "0.404", "to", "0.596"]
    assert evaluations[2][3][0] == "0.250"
    assert [row[4:] for row in evaluations] == [[["1.5"], ["0.25"]]] * 3
    lines = [a for tag, a in Words(page).tags if tag == "polyline"]
    assert {line["class"] for line in lines} == {"line c0", "line c1"}
    assert "return 1" in " ".join(Words(page).words)


def test_a_run_that_still_trains_is_read_from_its_last_checkpoint(tmp_path):
    for step, last in ((9, 0.75), (10, 0.5)):
        training_run(tmp_path / "run", last=last, checkpoint=step)
    (run,) = find_runs([tmp_path / "run"]).training
    assert run.last("train/loss") == 0.5


def test_a_study_is_its_cells_averaged_over_seeds(tmp_path):
    for seed, last in ((0, 0.5), (1, 1.0)):
        training_run(tmp_path / f"seed-{seed}" / "gkd", last=last)
    cells = {"gkd": {"mean": 0.5, "interval": [0.25, 0.75], "n": 2},
             "sft": {"mean": 0.25, "interval": None, "n": 1}}  # fmt: skip
    (tmp_path / "results.json").write_text(
        json.dumps({"title": "A study", "metric": "pass@1", "cells": cells})
    )
    (run,) = find_runs([tmp_path]).training
    assert run.points("train/loss") == [(1.0, 2.0), (10.0, 0.75)]
    page = page_of(tmp_path, tmp_path)
    assert rows_of(page)[1:] == [
        [["gkd"], ["2"], ["0.500", "0.250", "to", "0.750"]],
        [["sft"], ["1"], ["0.250"]],
    ]
    assert "A study" in page


def test_tokens_are_shaded_by_divergence_and_hold_both_distributions(tmp_path):
    shown_samples(training_run(tmp_path / "run"), divergence=0.25)
    page = page_of(tmp_path, tmp_path / "run")
    shades = re.findall(r'<b tabindex=-1 style="--d:([\d.]+)"', page)
    assert shades == ["1.00", "0.00", "0.25", "0.00"]
    text = " ".join(Words(page).words)
    assert "a·b" in text
    assert "0.750" in text
    assert "in the tail" in text
    assert "step 0" in text
    assert "0.125 nats a token" in text  # of 0.25 and 0
    assert "own 10" in text
    assert "<i>" not in "".join(re.findall(r"<u>(.*?)</u>", page))


def test_plots_are_svg_files_with_the_same_lines(tmp_path):
    training_run(tmp_path / "run")
    page_of(tmp_path, tmp_path / "run", f"--plots={tmp_path / 'plots'}")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "loss.svg", "divergence-in-training.svg", "held-out-loss.svg",
        "coverage-mass-on-the-support.svg", "completion-length.svg",
    }  # fmt: skip
    root = ET.parse(tmp_path / "plots" / "coverage-mass-on-the-support.svg").getroot()
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Coverage: mass on the support", "probability", "step", "teacher", "student"} < texts


def test_the_page_is_written_beside_the_run(tmp_path, capsys):
    training_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "<h1>run</h1>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "holds no run"),
        (lambda folder: (folder.mkdir(), (folder / "trainer_state.json").write_text("{")),
         "not valid JSON"),
    ],
)  # fmt: skip
def test_folders_without_a_run_are_refused_by_name(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "run") in error


def test_wilsons_interval_is_that_of_the_textbook():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 0 of 20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_the_log_of_an_earlier_version_gives_the_same_page(tmp_path):
    """Its names had no groups: ``loss``, ``eval_loss``, ``teacher_entropy``, ``seconds_step``."""
    pages = []
    for name, names in (("old", None), ("new", grouped)):
        folder = training_run(tmp_path / name / "run")
        file = folder / "trainer_state.json"
        if names is not None:
            entries = json.loads(file.read_text())["log_history"]
            entries = [names(entry) for entry in entries]
            assert {key.partition("/")[0] for entry in entries for key in entry} == {
                "step", "train", "teacher", "time", "eval",
            }  # fmt: skip
            file.write_text(json.dumps({"log_history": entries}))
        assert main(["report", str(folder), "--title=t"]) == 0
        pages.append((folder / "report.html").read_text())
    assert pages[0] == pages[1]
    assert "Held-out loss" in pages[0]
    assert "waiting for the teacher" in pages[0]
