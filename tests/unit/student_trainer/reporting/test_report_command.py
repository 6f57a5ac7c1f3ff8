"""`student-trainer report` shows what is in the folders, of one run and of several."""

import json
import re
import sys
import types
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from student_trainer.commands.main import main
from student_trainer.reporting.files import Files
from student_trainer.reporting.runs import Evaluation, TrainingRun, _cell_means, find_runs

GROUPED = {
    "loss": "train/loss", "divergence": "train/divergence", "eval_loss": "eval/loss",
    "teacher_top_k_mass": "teacher/top_k_mass",
    "student_top_k_mass": "train/student_top_k_mass", "seconds_step": "time/step",
    "completion_length": "train/completion_length", "seconds_teacher": "time/teacher",
    "seconds_forward_backward": "time/forward_backward", "stall_fraction": "time/stall_fraction",
    "eval_divergence": "eval/divergence", "step": "step",
}  # fmt: skip


def training_run(folder, *, last=0.5, checkpoint=None, grouped=False, divergence=None):
    history = [
        {"step": step, "loss": loss, "divergence": loss, "completion_length": 6.0 + step / 10,
         "teacher_top_k_mass": 0.8 + step / 100, "student_top_k_mass": 0.7 + step / 100,
         "seconds_step": 2.0,
         "seconds_teacher": 0.5, "seconds_forward_backward": 1.0, "stall_fraction": 0.25}
        for step, loss in ((1, 2.0), (10, last))
    ]  # fmt: skip
    history.append({"step": 10, "eval_loss": last + 0.1, "eval_divergence": last + 0.1})
    if grouped:
        history = [{GROUPED[name]: value for name, value in entry.items()} for entry in history]
    place = folder if checkpoint is None else folder / f"checkpoint-{checkpoint}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    if divergence is not None:
        (place / "training_inputs.json").write_text(json.dumps({"same": divergence}))
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


def evaluation_run(folder, model, *, score, passed=True, verdicts=None):
    folder.mkdir(parents=True)
    results = {"model": str(model), "problems": 100, "n": 1, "pass@1": score}
    results |= {"perplexity": 1.5, "divergence": 0.25}
    (folder / "results.json").write_text(json.dumps(results))
    samples = [
        {"task_id": f"T/{i}", "completion": "return 1", "passed": each}
        for i, each in enumerate([passed] if verdicts is None else verdicts)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


@pytest.mark.parametrize(
    "content", ["[]", '{"model": "m"}', '{"cells": {}}', '{"results": {}, "model": "m", "n": 1}']
)
def test_a_file_of_this_name_by_another_program_is_no_run(tmp_path, content):
    evaluation_run(tmp_path / "ours", "m", score=0.5)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "results.json").write_text(content)
    assert [one.name for one in find_runs([tmp_path]).evaluations] == ["ours"]


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


