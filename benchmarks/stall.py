"""The share of a step in which the trainer waits for the teacher, and the least of any schedule.

Trainer, pipeline, client, wire and msgpack are the real ones. Both models are imitated: generating
a group, training a micro-batch and scoring a token take set times, in which the processor is free,
as with models on GPUs; so what is measured is the schedule. The teacher is a process of its own
behind 20 ms of round trip and 1 Gbit/s (`benchmarks.link`).

    python -m benchmarks.stall --quick
    python -m benchmarks.stall [--scaling]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Cell, Worker, argument_parser, print_report
from benchmarks.link import link
from shared.sampling import uniforms
from student_trainer.config.training_arguments import CommonTrainingArguments
from student_trainer.training.plan import TrainingPlan

ROUND_TRIP, BITS_PER_SECOND = 0.02, 1e9
PROMPT, COMPLETION, TOP_K, VOCAB_SIZE = 32, 128, 64, 260
PROMPTS, MICRO_BATCHES = 32, 8  # of a step and process
GENERATING = TRAINING = 0.5  # seconds of a step with PROMPTS prompts
WARM_UP, STEPS, QUICK_STEPS = 3, 10, 3
NOTES = (
    f"{PROMPTS} prompts a step, completions of {COMPLETION} tokens, k {TOP_K}; generated in "
    f"{MICRO_BATCHES} groups and trained in {MICRO_BATCHES} micro-batches; {GENERATING} s of "
    f"generating and {TRAINING} s of training a step, imitated by sleeping.",
    "pace: tokens a second that the teacher scores, over those that the trainer should make and "
    "learn; on a busy machine the trainer is slower than that, and waits less.",
    "bound: of the trainer as measured. Staleness 0: the chain from the first group generated to "
    "the last micro-batch trained; staleness 1: the slower of teacher and trainer.",
)


@dataclass(frozen=True)
class Run:
    """A training run: teachers, sizes, and where its log goes."""

    urls: list[str]
    staleness: int
    prompts: int = PROMPTS  # of a step and process
    output: str = ""  # file for the log
    steps: int = STEPS  # that are measured


# The processes: a teacher, and a trainer.


def serve(parent: Connection, seconds_per_token: float) -> None:
    """Hold a teacher behind the wire, in a child, and send its address."""
    from shared.protocol import ScoreSequence
    from tests.support import stub
    from tests.support.paced import PacedTeacher, scores_of

    ids = np.arange(PROMPT + 2, dtype=np.uint32)
    scores_of(ScoreSequence(token_ids=ids, completion_start=PROMPT), VOCAB_SIZE, TOP_K)  # is ready
    info = stub.info(vocab_size=VOCAB_SIZE, max_model_len=1024)
    teacher = PacedTeacher(info, lambda tokens: tokens * seconds_per_token)
    wire = {"round_trip": ROUND_TRIP, "bits_per_second": BITS_PER_SECOND}
    with stub.serving(teacher) as near, link(near, **wire) as far:
        parent.send(far)
        parent.recv()  # until the benchmark ends


def train(run: Run) -> None:
    """Run the real trainer; its log goes to ``run.output``."""
    import torch
    from transformers import AutoModelForCausalLM

    from student_trainer.data.sample import Example
    from student_trainer.losses import Divergence
    from student_trainer.pipeline.method import DistillationConfig
    from student_trainer.rollouts import Rollout
    from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
    from student_trainer.training.trainer import DistillationTrainer
    from tests.support.models import save_model, save_tokenizer

    share = run.prompts / PROMPTS

    class PacedRollouts:
        """An engine that makes random completions, a group at a time."""

        elsewhere = False

        def sync(self, weight_version: int) -> None:
            pass

        def generate(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Rollout]]]:
            groups = np.array_split(np.arange(len(requests)), MICRO_BATCHES)
            for group in groups:
                time.sleep(share * GENERATING / MICRO_BATCHES)
                yield [(int(i), Rollout(completion(requests[i].key), False)) for i in group]

    def completion(key: tuple[int | str, ...]) -> Any:
        return (uniforms(*key, count=COMPLETION) * VOCAB_SIZE).astype(np.uint32)

    class PacedTrainer(DistillationTrainer):
        """A trainer whose micro-batches take their time from when their scores are there."""

        def _scored(self, *arguments: Any, **options: Any) -> Any:
            scored = super()._scored(*arguments, **options)
            self.scored = time.perf_counter()
            return scored

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **options)
            done = self.scored + share * TRAINING / MICRO_BATCHES
            time.sleep(max(0.0, done - time.perf_counter()))
            return loss

    rng = np.random.default_rng(0)
    rows = [
        Example(i, f"row {i}", rng.integers(4, 200, PROMPT).astype(np.uint32), None, None, "")
        for i in range(4 * run.prompts)
    ]
    method = DistillationConfig(
        lmbda=1.0, seq_kd=False, seq_kd_temperature=0.0, divergence=Divergence(), top_k=TOP_K,
        max_new_tokens=COMPLETION, seed=0, stop_ids=(1,),
    )  # fmt: skip
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        SparseGkdTeacher(run.urls, logprob_dtype="float16") as teacher,
    ):
        teacher.connect()
        tokenizer = save_tokenizer(Path(folder))
        save_model(Path(folder), hidden_size=16)
        trainer = PacedTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            TrainingPlan(method, VOCAB_SIZE, staleness=run.staleness),
            teacher=teacher,
            args=CommonTrainingArguments(
                output_dir=folder, max_steps=WARM_UP + run.steps + run.staleness,
                logging_steps=1, report_to="none",
                per_device_train_batch_size=run.prompts // MICRO_BATCHES, save_strategy="no",
                gradient_accumulation_steps=MICRO_BATCHES, disable_tqdm=True, use_cpu=True,
                ddp_find_unused_parameters=False, remove_unused_columns=False,
            ),
            train_dataset=rows, processing_class=tokenizer,
        )  # fmt: skip
        trainer.pipeline.rollouts = PacedRollouts()
        trainer.train()
        if trainer.is_world_process_zero():
            Path(run.output).write_text(json.dumps(trainer.state.log_history))


# The measurement.


@dataclass(frozen=True)
class Figures:
    """The means over a run's steps."""

    step: float
    waiting: float
    generating: float
    tokens_per_second: float  # learned, by all processes

    @property
    def stall(self) -> float:
        return self.waiting / self.step


