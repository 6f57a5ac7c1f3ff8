"""Run the whole experiment in one command: a served teacher distils a student over HTTP.

    python -m examples.mini_humaneval.quickstart --output_dir runs/quickstart

makes tokenizer, models and data; pretrains a teacher and fine-tunes it on the few labels; trains
one student by SFT on the same labels, and one by distillation from the teacher, which runs as a
separate server process; evaluates all of them; and writes results.json and report.html. Every
stage is a cell of study.yaml at one seed: a call of the public command line, which is shown before
it runs, cut to the width. Whole commands and what they write go into quickstart.log. On two
machines, or in two containers, over one folder:

    python -m examples.mini_humaneval.quickstart --output_dir DIR --only teacher
    teacher-server serve DIR/teacher_sft --host 0.0.0.0 --api-key-file KEY
    export TEACHER_API_KEY=$(cat KEY)
    python -m examples.mini_humaneval.quickstart --output_dir DIR --teacher_url http://HOST:8000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.mini_humaneval import prepare
from examples.mini_humaneval.settings import SETTINGS
from examples.mini_humaneval.stages import Stages
from shared.errors import SparseGKDError
from student_trainer.commands import main as cli
from student_trainer.config.teachers import teachers_of
from student_trainer.reporting.content import Range, Report, Samples, SideBySide, Table
from student_trainer.reporting.curves import charts_of
from student_trainer.reporting.page import render
from student_trainer.reporting.runs import find_runs
from student_trainer.reporting.samples import evenly, how_chosen
from student_trainer.reporting.statistics import wilson_interval
from student_trainer.study.served import served
from student_trainer.study.spec import Cell, load_study, substituted, to_argv

STUDY = Path(__file__).with_name("study.yaml")
MODELS = {
    "Teacher, raw": "teacher_raw",
    "Teacher after SFT": "teacher_sft",
    "Student before": "student_before",
    "Student, SFT": "student_sft",
    "Student, distilled": "student_distilled",
}
STUDENTS = {"Student, SFT": 0, "Student, distilled": 1}  # the number of each one's colour
# Cells of the study by their output folder, which lies beside the data.
CELLS = {name: name for name in MODELS.values()} | {"student_distilled": "gkd.teacher_sft"}
# What each stage is for; {rows} and the like are fields of `settings.SETTINGS`.
PURPOSES = {
    "prepare": "make a tokenizer, two models without training, and the data",
    "teacher_raw": "pretrain the teacher on {pretrain_rows:,} rows",
    "teacher_sft": "fine-tune the teacher on {labelled_rows} noisy labels",
    "student_before": "warm the student up on {warmup_rows:,} of the teacher's rows",
    "student_sft": "train one student on the {labelled_rows} labels",
    "student_distilled": "train the other on {prompt_rows:,} prompts and the teacher's answers",
}
MEASURE = "write {held_out_rows} held-out programs and run their tests"

SHOWN = 6  # tasks on the page
COLUMNS = ("Model", "pass@1", "Training time")
NOTE = (
    "pass@1, higher is better: the share of tasks that the first answer passes, with Wilson's 95 % "
    "interval over tasks. It says nothing of other seeds."
)
MARKER = ".quickstart"
LOG = "quickstart.log"


@dataclass(frozen=True)
class Evaluated:
    """The results of `student-trainer evaluate` for one model."""

    pass_at_1: float
    samples: dict[str, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["teacher"], help="make data and teacher, and stop")
    parser.add_argument("--teacher_url", help="where a teacher made with --only is served already")
    arguments = parser.parse_args()
    if arguments.only and arguments.teacher_url:
        parser.error("--only teacher makes one, --teacher_url uses one: give one of them")
    for number in (signal.SIGTERM, signal.SIGHUP):  # by default they would leave the server running
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        if arguments.teacher_url is not None:  # a wrong one is refused before the first stage
            teachers_of([arguments.teacher_url])
        quickstart = Quickstart(arguments.output_dir, arguments.seed)
        if arguments.only:
            quickstart.make_teacher(again=False)
        else:
            quickstart.run(arguments.teacher_url)
        return 0
    except SparseGKDError as error:
        raise SystemExit(str(error)) from error


class Quickstart:
    """The stages of the experiment, with the time and the command of each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.study = load_study(STUDY)
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []
        self._shown = Stages(folder / LOG)

    def run(self, teacher_url: str | None) -> None:
        """Run all stages, or those of the student if ``teacher_url`` is given."""
        since = time.perf_counter()
        self._shown.expect(3 + len(MODELS))
        if teacher_url is None:
            self.make_teacher(again=True)
        else:
            self._take_teacher()
        for output in ("student_before", "student_sft"):
            self._train(output)
        with (
            self._served("teacher_sft") if teacher_url is None else nullcontext(teacher_url) as url
        ):
            self._train("student_distilled", f"--teacher_url={url}")
        evaluated = {name: self._evaluate(folder) for name, folder in MODELS.items()}
        total = time.perf_counter() - since
        self._write(evaluated, total)

    def make_teacher(self, *, again: bool) -> None:
        """Make data and teacher in an empty folder; unless ``again``, keep those made before."""
        marker = self.folder / MARKER
        if not again and marker.exists() and marker.read_text():
            print(f"{self.folder} has its teacher")
            return
        self._shown.expect(3)
        self._empty_folder()
        with self._timed("prepare"):
            prepare.prepare(self.folder, seed=self.seed)
        for output in ("teacher_raw", "teacher_sft"):
            self._train(output)
        marker.write_text(json.dumps({"seconds": self.seconds, "commands": self.commands}))

    def _take_teacher(self) -> None:
        marker = self.folder / MARKER
        if not (marker.exists() and marker.read_text()):
            raise SystemExit(
                f"--teacher_url: {self.folder} has no teacher yet; make it with --only teacher"
            )
        made = json.loads(marker.read_text())
        self.seconds, self.commands = made["seconds"], made["commands"]

    def _empty_folder(self) -> None:
        """Delete an earlier quickstart's files, and refuse a folder with any others.

        The folder itself stays, as it may be a mount.
        """
        marker = self.folder / MARKER
        self.folder.mkdir(parents=True, exist_ok=True)
        there = list(self.folder.iterdir())
        if there and not marker.exists():
            raise SystemExit(
                f"--output_dir {self.folder} holds files that are not of an earlier "
                "quickstart; give an empty or new folder"
            )
        for path in there:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        marker.touch()

    def _train(self, output: str, *more: str) -> None:
        cell = self.study.cells[CELLS[output]]
        self._run(output, [*self._argv(cell, self.folder / output), *more])

    def _argv(self, cell: Cell, output: Path) -> list[str]:
        folders = {cell: str(self.folder / folder) for folder, cell in CELLS.items()}
        by = {**folders, "data": str(self.folder), "seed": str(self.seed)}
        flags = {key: substituted(value, by) for key, value in cell.flags.items()}
        return [cell.command, *to_argv(flags), f"--output_dir={output}"]

    def _evaluate(self, model: str) -> Evaluated:
        output = self.folder / "evaluation" / model
        cell = self.study.cells[f"{CELLS[model]}.evaluate"]
        self._run(f"evaluate {model}", self._argv(cell, output))
        results = json.loads((output / "results.json").read_text())
        samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
        return Evaluated(results["pass@1"], {sample["task_id"]: sample for sample in samples})

    def _run(self, name: str, argv: list[str]) -> None:
        command = shlex.join(["student-trainer", *argv])
        self.commands.append(command)
        with self._timed(name, command):
            code = cli.main(argv)
        if code != 0:
            self._shown.show_failure()
            raise SystemExit(code)

    @contextlib.contextmanager
    def _served(self, model: str) -> Iterator[str]:
        """Yield the URL of the teacher, served by a process of its own."""
        since = time.perf_counter()
        log = self.folder / "teacher-server.log"
        print(f"\nThe teacher is served to the student by a process of its own: {log}", flush=True)
        with served(self.folder / model, to_argv(self.study.serve), log) as (url, command):
            self.seconds["teacher server start"] = time.perf_counter() - since
            self.commands.append(command)
            print(f"$ {command} &", flush=True)
            yield url

    @contextlib.contextmanager
    def _timed(self, name: str, command: str = "") -> Iterator[None]:
        since = time.perf_counter()
        purpose = MEASURE if name.startswith("evaluate ") else PURPOSES.get(name, "")
        with self._shown.stage(name, command, purpose.format_map(vars(SETTINGS))):
            yield
        self.seconds[name] = time.perf_counter() - since

    def _write(self, evaluated: dict[str, Evaluated], total: float) -> None:
        scores = {MODELS[name]: model.pass_at_1 for name, model in evaluated.items()}
        tasks = len(next(iter(evaluated.values())).samples)
        results = {
            "pass@1": scores,
            "held_out_tasks": tasks,
            "student_updates": self._distillation()["max_steps"],
            "seed": self.seed,
            "seconds": {name: round(s, 1) for name, s in self.seconds.items()},
            "seconds_total": round(total, 1),
        }
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (self.folder / "report.html").write_text(self._report(evaluated, tasks, total))
        print(f"\npass@1 on {tasks} held-out tasks, {total:.0f} s in all")
        for name, model in evaluated.items():
            print(f"  {name:<20} {model.pass_at_1:.3f}")
        print(f"Report: {self.folder / 'report.html'}")
        print("Next, with the same models; the first command in a terminal of its own:")
        print(f"  teacher-server serve {self.folder / 'teacher_sft'}")
        print(
            f"  student-trainer distill --model_name_or_path {self.folder / 'student_before'} "
            f"--teacher_url http://localhost:8000 --dataset_name {self.folder / 'prompts.jsonl'} "
            f"--lmbda 1 --max_new_tokens 40 --max_steps 20 --output_dir {self.folder / 'again'}"
        )

    def _distillation(self) -> Mapping[str, Any]:
        return self.study.cells[CELLS["student_distilled"]].flags

    def _report(self, evaluated: dict[str, Evaluated], tasks: int, total: float) -> str:
        folders = [self.folder / MODELS[name] for name in STUDENTS]
        sft, distilled = find_runs(folders).training
        flags = self._distillation()
        rows = [
            (
                name,
                Range(model.pass_at_1, *wilson_interval(model.pass_at_1, tasks)),
                f"{self.seconds.get(MODELS[name], 0.0):.0f} s",
            )
            for name, model in evaluated.items()
        ]
        best = len(rows) - 1
        colours = [STUDENTS.get(name) for name in evaluated]
        return render(
            Report(
                title="mini-HumanEval: a served teacher distils a student",
                lead=[
                    "A small student learned to write Python functions: once by SFT on "
                    f"{SETTINGS.labelled_rows} labels, of which some are wrong, and once by "
                    "on-policy GKD from a teacher that was trained on the same labels and served "
                    "by another process. Both students had "
                    f"{flags['max_steps']} updates of {flags['per_device_train_batch_size']} "
                    f"sequences. Seed {self.seed}, {total:.0f} s in all.",
                    f"Look first at pass@1 on {tasks} held-out tasks: the distilled student should "
                    "come close to its teacher. Then at the curves, and at the samples.",
                ],
                tables={"": Table(COLUMNS, rows, best, colours, NOTE)},
                charts=charts_of([sft, distilled]),
                seconds={
                    "whole run": self._stages(),
                    distilled.name: distilled.seconds(),
                },
                numbers={"whole run": len(STUDENTS), distilled.name: 1},
                samples=[self._samples(evaluated)],
                commands=self.commands,
            )
        )

    def _stages(self) -> dict[str, float]:
        """Return the seconds by kind of work, in the order of the run."""
        kinds = {
            "teacher_raw": "teacher's pretraining and SFT",
            "teacher_sft": "teacher's pretraining and SFT",
            "student_before": "student's warm-up",
            "student_sft": "student's SFT",
            "student_distilled": "student's distillation",
        }
        stages: dict[str, float] = {}
        for name, seconds in self.seconds.items():
            kind = "evaluation" if name.startswith("evaluate ") else kinds.get(name, name)
            stages[kind] = stages.get(kind, 0.0) + seconds
        return stages

    def _samples(self, evaluated: dict[str, Evaluated]) -> Samples:
        """Return a few tasks, evenly spaced, with what each model wrote."""
        lines = (self.folder / "held_out.jsonl").read_text().splitlines()
        rows = {row["task_id"]: row for row in map(json.loads, lines)}
        chosen = evenly(list(rows), SHOWN)
        verdicts = {
            name: {task: bool(model.samples[task]["passed"]) for task in rows}
            for name, model in evaluated.items()
        }
        cards = [
            SideBySide(
                prompt=rows[task]["messages"][0]["content"],
                reference=rows[task]["messages"][-1]["content"],
                completions={
                    name: (model.samples[task]["completion"], model.samples[task]["passed"])
                    for name, model in evaluated.items()
                },
                numbers=STUDENTS,
            )
            for task in chosen
        ]
        return Samples("Completions side by side", how_chosen(chosen, verdicts), cards)


if __name__ == "__main__":
    sys.exit(main())
