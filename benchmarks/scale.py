"""The best split of a budget of GPUs between teacher, rollouts and trainer, and its limits.

A calculation on paper: a 7B student learns from a 33B teacher, on 8 to 1,024 H200. What GPUs and
network do is taken from data sheets and from the assumptions that the second table lists. What the
trainer's own process spends on HTTP is measured here, with servers that answer at once.

    python -m benchmarks.scale --quick
    python -m benchmarks.scale [--costs runs/gpu-check.json] [--output docs/results/scale.json]
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.gpu_parts.roofline import card_named
from benchmarks.harness import Cell, Figure, Worker, argument_parser, format_table, print_report
from benchmarks.scale_model import (
    COSTS,
    SOURCES,
    WORKLOAD,
    Costs,
    Workload,
    best_split,
    gains,
    ideal_gpu_seconds,
    step_of,
)

BUDGETS = (8, 16, 32, 64, 128, 256, 512, 1024)
A_GPU = 32  # completions of a step for each GPU, where the batch grows with the budget
TOP_K, VOCAB_SIZE, PROMPT, LENGTHS = 64, 1000, 512, (64, 512)
LIMIT = 0.1  # of a step, from which on a thing is called a limit
NOTES = (
    "On paper, but for the client's costs: see the assumptions above.",
    "waiting: for completions and scores that training does not hide. Efficiency: the step in "
    "which all GPUs work all the time, over this one.",
    f"limit: what would shorten the step most if it were free, by at least {LIMIT:.0%}.",
)


@dataclass(frozen=True)
class Point:
    """The best split of a budget.

    Attributes:
        batch: "fixed" or "growing" with the budget.
        limit: what gains most if it is free, or "none".
        gain: share of the step that it gains.
    """

    batch: str
    gpus: int
    completions: int
    teacher: int
    rollout: int
    trainer: int
    seconds: float
    parts: dict[str, float]
    efficiency: float
    limit: str
    gain: float


def point(batch: str, work: Workload, costs: Costs, gpus: int) -> Point:
    """Return the best split of a budget, and what limits it."""
    split = best_split(work, costs, gpus)
    step = step_of(work, costs, split)
    gained = gains(work, costs, gpus)
    name = max(gained, key=lambda one: gained[one])
    return Point(
        batch, gpus, work.completions, split.teacher, split.rollout, split.trainer, step.seconds,
        step.parts(), ideal_gpu_seconds(work, costs) / gpus / step.seconds,
        name if gained[name] >= LIMIT else "none", gained[name],
    )  # fmt: skip


def points(costs: Costs, budgets: Sequence[int]) -> list[Point]:
    """Return the points of a fixed batch, and of one that grows with the budget."""
    fixed = [point("fixed", WORKLOAD, costs, gpus) for gpus in budgets]
    growing = [
        point("growing", replace(WORKLOAD, completions=A_GPU * gpus), costs, gpus)
        for gpus in budgets
    ]
    return fixed + growing


def first_limit(found: Sequence[Point]) -> Point | None:
    """Return the smallest budget that something limits, or None."""
    return min((one for one in found if one.limit != "none"), key=lambda p: p.gpus, default=None)


# The client's own cost.


def serve(parent: Connection) -> None:
    """Answer as a rollout server and as a teacher, in a child, and send the address."""
    from tests.support import stub
    from tests.support.paced import PacedTeacher

    class Servers(PacedTeacher):
        def post(self, path: str, body: bytes) -> stub.Answer:
            if path != "/inference/v1/generate":
                return super().post(path, body)
            ids = list(range(json.loads(body)["sampling_params"]["max_tokens"]))
            choice = {
                "token_ids": ids, "finish_reason": "length", "weight_versions": [{"version": "1"}]
            }  # fmt: skip
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps({"choices": [choice]}).encode(),
            )

    info = stub.info(vocab_size=VOCAB_SIZE, max_model_len=4096)
    with stub.serving(Servers(info, lambda tokens: 0.0, one_at_a_time=False)) as url:
        parent.send(url)
        parent.recv()  # until the benchmark ends


def measure_client(count: int) -> dict[str, float]:
    """Return the processor seconds of this process for completions and for scores.

    The clients are the trainer's own; each completion is scored by a request of its own, as a
    rollout server hands them over one by one.
    """
    with Worker(serve) as server:
        url = server.receive()
        rollout = _rollouts(url, count)
        short, long = (_scores(url, count, length) for length in LENGTHS)
    token = max(0.0, (long - short) / (LENGTHS[1] - LENGTHS[0]))
    return {
        "client_rollout": rollout,
        "client_request": max(0.0, short - LENGTHS[0] * token),
        "client_token": token,
    }


def _rollouts(url: str, count: int) -> float:
    from student_trainer.rollouts import ServerOptions, ServerRollouts
    from student_trainer.rollouts.base import RolloutRequest

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB_SIZE))
    servers: Any = SimpleNamespace(
        model=SimpleNamespace(config=config), options=ServerOptions((url,), "nccl"), live=[url],
        label="1", adapter=None, lose=lambda url, reason: None,
    )  # fmt: skip
    engine = ServerRollouts(
        servers, stop_ids=[1], max_new_tokens=LENGTHS[1], temperature=1.0, vocab_size=VOCAB_SIZE
    )
    requests = [
        RolloutRequest(np.arange(PROMPT, dtype=np.uint32), key=(0, 0, i)) for i in range(count)
    ]
    list(engine.generate(requests[:2]))
    began = time.process_time()
    assert len(list(engine.generate(requests))) == count
    return (time.process_time() - began) / count


def _scores(url: str, count: int, length: int) -> float:
    from student_trainer.teacher.base import ScoreOptions
    from student_trainer.teacher.sparse_gkd import SparseGkdTeacher

    ids = np.arange(PROMPT + length, dtype=np.uint32) % VOCAB_SIZE
    with SparseGkdTeacher([url], logprob_dtype="float16") as teacher:
        teacher.connect()

        def ask(times: int) -> None:
            calls = [
                teacher.submit(teacher.score, [(ids, PROMPT)], ScoreOptions(top_k=TOP_K))
                for _ in range(times)
            ]
            for call in calls:
                call.result()

        ask(2)
        began = time.process_time()
        ask(count)
        return (time.process_time() - began) / count


def costs_of_gpu_check(content: dict[str, Any], costs: Costs) -> Costs:
    """Return costs with the card and the shares of its peak that `benchmarks.gpu` measured on 7B.

    Parts that are not there leave what was assumed.
    """
    card = card_named(content["machine"]["device"])
    costs = replace(costs, bandwidth=card.bandwidth, flops=card.flops)
    parts = {part["name"]: part["rows"] for part in content["parts"].values()}
    for name, field, operations in (
        ("teacher, 7B", "prefill_share", 2), ("step, 7B", "train_share", 8),
    ):  # fmt: skip
        speeds = [row["tokens/s"] for row in parts.get(name, []) if row.get("tokens/s")]
        if speeds:
            share = speeds[-1] * operations * WORKLOAD.student / card.flops
            changed: dict[str, Any] = {field: share}
            costs = replace(costs, **changed)
    return costs


def rows(found: Sequence[Point]) -> list[list[Cell]]:
    """Return the lines of the table."""
    return [
        [
            f"{one.batch}, {one.gpus} GPUs", one.completions,
            f"{one.teacher} / {one.rollout} / {one.trainer}", round(one.seconds, 1),
            round(one.parts["weights"] + one.parts["control"], 2), round(one.parts["train"], 1),
            round(one.parts["client"], 2),
            round(one.parts["rollouts"] + one.parts["teacher"], 1),
            f"{one.efficiency:.2f}", one.limit,
        ]
        for one in found
    ]  # fmt: skip


COLUMNS = (
    "batch", "completions", "teacher / rollouts / trainer", "step, s", "new weights", "train",
    "client", "waiting", "efficiency", "limit",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the client, calculate, and print both tables and one line of JSON."""
    parser = argument_parser(__doc__, quick="three budgets, and a short look at the client")
    parser.add_argument("--costs", type=Path, help="file of benchmarks.gpu, such as "
                        "runs/gpu-check.json, in place of assumptions")  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file for assumptions and points")
    arguments = parser.parse_args(argv)
    client: dict[str, Any] = measure_client(20 if arguments.quick else 300)
    costs = replace(COSTS, **client)
    if arguments.costs is not None:
        costs = costs_of_gpu_check(json.loads(arguments.costs.read_text()), costs)
    budgets = (8, 64, 512) if arguments.quick else BUDGETS
    found = points(costs, budgets)
    before = points(replace(costs, together=False), budgets)
    if arguments.output is not None:
        content = {
            "costs": asdict(costs), "sources": SOURCES, "workload": asdict(WORKLOAD),
            "points": [asdict(one) for one in found],
            "one server after another": [asdict(one) for one in before],
        }  # fmt: skip
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    assumed: list[list[Cell]] = [
        [name, f"{value:.3g}", SOURCES[name]] for name, value in asdict(costs).items()
    ]
    print(format_table(["cost", "value", "source"], assumed) + "\n")
    limit = first_limit(found)
    figures: dict[str, Figure] = {
        "benchmark": "scale",
        "first limit": None if limit is None else limit.limit,
        "first limit, GPUs": None if limit is None else limit.gpus,
        **{name: value for name, value in asdict(costs).items() if name.startswith("client")},
    }
    title = "A step of a 7B student and a 33B teacher, by budget, on paper"
    print_report(title, COLUMNS, rows(found), figures, notes=NOTES)


if __name__ == "__main__":
    main()
