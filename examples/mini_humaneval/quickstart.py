"""The whole story in one command: a served teacher distils a student over HTTP.

    python -m examples.mini_humaneval.quickstart --output_dir runs/quickstart

makes tokenizer, models and data; pretrains a teacher and fine-tunes it on the few labels; trains
one student by SFT on the same labels, and one by distillation from the teacher, which runs as a
separate server process; evaluates all of them; and writes results.json and report.html. Every
stage is a call of the public command line, printed before it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from examples.mini_humaneval import prepare
from examples.mini_humaneval.settings import SETTINGS, Stage
from student_trainer import cli
from student_trainer.report import Chart, Report, SideBySide, Table, render

MODELS = {
    "Teacher, raw": "teacher_raw",
    "Teacher after SFT": "teacher_sft",
    "Student before": "student_before",
    "Student, SFT": "student_sft",
    "Student, distilled": "student_distilled",
}


MARKER = ".quickstart"


@dataclass(frozen=True)
class Evaluated:
    """What `student-trainer evaluate` wrote about one model."""

    pass_at_1: float
    samples: dict[str, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # else they would end us and leave the server
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    return Quickstart(arguments.output_dir, arguments.seed).run()


class Quickstart:
    """Runs the stages in order, keeping the time and the command of each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []

    def run(self) -> int:
        since = time.perf_counter()
        self._empty_folder()
        with self._timed("prepare"):
            prepare.prepare(self.folder, seed=self.seed)
        self._sft("teacher_raw", "teacher_init", "teacher_pretrain", SETTINGS.teacher_pretrain)
        self._sft("teacher_sft", "teacher_raw", "labelled", SETTINGS.teacher_sft)
        self._sft("student_before", "student_init", "student_warmup", SETTINGS.student_warmup)
        self._sft("student_sft", "student_before", "labelled", SETTINGS.student_sft)
        with self._served("teacher_sft") as url:
            self._distill("student_distilled", "student_before", url, SETTINGS.student_distill)
        evaluated = {name: self._evaluate(folder) for name, folder in MODELS.items()}
        total = time.perf_counter() - since
        self._write(evaluated, total)
        return 0

    def _empty_folder(self) -> None:
        """Begin anew, but never at the cost of files that are not ours."""
        marker = self.folder / MARKER
        if self.folder.exists() and any(self.folder.iterdir()):
            if not marker.exists():
                raise SystemExit(
                    f"--output_dir {self.folder} holds files that are not of an earlier "
                    "quickstart; give an empty or new folder"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.touch()

    def _sft(self, output: str, model: str, data: str, stage: Stage) -> None:
        self._trainer("sft", output, model, data, stage, [])

    def _distill(self, output: str, model: str, url: str, stage: Stage) -> None:
        method = [
            f"--teacher_url={url}",
            f"--lmbda={SETTINGS.lmbda}",
            f"--beta={SETTINGS.beta}",
            f"--temperature={SETTINGS.temperature}",
            f"--rollout_temperature={SETTINGS.rollout_temperature}",
            f"--top_k_logprobs={SETTINGS.top_k_logprobs}",
            f"--max_new_tokens={SETTINGS.max_new_tokens}",
        ]
        self._trainer("distill", output, model, "prompts", stage, method)

    def _trainer(
        self, command: str, output: str, model: str, data: str, stage: Stage, more: list[str]
    ) -> None:
        self._run(
            output,
            [
                command,
                f"--model_name_or_path={self.folder / model}",
                f"--dataset_name={self.folder / f'{data}.jsonl'}",
                f"--output_dir={self.folder / output}",
                f"--max_steps={stage.updates}",
                f"--per_device_train_batch_size={stage.batch_size}",
                f"--learning_rate={stage.learning_rate}",
                f"--weight_decay={stage.weight_decay}",
                f"--lr_scheduler_type={stage.lr_scheduler_type}",
                f"--warmup_steps={stage.warmup_steps}",
                f"--seed={self.seed}",
                f"--logging_steps={max(stage.updates // 40, 1)}",
                "--save_strategy=no",
                "--report_to=none",
                *more,
            ],
        )

    def _evaluate(self, model: str) -> Evaluated:
        output = self.folder / "evaluation" / model
        self._run(
            f"evaluate {model}",
            [
                "evaluate",
                f"--model_name_or_path={self.folder / model}",
                f"--dataset_name={self.folder / 'held_out.jsonl'}",
                f"--max_new_tokens={SETTINGS.max_new_tokens}",
                f"--generation_batch_size={SETTINGS.evaluation_batch_size}",
                f"--output_dir={output}",
            ],
        )
        results = json.loads((output / "results.json").read_text())
        samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
        return Evaluated(results["pass@1"], {sample["task_id"]: sample for sample in samples})

    def _run(self, name: str, words: list[str]) -> None:
        command = shlex.join(["student-trainer", *words])
        self.commands.append(command)
        print(f"\n$ {command}", flush=True)
        with self._timed(name):
            code = cli.main(words)
        if code != 0:
            raise SystemExit(code)

    @contextlib.contextmanager
    def _served(self, model: str) -> Iterator[str]:
        """The teacher in its own process on a free port; stopped whatever happens."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["serve", str(self.folder / model), "--port", str(port), "--backend=transformers"]
        self.commands.append(shlex.join(["teacher-server", *words]))
        print(f"\n$ {self.commands[-1]} &", flush=True)
        log = (self.folder / "teacher-server.log").open("w")
        server = subprocess.Popen(
            [sys.executable, "-m", "teacher_server", *words], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            with self._timed("teacher server start"):
                url = f"http://127.0.0.1:{port}"
                _wait_until_ready(server, url, Path(log.name))
            yield url
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            log.close()

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - since

    def _write(self, evaluated: dict[str, Evaluated], total: float) -> None:
        scores = {MODELS[name]: model.pass_at_1 for name, model in evaluated.items()}
        tasks = len(next(iter(evaluated.values())).samples)
        results = {
            "pass@1": scores,
            "held_out_tasks": tasks,
            "student_updates": SETTINGS.student_distill.updates,
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

    def _report(self, evaluated: dict[str, Evaluated], tasks: int, total: float) -> str:
        sft = _history(self.folder / MODELS["Student, SFT"])
        distilled = _history(self.folder / MODELS["Student, distilled"])
        steps = SETTINGS.student_distill.updates
        rows = [
            (name, f"{model.pass_at_1:.3f}", f"{self.seconds.get(MODELS[name], 0.0):.0f} s")
            for name, model in evaluated.items()
        ]
        return render(
            Report(
                title="mini-HumanEval: a served teacher distils a student",
                lead=f"pass@1 on {tasks} held-out compositions; both students had {steps} updates "
                f"of {SETTINGS.student_distill.batch_size} sequences. Seed {self.seed}, "
                f"{total:.0f} s in all.",
                table=Table(("Model", "pass@1", "Training time"), rows, best=len(rows) - 1),
                charts=[
                    # Two quantities: one scale would invite a comparison that means nothing.
                    Chart("SFT: cross-entropy", "nats per token", {"SFT": _points(sft, "loss")}),
                    Chart(
                        "Distillation: JSD",
                        "nats per token",
                        {"distilled": _points(distilled, "divergence")},
                    ),
                    Chart(
                        "Mass on the teacher's top-k",
                        "probability",
                        {
                            "teacher": _points(distilled, "teacher_top_k_mass"),
                            "student": _points(distilled, "student_top_k_mass"),
                        },
                    ),
                    Chart(
                        "Entropy over top-k and tail",
                        "nats",
                        {
                            "teacher": _points(distilled, "teacher_entropy"),
                            "student": _points(distilled, "student_entropy"),
                        },
                    ),
                    Chart(
                        "Completion length",
                        "tokens",
                        {"distilled": _points(distilled, "completion_length")},
                    ),
                ],
                seconds={
                    "whole run": self._stages(),
                    "distillation": _where(distilled),
                },
                samples=self._samples(evaluated),
                commands=self.commands,
            )
        )

    def _stages(self) -> dict[str, float]:
        """Seconds by kind of work, in the order of the run."""
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

    def _samples(self, evaluated: dict[str, Evaluated]) -> list[SideBySide]:
        """A few tasks on which the models differ, else the first ones."""
        rows = [
            json.loads(line) for line in (self.folder / "held_out.jsonl").read_text().splitlines()
        ]
        models = list(evaluated.values())

        def verdicts(row: dict[str, Any]) -> int:
            return len({m.samples[row["task_id"]]["passed"] for m in models})

        return [
            SideBySide(
                prompt=row["messages"][0]["content"],
                reference=row["messages"][-1]["content"],
                completions={
                    name: (
                        model.samples[row["task_id"]]["completion"],
                        model.samples[row["task_id"]]["passed"],
                    )
                    for name, model in evaluated.items()
                },
            )
            for row in sorted(rows, key=verdicts, reverse=True)[:6]
        ]


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit(
                f"the teacher server ended with {server.returncode}:\n{log.read_text()}"
            )
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == 200:
                return
        time.sleep(0.2)


def _history(folder: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((folder / "trainer_state.json").read_text())[
        "log_history"
    ]
    return history


def _points(history: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(entry["step"]), float(entry[name])) for entry in history if name in entry]


def _where(history: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the distillation by what they went into; logged as means over a window."""
    parts = {
        "waiting for the teacher": ["seconds_teacher"],
        "generating": ["seconds_generating"],
        "training": ["seconds_forward_backward", "seconds_optimizer"],
    }
    totals = dict.fromkeys(parts, 0.0)
    last = 0.0
    for entry in history:
        if "seconds_teacher" not in entry:
            continue
        window, last = entry["step"] - last, entry["step"]
        for part, names in parts.items():
            totals[part] += sum(entry[name] for name in names) * window
    return totals


if __name__ == "__main__":
    sys.exit(main())