def measure(
    *,
    staleness: int,
    pace: float,
    prompts: int = PROMPTS,
    replicas: int = 1,
    processes: int = 1,
    steps: int = STEPS,
) -> Figures:
    """Train against ``replicas`` teachers that together keep ``pace`` with one process."""
    made = PROMPTS * (PROMPT + COMPLETION) / (GENERATING + TRAINING)  # tokens a second
    with contextlib.ExitStack() as stack:
        teachers = [
            stack.enter_context(Worker(serve, replicas / (pace * made))) for _ in range(replicas)
        ]
        urls = [teacher.receive() for teacher in teachers]
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        run = Run(urls, staleness, prompts, f"{folder}/log.json", steps)
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                        "-m"]  # fmt: skip
        command += ["benchmarks.stall", "--train", json.dumps(asdict(run))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        log = json.loads(Path(run.output).read_text())
    # The last steps have nothing left to generate ahead.
    measured = [entry for entry in log if "time/step" in entry][WARM_UP : WARM_UP + steps]
    step, waiting, generating = (
        float(np.mean([entry[f"time/{name}"] for entry in measured]))
        for name in ("step", "teacher", "generating")
    )
    return Figures(step, waiting, generating, processes * prompts * COMPLETION / step)


def best_stall(found: Figures, *, staleness: int, scoring: float) -> float:
    """Return the least share of waiting in any schedule of the same work, at the speeds measured.

    Args:
        scoring: seconds that the teacher takes for a step.
    """
    working = found.step - found.waiting
    if staleness:
        return 1 - working / max(working, scoring)
    # Group i is generated and scored; micro-batch i is trained after all are generated.
    group = 1 / MICRO_BATCHES
    training = working - found.generating
    scored = trained = 0.0
    for number in range(MICRO_BATCHES):
        sent = (number + 1) * group * found.generating + ROUND_TRIP / 2
        scored = max(scored, sent) + group * scoring
        trained = max(trained, found.generating, scored + ROUND_TRIP / 2) + group * training
    return 1 - working / trained


def report(*, quick: bool, scaling: bool) -> None:
    """Measure all cases and print them."""
    rows: list[list[Cell]] = []
    figures: dict[str, float] = {}
    for pace in (1.0,) if quick else (0.5, 1.0, 2.0):
        for staleness in (0, 1):
            found = measure(staleness=staleness, pace=pace, steps=QUICK_STEPS if quick else STEPS)
            scoring = (GENERATING + TRAINING) / pace
            bound = best_stall(found, staleness=staleness, scoring=scoring)
            rows.append(
                [f"staleness {staleness}, pace {pace:g}", found.step - found.waiting, scoring,
                 found.step, found.stall, bound]
            )  # fmt: skip
            name = f"stall_staleness_{staleness}"
            if pace != 1.0:
                name += f"_pace_{pace:g}"
            figures[name] = round(found.stall, 4)
            figures[f"best_{name}"] = round(bound, 4)
    if scaling:
        for processes, replicas, more in (
            (1, 1, 1), (1, 1, 4), (1, 1, 16), (1, 2, 4), (2, 1, 4), (2, 2, 4),
        ):  # fmt: skip
            found = measure(
                staleness=1, pace=replicas, prompts=PROMPTS * more // 4, replicas=replicas,
                processes=processes,
            )  # fmt: skip
            what = f"{processes} x {PROMPTS * more // 4} prompts, {replicas} replicas"
            working = found.step - found.waiting
            rows.append([f"staleness 1, {what}", working, "-", found.step, found.stall, "-"])
            name = f"tokens_per_second_p{processes}_r{replicas}_x{more}"
            figures[name] = round(found.tokens_per_second, 1)
    columns = ["run", "trainer s", "teacher s", "step s", "stall", "bound"]
    print_report("Waiting for the teacher", columns, rows, figures, notes=NOTES)


def main() -> None:
    parser = argument_parser(__doc__, quick=f"pace 1 alone, {QUICK_STEPS} steps instead of {STEPS}")
    parser.add_argument("--scaling", action="store_true", help="replicas, processes, prompts too")
    # torchrun starts the trainers from a command line.
    parser.add_argument("--train", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is not None:
        train(Run(**json.loads(given.train)))
    else:
        report(quick=given.quick, scaling=given.scaling)


if __name__ == "__main__":
    main()
