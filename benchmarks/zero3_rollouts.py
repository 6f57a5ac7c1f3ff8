"""A step of a student that ZeRO-3 shards, whose completions it writes itself or a server does.

A sharded student gathers all of its weights for each token. A server, a stock vLLM, has them whole
and gets new ones once a step. Both runs learn the same rows, on two ranks of this machine's CPUs.

    python -m benchmarks.zero3_rollouts --quick

It needs DeepSpeed and vLLM. DeepSpeed compiles an operator the first time, for minutes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Cell, argument_parser, print_report
from tests.support.models import save_model, save_tokenizer
from tests.support.server import free_port, running_rollout_server, running_server
from tests.support.world import World, make_world

LAYERS, HIDDEN, MOST = 8, 256, 48
WARM_UP, STEPS = 2, 6
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip
COLUMNS = ("completions by", "step, s", "generating, s", "new weights, s")
NOTES = (
    f"A random Llama of {LAYERS} layers, d = {HIDDEN}, float32; 2 ranks of 4 prompts, up to {MOST} "
    "tokens a completion, every step on-policy. Medians; generating includes new weights.",
)


@dataclass(frozen=True)
class Run:
    """Median seconds of a step, of its completions, and of the weights that they need."""

    step: float
    generating: float
    syncing: float


def train(world: World, url: str, student: Path, output: Path, steps: int, *flags: str) -> Run:
    """Train on two ranks, and return the times of the steps after the warm-up.

    Raises:
        CalledProcessError: a rank failed.
    """
    settings = output.with_suffix(".json")
    settings.write_text(json.dumps(ZERO3))
    options = {
        "model_name_or_path": student, "teacher_url": url, "dataset_name": world.rows,
        "output_dir": output, "deepspeed": settings, "lmbda": 1, "max_new_tokens": MOST,
        "per_device_train_batch_size": 4, "max_steps": WARM_UP + steps, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": "true", "top_k_logprobs": 16,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    subprocess.run(
        [sys.executable, *launch, "-m", "student_trainer", "distill", *words, *flags],
        check=True, stdout=sys.stderr,
    )  # fmt: skip
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    windows = [entry for entry in history if "time/step" in entry][WARM_UP:]
    step, generating, syncing = (
        statistics.median(entry.get(f"time/{name}", 0.0) for entry in windows)
        for name in ("step", "generating", "syncing")
    )
    return Run(step, generating + syncing, syncing)


def measure(folder: Path, steps: int) -> tuple[Run, Run]:
    """Return the run of a student that writes itself, and that of one whose server does."""
    world, student = make_world(folder / "world"), folder / "student"
    save_tokenizer(student)
    shape: dict[str, Any] = {"intermediate_size": 4 * HIDDEN, "num_hidden_layers": LAYERS}
    save_model(student, hidden_size=HIDDEN, **shape)
    port = free_port()
    log = folder / "server.log"
    with (
        running_server(world.teacher, "--backend", "transformers") as url,
        running_rollout_server(student, port=port, log=log),
    ):
        own = train(world, url, student, folder / "itself", steps)
        rollout = f"--rollout_url=http://127.0.0.1:{port}"
        return own, train(world, url, student, folder / "server", steps, rollout)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__, quick="two steps")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        own, server = measure(Path(folder), 2 if options.quick else STEPS)
    rows: list[list[Cell]] = [
        [name, run.step, run.generating, run.syncing]
        for name, run in (("the student, sharded", own), ("a server", server))
    ]
    figures = {
        "benchmark": "zero3_rollouts", "quick": options.quick,
        "seconds_itself": round(own.step, 3), "seconds_server": round(server.step, 3),
        "generating_itself": round(own.generating, 3),
        "generating_server": round(server.generating, 3),
        "syncing_server": round(server.syncing, 3), "ratio": round(own.step / server.step, 2),
    }  # fmt: skip
    print_report("A step with ZeRO-3", COLUMNS, rows, figures, notes=NOTES)


if __name__ == "__main__":
    main()
