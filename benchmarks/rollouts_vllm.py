"""A benchmark of vLLM as the student's rollout engine: speed, new weights, and waiting for it.

    python -m benchmarks.rollouts_vllm --quick

The model and the completions are those of `benchmarks.rollouts`, on the CPU. The student's own
engine, a vLLM engine beside the trainer and a vLLM server take turns.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import (
    Cell,
    Figure,
    argument_parser,
    format_table,
    print_report,
    set_threads,
)
from benchmarks.rollouts import MOST, Engine, measure, own_engines, random_model, speed_rows
from shared.sparse import SparseLogprobs
from student_trainer.config.training_arguments import CommonTrainingArguments
from student_trainer.data.sample import Example
from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.rollouts import RolloutServers, ServerOptions, VllmEngine
from student_trainer.rollouts.weights import StudentWeights
from student_trainer.training.plan import TrainingPlan
from student_trainer.training.trainer import DistillationTrainer
from tests.support.models import save_tokenizer
from tests.support.server import free_port, running_rollout_server

LONGEST = 256  # tokens of prompt and completion
ROUNDS = 3  # transfers that are timed
MICRO_BATCHES, MICRO_BATCH = 2, 8
WARM_UP, STEPS = 2, 6
STALENESS = (0, 1, 2)
NOTES = (
    "vLLM beside the trainer and as a server, float32, eager. New weights: seconds of a sync, with "
    "its probe of log-probs, and the bytes that are sent.",
    f"Waiting: share of a step in which the trainer waits for completions, {MICRO_BATCHES} x "
    f"{MICRO_BATCH} prompts a step, with a server. The training of a step is made as long as the "
    "server needs to write its completions, by sleeping after it.",
)


@contextlib.contextmanager
def vllm_server(model: Any) -> Iterator[str]:
    """Yield the address of a stock vLLM server of the model, which takes weights over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_tokenizer(Path(folder))
        port = free_port()
        with running_rollout_server(Path(folder), port=port, log=Path(folder, "log")):
            yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def opened(model: Any, url: str) -> Iterator[dict[str, VllmEngine | RolloutServers]]:
    """Yield the engine beside the trainer and the one that the server is, by name."""
    with (
        VllmEngine(model, max_model_len=LONGEST, dtype="float32") as beside,
        servers(model, url) as server,
    ):
        yield {"vLLM beside": beside, "vLLM server": server}


def servers(model: Any, url: str) -> RolloutServers:
    """Return the rollout servers of one address."""
    return RolloutServers(model, ServerOptions((url,), "gloo"), dtype="float32", longest=LONGEST)


def seconds_of_new_weights(engine: VllmEngine | RolloutServers) -> float:
    """Return the median time of a sync, of an engine that has had one."""
    seconds = []
    for version in range(1, ROUNDS + 1):
        since = time.perf_counter()
        engine.sync(version)
        seconds.append(time.perf_counter() - since)
    return float(np.median(seconds))


def bytes_of_weights(model: Any) -> int:
    """Return the bytes that a sync sends in float32."""
    return sum(w.numel() * w.element_size() for _, w in StudentWeights(model, torch.float32))


class InstantTeacher:
    """A teacher in this process that answers every position with the same four ids, at once."""

    def __init__(self) -> None:
        self.live = self

    def submit(self, call: Any, *arguments: Any, **options: Any) -> Future[Any]:
        """Return the finished answer."""
        future: Future[Any] = Future()
        future.set_result(call(*arguments, **options))
        return future

    def score(self, sequences: Any, options: Any, *, requested: Any) -> list[SparseLogprobs]:
        """Return log-probs of four ids, of the next token and of the tail."""
        return [_flat(len(ids) - start) for ids, start in sequences]

    def take_traffic(self) -> tuple[int, int]:
        """Return nothing received."""
        return 0, 0

    def take_lookups(self) -> tuple[int, int, int]:
        """Return no lookups."""
        return 0, 0, 0


def _flat(rows: int) -> SparseLogprobs:
    return SparseLogprobs(
        token_ids=np.tile(np.arange(4, dtype=np.uint32), (rows, 1)),
        logprobs=np.full((rows, 4), np.log(0.2), np.float32),
        next_token_logprob=np.full(rows, np.log(0.1), np.float32),
        tail_logprob=np.full(rows, np.log(0.1), np.float32),
    )


@dataclass(frozen=True)
class Step:
    """The seconds of a training step, and those in which the trainer waited for completions."""

    seconds: float
    waiting: float

    @property
    def stall(self) -> float:
        return self.waiting / self.seconds