def rows_of(page, heading=""):
    """The cells of all tables, or of the one under a heading, as words."""
    if heading:
        page = page[page.index(f"<h2>{heading}</h2>") :].partition("</table>")[0]
    return [
        [
            re.sub(r"<[^>]*>", " ", cell).split()
            for cell in re.findall(r"<t[dh]\b[^>]*>.*?</t[dh]>", row)
        ]
        for row in re.findall(r"<tr[^>]*>(<th scope=row>.*?)</tr>", page)
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
    assert re.findall(r"<figcaption>([^<]*?) ?<", page) == [
        "Divergence in training", "Coverage: mass on the support", "Completion length",
    ]  # fmt: skip
    assert "<li><b>Held-out divergence</b> logged once, at step 10: 0.6." in page
    assert "Loss" not in text  # is the divergence, which has a chart
    assert "the tail is all others as one" in text
    assert rows_of(page) == [[["run"], ["10"], ["0.5"], ["0.6"], ["2"], ["25", "%"]]]


def test_several_runs_share_each_chart_and_their_scores_stand_beside_them(tmp_path):
    first, second = training_run(tmp_path / "a" / "one"), training_run(tmp_path / "a" / "two")
    evaluation_run(tmp_path / "a" / "scores" / "one", first, score=0.5)
    evaluation_run(tmp_path / "a" / "scores" / "two", second, score=0.75, passed=False)
    evaluation_run(tmp_path / "other", "elsewhere", score=0.25)
    page = page_of(tmp_path, tmp_path / "a", tmp_path / "other")
    assert page.index("<h2>Differences from one</h2>") < page.index("<h2>Runs</h2>")
    runs, evaluations = rows_of(page, "Runs"), rows_of(page, "Evaluations")
    assert [row[0] for row in runs] == [["one"], ["two"]]
    assert [row[0] for row in evaluations] == [["scores/one"], ["scores/two"], ["other"]]
    assert runs[0][1] == evaluations[0][3] == ["0.500", "0.404", "to", "0.596"]
    assert evaluations[2][3][0] == "0.250"
    assert [row[4:] for row in evaluations] == [[["1.5"], ["0.25"]]] * 3
    lines = [a for tag, a in Words(page).tags if tag == "polyline"]
    assert {line["class"] for line in lines} == {"line c0", "line c1"}
    assert "return 1" in " ".join(Words(page).words)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [
        training_run(tmp_path / name / "out", last=last) for name, last in (("a", 1), ("b", 2))
    ]
    found = find_runs(folders).training
    assert [(run.name, run.last("train/loss")) for run in found] == [("a/out", 1), ("b/out", 2)]
    assert page_of(tmp_path, *folders).count("<polyline") == 2 * 4


def test_losses_with_and_without_a_teacher_are_two_charts(tmp_path):
    taught = training_run(tmp_path / "taught")
    alone = tmp_path / "alone"
    alone.mkdir()
    history = [{"step": step, "loss": loss} for step, loss in ((1, 9.0), (10, 8.0))]
    (alone / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = page_of(tmp_path, taught, alone)
    titles = re.findall(r"<figcaption>([^<]*?) ?<", page)
    assert titles[:2] == ["Divergence in training", "Loss without a teacher"]
    colours = re.findall(r'polyline class="line (c\d)"', page)
    assert colours[:2] == ["c0", "c1"]


def test_both_kinds_of_names_make_the_same_page(tmp_path):
    old = training_run(tmp_path / "old" / "run")
    new = training_run(tmp_path / "new" / "run", grouped=True)
    assert page_of(tmp_path, old) == page_of(tmp_path, new)


def differences(page, base):
    """Metric -> difference, interval and what it is over, as text."""
    rows = rows_of(page, f"Differences from {base}")
    return {" ".join(cells[0]): [" ".join(cell) for cell in cells[3:]] for cells in rows}


def test_scores_differ_by_problem(tmp_path):
    """Eight of ten problems get better, one worse: .7 ± 2.262 · .675 / √10, cut at 1."""
    first, second = training_run(tmp_path / "one"), training_run(tmp_path / "two", last=0.25)
    before, after = [False] * 8 + [True, True], [True] * 8 + [False, True]
    evaluation_run(tmp_path / "scores" / "one", first, score=0.2, verdicts=before)
    evaluation_run(tmp_path / "scores" / "two", second, score=0.9, verdicts=after)
    page = page_of(tmp_path, first, second, tmp_path / "scores")
    found = differences(page, "one")
    assert found["pass@1 (higher is better)"] == [
        "+70.0 points", "+21.7 to +100.0 points", "10 problems, paired",
    ]  # fmt: skip
    assert found["Divergence in training (lower is better)"] == ["−0.25", "–", "none: one run each"]
    assert found["Perplexity (lower is better)"][1:] == ["–", "none: one mean over all tokens"]
    assert next(iter(found)) == "pass@1 (higher is better)"
    assert "another seed may change any of these" in page
    assert "Loss" not in " ".join(found)


def test_other_problems_give_no_interval(tmp_path):
    first, second = training_run(tmp_path / "one"), training_run(tmp_path / "two")
    evaluation_run(tmp_path / "scores" / "one", first, score=0.2, verdicts=[True, False])
    evaluation_run(tmp_path / "scores" / "two", second, score=0.9, verdicts=[True, False, True])
    found = differences(page_of(tmp_path, first, second, tmp_path / "scores"), "one")
    assert found["pass@1 (higher is better)"][1:] == ["–", "none: not the same problems"]
    assert "Perplexity (lower is better)" not in found
    assert all(interval == "–" for _, interval, _ in found.values())


def test_unlike_divergences_are_not_compared(tmp_path):
    first = training_run(tmp_path / "one", divergence={"--beta": 0.5})
    second = training_run(tmp_path / "two", divergence={"--beta": 0.0})
    found = differences(page_of(tmp_path, first, second), "one")
    assert "Divergence in training (lower is better)" not in found
    assert "Held-out loss (lower is better)" not in found
    assert "Seconds a step (lower is better)" in found


def test_shown_samples_are_paired(tmp_path):
    folders = [training_run(tmp_path / name) for name in ("one", "two")]
    for folder, divergences in zip(folders, ((0.5, 0.75), (0.25, 0.25)), strict=True):
        samples = [
            {"name": f"rows:{i}", "prompt": f"p{i}", "source": "dataset", "tokens": ["a"],
             "evaluations": [{"step": 10, "divergence": [d], "support": [[]]}]}
            for i, d in enumerate(divergences)
        ]  # fmt: skip
        text = json.dumps({"beta": 0.5, "samples": samples})
        (folder / "_held_out_samples.json").write_text(text)
    found = differences(page_of(tmp_path, *folders), "one")
    # −.375 ± 12.706 · .177 / √2
    assert found["Divergence on shown samples (lower is better)"] == [
        "−0.375", "−1.96 to +1.21, may be chance", "2 held-out samples, paired",
    ]  # fmt: skip


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
    assert rows_of(page, "A study") == [
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


def test_plots_are_svg_files_with_the_same_lines(tmp_path, capsys):
    training_run(tmp_path / "run")
    page_of(tmp_path, tmp_path / "run", f"--plots={tmp_path / 'plots'}")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "divergence-in-training.svg", "coverage-mass-on-the-support.svg", "completion-length.svg",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "Held-out divergence has no plot: it is logged once, at step 10: 0.6\n" in said
    root = ET.parse(tmp_path / "plots" / "coverage-mass-on-the-support.svg").getroot()
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Coverage: mass on the support", "probability, not from 0", "step"} < texts
    assert {"teacher 90\u00a0%", "student 80\u00a0%"} < texts
    assert any(text.startswith("Higher is better.") for text in texts)
    assert root.find("{http://www.w3.org/2000/svg}desc").text.startswith(
        "teacher: 81\u00a0% at step 1"
    )


def test_the_page_is_written_beside_the_run(tmp_path, capsys):
    training_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "<h1>run</h1>" in (tmp_path / "run" / "report.html").read_text()


def test_a_studys_differences_are_over_its_seeds(tmp_path):
    for seed, losses in ((0, (0.5, 1.0)), (1, (0.25, 1.0))):
        for cell, last in zip(("gkd", "sft"), losses, strict=True):
            training_run(tmp_path / f"seed-{seed}" / cell, last=last)
    cells = {name: {"mean": mean, "interval": None, "n": 2} for name, mean in
             (("gkd", 0.5), ("sft", 0.25))}  # fmt: skip
    pair = {"cell": "gkd", "base": "sft", "mean": 0.25, "interval": [0.125, 0.375], "n": 2}
    results = {"title": "A study", "metric": "pass@1", "cells": cells, "differences": {"t": [pair]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = page_of(tmp_path, tmp_path)
    rows = [[" ".join(cell) for cell in row] for row in rows_of(page, "A study: differences")]
    assert rows[:2] == [
        ["gkd − sft", "pass@1 (higher is better)", "25 %", "50 %", "+25.0 points",
         "+12.5 to +37.5 points", "2 seeds, paired"],
        ["gkd − sft", "Held-out divergence (lower is better)", "1.1", "0.475", "−0.625",
         "−2.21 to +0.963, may be chance", "2 seeds, paired"],
    ]  # fmt: skip
    assert rows[-1][-1] == "none: the same in all seeds"
    assert [row[-2] != "–" for row in rows] == sorted(
        (row[-2] != "–" for row in rows), reverse=True
    )


def test_png_is_written_beside_svg(tmp_path, capsys):
    resvg = pytest.importorskip("resvg_py", reason="of the extra png")
    assert resvg
    training_run(tmp_path / "run")
    page_of(tmp_path, tmp_path / "run", f"--plots={tmp_path / 'plots'}", "--png")
    names = {path.name for path in (tmp_path / "plots").glob("*.svg")}
    pictures = {path.name for path in (tmp_path / "plots").glob("*.png")}
    assert pictures == {name.replace(".svg", ".png") for name in names}
    head = (tmp_path / "plots" / "completion-length.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert int.from_bytes(head[16:20], "big") == 3 * 340


def refused(capsys, *words):
    assert main(["report", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_png_without_its_library_names_the_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    training_run(tmp_path / "run")
    said = refused(capsys, tmp_path / "run", f"--plots={tmp_path / 'plots'}", "--png")
    assert "pip install 'sparse-gkd[png]'" in said
    assert not (tmp_path / "run" / "report.html").exists()


def test_png_without_any_font_is_refused(tmp_path, capsys, monkeypatch):
    blind = types.SimpleNamespace(svg_to_bytes=lambda *_, **__: b"blank")
    monkeypatch.setitem(sys.modules, "resvg_py", blind)
    training_run(tmp_path / "run")
    said = refused(capsys, tmp_path / "run", f"--plots={tmp_path / 'plots'}", "--png")
    assert "fonts-dejavu-core" in said


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--png"], "give --plots DIR"),
        (["--port=8080"], "give --watch"),
        (["--watch", "--output=x.html"], "writes no file"),
        (["--watch", "--plots=x"], "writes no file"),
        (["--watch", "--port=70000"], "leave it out for one that is free"),
    ],
    ids=["png", "port", "output", "plots", "number"],
)
def test_flags_without_effect_are_refused(tmp_path, capsys, words, remedy):
    training_run(tmp_path / "run")
    assert remedy in refused(capsys, tmp_path / "run", *words)


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


def several_teachers(folder):
    """Make a run of two teachers, of which the flags name math first."""
    training_run(folder, grouped=True)
    file = folder / "trainer_state.json"
    history = json.loads(file.read_text())["log_history"]
    held_out = {"step": 1, "eval/loss": 2.0, "eval/divergence": 2.0}
    history.insert(0, held_out)
    for entry in history:
        for number, name in enumerate(("math", "code")):
            if "eval/loss" in entry:
                entry[f"eval/divergence/{name}"] = entry["eval/divergence"] + number
                entry["eval/context_divergence"] = 0.125
            else:
                entry[f"train/divergence/{name}"] = entry["train/loss"] + number
                entry[f"teacher/top_k_mass/{name}"] = 0.9
                entry[f"time/teacher/{name}"] = 0.25 + number / entry["step"]
    file.write_text(json.dumps({"log_history": history, "max_steps": 10}))
    told = {
        "--model_name_or_path": "/models/small",
        "--dataset_name": ["/data/a.jsonl", "b"],
        "the teacher math's model": "big/math",
        "the teacher code's model": "/x/coder",
    }
    same = {"--lmbda": 1.0, "rows a step": 8}
    (folder / "training_inputs.json").write_text(json.dumps({"same": same, "told": told}))
    return folder


def legends(page):
    """Title of a chart -> name of a line -> its class."""
    return {
        figure.partition(" <")[0]: {
            name.strip(): colour
            for colour, name in re.findall(r'line (c\w)" d="[^>]*/></svg>([^<]*)<b>', figure)
        }
        for figure in page.split("<figcaption>")[1:]
    }


def test_each_of_several_teachers_has_one_colour_in_all_charts(tmp_path):
    page = page_of(tmp_path, several_teachers(tmp_path / "run"))
    found = legends(page)
    assert found["Held-out divergence"] == {"held out, all rows": "c0", "math": "c1", "code": "c2"}
    assert found["Divergence in training"] == {
        "training, all rows": "c0", "math": "c1", "code": "c2",
    }  # fmt: skip
    assert found["Coverage: mass on the support"] == {
        "all teachers": "ct", "student": "c0", "math": "c1", "code": "c2",
    }  # fmt: skip
    assert found["Waiting for each teacher"] == {"math": "c1", "code": "c2"}
    assert "<li><b>Context divergence</b> constant: 0.125. <span class=note>How much" in page


def test_several_teachers_of_several_runs_have_a_chart_each(tmp_path):
    folders = [several_teachers(tmp_path / "one"), several_teachers(tmp_path / "two")]
    found = legends(page_of(tmp_path, *folders))
    for name in ("math", "code"):
        assert found[f"Held-out divergence, teacher {name}"] == {"one": "c0", "two": "c1"}


def test_the_page_begins_with_what_was_trained_and_where_to_look(tmp_path):
    page = page_of(tmp_path, several_teachers(tmp_path / "run"))
    first, second = re.findall(r"<p class=lead>(.*?)</p>", page)
    assert first == (
        "run: student “small” was trained by on-policy GKD (the student writes, the teacher "
        "scores) from 2 teachers, math (“big/math”) and code (“coder”), each for its own rows, on "
        "“a.jsonl” and “b”, for 10 steps of 8 rows."
    )
    assert second.startswith("Look first at the held-out divergence: it should fall")


def test_adapters_were_trained(tmp_path):
    folder = training_run(tmp_path / "run")
    told = {"--model_name_or_path": "small", "--use_peft": True}
    (folder / "training_inputs.json").write_text(json.dumps({"same": {}, "told": told}))
    page = page_of(tmp_path, folder)
    assert "LoRA adapters of student “small” were trained by supervised" in page


def test_runs_say_in_which_flags_they_differ(tmp_path):
    for name, rate in (("one", 0.001), ("two", 0.01)):
        folder = training_run(tmp_path / name)
        told = {"--model_name_or_path": "small", "--learning_rate": rate, "--dataset_name": ["d"]}
        (folder / "training_inputs.json").write_text(json.dumps({"same": {}, "told": told}))
    page = page_of(tmp_path, tmp_path / "one", tmp_path / "two")
    assert re.findall(r"<p class=lead>(.*?)</p>", page)[:2] == [
        "one and two: student “small” was trained by supervised fine-tuning (SFT) on “d”.",
        "In the order of the runs they differ in --learning_rate 0.001, 0.01.",
    ]


def test_samples_are_chosen_by_their_place_and_the_page_says_so(tmp_path):
    """Six evenly spaced problems of 100, though two models differ in the first ten alone."""
    verdicts = [i >= 10 for i in range(100)]
    evaluation_run(tmp_path / "before", "b", score=0.9, verdicts=verdicts)
    evaluation_run(tmp_path / "after", "a", score=1.0, verdicts=[True] * 100)
    page = page_of(tmp_path, tmp_path / "before", tmp_path / "after")
    assert re.findall(r"<article><p>T/(\d+)", page) == ["0", "19", "39", "59", "79", "99"]
    assert (
        "6 of 100 problems, evenly spaced in their order and not chosen by result, so they may "
        "look better or worse than the whole. They pass: before 5 of 6 here, 90 of all 100; after "
        "6 of 6 here, 100 of all 100."
    ) in page


def test_a_model_before_its_training_stands_first_in_each_card(tmp_path):
    folder = training_run(tmp_path / "student")
    told = {"--model_name_or_path": str(tmp_path / "base"), "--dataset_name": ["d"]}
    (folder / "training_inputs.json").write_text(json.dumps({"same": {}, "told": told}))
    evaluation_run(tmp_path / "after", folder, score=1.0)
    evaluation_run(tmp_path / "start", tmp_path / "base", score=0.0, passed=False)
    page = page_of(tmp_path, folder, tmp_path / "after", tmp_path / "start")
    card = page[page.index("<article>") :]
    assert card.index("start, before training <em>✗ fails") < card.index("after <em>✓ passes")


def test_a_loss_that_is_more_than_the_divergence_has_a_chart(tmp_path):
    folder = training_run(tmp_path / "run", grouped=True)
    file = folder / "trainer_state.json"
    history = json.loads(file.read_text())["log_history"]
    for entry in history:
        if "train/loss" in entry:
            entry["train/loss"] += 0.1  # of --sft_weight
    file.write_text(json.dumps({"log_history": history}))
    assert "Loss" in legends(page_of(tmp_path, folder))


def test_runs_of_one_name_have_each_its_own_evaluation(tmp_path):
    for seed, score in (("one", 0.25), ("two", 0.75)):
        run = training_run(tmp_path / seed / "student")
        verdicts = [i < 16 * score for i in range(16)]
        evaluation_run(tmp_path / seed / "scores", run, score=score, verdicts=verdicts)
    page = page_of(tmp_path, tmp_path)
    differences = [
        " ".join(word for cell in row for word in cell)
        for row in rows_of(page, "Differences from one/student")
    ]
    assert any(row.startswith("pass@1") and "+50.0 points" in row for row in differences)
    shares = [cell[0] for row in rows_of(page, "Runs") for cell in row if "to" in cell]
    assert shares == ["0.250", "0.750"]


def test_the_model_of_an_evaluation_is_known_by_its_name_only_where_its_folder_is_gone(tmp_path):
    def place(model, *runs):
        folders = [tmp_path / name for name in runs]
        found = [TrainingRun(folder.name, folder, [], None) for folder in folders]
        evaluation = Evaluation("scores", tmp_path, {"model": str(tmp_path / model)}, {})
        return evaluation.place_among(found)

    (tmp_path / "base" / "student").mkdir(parents=True)
    assert place("gone/student", "a/other", "a/student") == 1
    assert place("gone/student", "a/student", "b/student") is None
    assert place("a/student", "b/student", "a/student") == 1
    assert place("base/student", "a/student") is None  # another model that is there


def test_means_of_a_study_are_of_the_steps_that_all_seeds_logged(tmp_path):
    """A seed that was resumed has one window more, at a step of its own."""
    histories = [
        [{"step": 1, "train/loss": 2.0}, {"step": 10, "train/loss": 1.0},
         {"step": 10, "eval/loss": 3.0}, {"step": 10, "train/runtime": 5.0}],
        [{"step": 1, "train/loss": 4.0}, {"step": 7, "train/loss": 9.0},
         {"step": 10, "train/loss": 2.0}, {"step": 10, "eval/loss": 5.0, "eval/pass@1": 1.0},
         {"step": 10, "train/runtime": 7.0}],
    ]  # fmt: skip
    for seed, history in enumerate(histories):
        folder = tmp_path / f"seed-{seed}" / "cell"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    [mean] = _cell_means(tmp_path, ["cell"], Files())
    assert mean.history == [
        {"step": 1, "train/loss": 3.0}, {"step": 10, "train/loss": 1.5},
        {"step": 10, "eval/loss": 4.0}, {"step": 10, "train/runtime": 6.0},
    ]  # fmt: skip