def train(model: Any, url: str, stop_ids: Sequence[int], *, staleness: int, working: float) -> Step:
    """Train with the server; each step's own work takes ``working`` seconds."""

    class PacedTrainer(DistillationTrainer):
        """A trainer whose micro-batches take their time."""

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            done = time.perf_counter() + working / MICRO_BATCHES
            loss = super().training_step(*arguments, **options)
            time.sleep(max(0.0, done - time.perf_counter()))
            return loss

    vocab_size = model.config.vocab_size
    rng = np.random.default_rng(0)
    rows = [
        Example(i, f"row {i}", rng.integers(4, 200, rng.integers(8, 65)).astype(np.uint32), None,
                None, "")
        for i in range(MICRO_BATCH * MICRO_BATCHES)
    ]  # fmt: skip
    method = DistillationConfig(
        lmbda=1.0, seq_kd=False, seq_kd_temperature=0.0, divergence=Divergence(), top_k=4,
        max_new_tokens=MOST, seed=0, stop_ids=tuple(stop_ids),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, servers(model, url) as engine:
        teacher: Any = InstantTeacher()
        trainer = PacedTrainer(
            model,
            TrainingPlan(method, vocab_size, staleness=staleness),
            teacher=teacher,
            engine=engine,
            args=CommonTrainingArguments(
                output_dir=folder, max_steps=WARM_UP + STEPS + staleness, logging_steps=1,
                report_to="none", per_device_train_batch_size=MICRO_BATCH, save_strategy="no",
                gradient_accumulation_steps=MICRO_BATCHES, disable_tqdm=True, use_cpu=True,
                remove_unused_columns=False, learning_rate=0.0,
            ),
            train_dataset=rows,
            processing_class=save_tokenizer(Path(folder)),
        )  # fmt: skip
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "time/step" in entry]
    measured = log[WARM_UP : WARM_UP + STEPS]  # the last steps have nothing left to write ahead
    seconds, waiting = (
        float(np.mean([entry[f"time/{name}"] for entry in measured]))
        for name in ("step", "generating")
    )
    return Step(seconds, waiting)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, quick="V = 32k and 16 prompts alone, two rounds", threads=1)
    arguments = parser.parse_args(argv)
    set_threads(arguments.threads)
    sizes = (32_000,) if arguments.quick else (32_000, 152_000)
    counts, rounds = ((16,), 2) if arguments.quick else ((16, 64), 3)
    speeds: list[list[Cell]] = []
    weights: list[list[Cell]] = []
    waiting: list[list[Cell]] = []
    figures: dict[str, Figure] = {"benchmark": "rollouts_vllm", "quick": arguments.quick}
    for vocab_size in sizes:
        model, stop_ids = random_model(vocab_size)
        case, key = f"V={vocab_size // 1000}k", f"v{vocab_size // 1000}k"
        own = {"student": own_engines(model, stop_ids)["rollouts"]}
        with vllm_server(model) as url:
            with opened(model, url) as found:
                engines = own | {n: _writer(one, stop_ids, vocab_size) for n, one in found.items()}
                for count in counts:
                    measured = measure(engines, vocab_size, count, rounds)
                    base = measured["student"].speed
                    speeds += speed_rows(f"{case}, {count} prompts", measured, base)
                    for name, one in measured.items():
                        figures[f"tokens_per_second_{_key(name)}_{key}_{count}"] = round(one.speed)
                megabytes = bytes_of_weights(model) / 1e6
                for name, engine in found.items():
                    seconds = seconds_of_new_weights(engine)
                    weights.append([f"{case}: {name}", round(megabytes), seconds])
                    figures[f"seconds_of_new_weights_{_key(name)}_{key}"] = round(seconds, 3)
                figures[f"megabytes_of_weights_{key}"] = round(megabytes, 1)
            writing = train(model, url, stop_ids, staleness=0, working=0.0).waiting
            for staleness in STALENESS:
                step = train(model, url, stop_ids, staleness=staleness, working=writing)
                name = f"{case}, staleness {staleness}"
                waiting.append([name, step.seconds, step.waiting, step.stall])
                figures[f"stall_{key}_staleness_{staleness}"] = round(step.stall, 3)
    print(f"New weights\n\n{format_table(['engine', 'MB', 's'], weights)}\n")
    columns = ["server", "step, s", "waiting, s", "stall"]
    print(f"Waiting for completions\n\n{format_table(columns, waiting)}\n")
    print_report(
        "Completion tokens per second", ["case", "tokens/s", "× student", "half, s"], speeds,
        figures, notes=NOTES,
    )  # fmt: skip


def _writer(
    engine: VllmEngine | RolloutServers, stop_ids: Sequence[int], vocab_size: int
) -> Engine:
    """Return what generates with the student's weights."""
    writer = engine.rollouts(
        stop_ids=stop_ids, max_new_tokens=MOST, temperature=1.0, vocab_size=vocab_size
    )
    writer.sync(0)
    return writer.generate


def _key(name: str) -> str:
    return name.lower().replace(" ", "_")


if __name__ == "__main__":
    main()
