"""Our trainer and its served teacher against TRL's GKDTrainer: the same work on the same two cores.

Both distil the same teacher into the same student, on the same rows, for the same number of
optimizer steps, and the same steps are on-policy. TRL is one process; ours are two, the server
included. They take turns, each with the machine to itself. The first run makes an environment for
TRL and pretrains the models, in the work folder.

    python -m benchmarks.against_trl --quick
    python -m benchmarks.against_trl --model real --pretrained MODEL --gsm8k gsm8k_train.jsonl
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
import venv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from benchmarks.harness import Cell, argument_parser, print_report, run_apart
from student_trainer.losses import Divergence, generalized_jsd
from student_trainer.pipeline.method import DistillationConfig
from tests.support.models import CHAT_TEMPLATE, save_model
from tests.support.server import free_port, wait_until_ready

Row = tuple[str, str]  # the words of a prompt and of its completion

REPOSITORY = Path(__file__).parents[1]
CORES = 2
STEP = re.compile(rb"\{'loss'|step \d+/\d+ ")  # a line that TRL's Trainer, or ours, logs of a step
PROMPT, COMPLETION = 32, 96  # words of a row, which are its tokens; generated tokens
BATCH, ACCUMULATION = 4, 2
LMBDA = 0.5
WARM_UP = 2  # optimizer steps whose time does not count
HELD_OUT = 32  # rows
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>")
SHAPES: dict[str, dict[str, int]] = {
    "teacher": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1024},
    "student": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768},
}
KNOWN_WORDS = 100  # of the synthetic language, that have successors of their own
PRETRAINING = {"teacher": 120, "student": 60}  # steps
PRETRAINING_ROWS, PRETRAINING_TARGETS = 4, 256  # of a step; targets are tokens learned from
ARGUMENTS: dict[str, Any] = {  # of both trainers, under the same names
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "lmbda": LMBDA,
    "beta": 0.5,
    "temperature": 1.0,
    "max_new_tokens": COMPLETION,
    "learning_rate": 1e-4,  # both learn from the first step on: neither warms up
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
OURS, TRL, DISTILLATION = "sparse-gkd", "TRL GKDTrainer", "TRL DistillationTrainer"
KINDS = (True, False)  # of a step: on-policy or not
COLUMNS = ("trainer", "V", "s/step", "on-policy", "off-policy", "CPU s", "trainer MiB", "all MiB",
           "held-out")  # fmt: skip
NOTES = (
    f"{BATCH} rows x {ACCUMULATION} micro-batches a step, prompts of {PROMPT} words, {COMPLETION} "
    "generated tokens, beta 0.5, float32, KV cache on both sides. A step's time is a median, and "
    f"s/step the mean of both kinds, as lmbda {LMBDA} has them. CPU s: of a step, all processes.",
    "Memory: peak of the resident set; of all processes, the sum of their peaks.",
    "Held-out: dense generalized JSD to the teacher, nats a token, after as many steps; in the row "
    "of no trainer, before them.",
)


@dataclass(frozen=True)
class Run:
    """A trained student and what it took."""

    student: Path
    seconds: dict[bool, list[float]]  # of a step, by whether it was on-policy
    cpu_seconds: float  # of a step, all processes
    trainer_memory: int  # bytes
    memory: int


def main() -> None:
    parser = argument_parser(__doc__, quick="one round of fewer steps")
    parser.add_argument(
        "--model",
        choices=("synthetic", "real"),
        default="synthetic",
        help="real: a published model and a student of its layers, see benchmarks.against_trl_real",
    )
    parser.add_argument("--pretrained", type=Path, help="folder of the teacher of --model real")
    parser.add_argument("--layers", type=int, default=6, help="of it that the student keeps")
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--steps", type=int, help="whose time counts, an even number")
    parser.add_argument("--rounds", type=int, help="runs of each; default 2, with --quick 1")
    parser.add_argument("--gsm8k", type=Path, help="published JSONL, instead of synthetic rows")
    parser.add_argument("--trl_python", type=Path, help="interpreter of an environment with TRL")
    parser.add_argument("--work_folder", type=Path, default=Path("runs/against_trl"))
    args = parser.parse_args()
    steps = args.steps or (4 if args.quick else 8)
    if steps % 2:
        parser.error(f"--steps {steps}: half of them are on-policy, so the number must be even")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(CORES))
    work = args.work_folder.absolute()
    python = args.trl_python or trl_environment(work / "trl")
    if args.model == "real":
        if not (args.pretrained and args.gsm8k):
            parser.error("--model real needs --pretrained, a model's folder, and --gsm8k, rows")
        from benchmarks import against_trl_real  # which imports this module

        against_trl_real.compare(
            args.pretrained, args.layers, args.gsm8k, work, python, steps=steps, quick=args.quick
        )
        return
    seeds = balanced_seeds(steps, args.rounds or (1 if args.quick else 2))
    rows: list[list[Cell]] = []
    figures: dict[str, Any] = {"benchmark": "against_trl", "quick": args.quick}
    for vocab_size in args.vocab_size:
        folder = work / f"{'gsm8k' if args.gsm8k else 'synthetic'}-{vocab_size}-{_recipe()}"
        if not (folder / "ready").exists():
            run_apart(prepare, folder, vocab_size, args.gsm8k)
        runs: dict[str, list[Run]] = {TRL: [], OURS: []}
        for seed in seeds:
            runs[TRL].append(train_trl(folder, folder / f"trl-{seed}", steps, seed, python))
            runs[OURS].append(train_ours(folder, folder / f"ours-{seed}", steps, seed))
        students = [run.student for name in (TRL, OURS) for run in runs[name]]
        before, *after = run_apart(held_out_divergences, folder, [folder / "student", *students])
        held_out = {
            TRL: statistics.mean(after[: len(seeds)]),
            OURS: statistics.mean(after[len(seeds) :]),
        }
        rows.append(["no trainer", vocab_size, *["-"] * 6, before])
        rows += [[name, vocab_size, *cells(runs[name]), held_out[name]] for name in runs]
        label = f"{round(vocab_size / 1000)}k"
        for name, kinds in (("", KINDS), ("on_policy_", (True,)), ("off_policy_", (False,))):
            speedup = seconds(runs[TRL], kinds) / seconds(runs[OURS], kinds)
            figures[f"speedup_{name}{label}"] = speedup
        memory_ratio = trainer_memory(runs[OURS]) / trainer_memory(runs[TRL])
        figures[f"trainer_memory_ratio_{label}"] = memory_ratio
        figures["trainer_memory_ratio"] = memory_ratio  # of the last, the largest vocabulary
        ratio = held_out[OURS] / held_out[TRL]
        figures["divergence_ratio"] = max(ratio, figures.get("divergence_ratio", 0.0))
    print_report("A step of distillation", COLUMNS, rows, figures, notes=NOTES)


def seconds(runs: Sequence[Run], kinds: Sequence[bool]) -> float:
    """Return the seconds of a step: the mean over kinds of the median over all runs' steps."""
    return statistics.mean(
        statistics.median(value for run in runs for value in run.seconds[kind]) for kind in kinds
    )


def trainer_memory(runs: Sequence[Run]) -> int:
    return max(run.trainer_memory for run in runs)


def cells(runs: Sequence[Run]) -> list[Cell]:
    return [*(seconds(runs, kinds) for kinds in (KINDS, [True], [False])),
            statistics.median(run.cpu_seconds for run in runs),
            f"{trainer_memory(runs) / 2**20:.0f}",
            f"{max(run.memory for run in runs) / 2**20:.0f}"]  # fmt: skip


def on_policy_steps(steps: int, seed: int, lmbda: float = LMBDA) -> list[bool]:
    """Return our trainer's coins of the warm-up and of the steps that count."""
    method = DistillationConfig(
        lmbda=lmbda, seq_kd=False, seq_kd_temperature=0.0, divergence=Divergence(), top_k=1,
        max_new_tokens=COMPLETION, seed=seed, stop_ids=(),
    )  # fmt: skip
    return [method.on_policy(step) for step in range(WARM_UP + steps)]


def balanced_seeds(steps: int, rounds: int) -> list[int]:
    """Return the first seeds under which half of the steps that count are on-policy."""
    fair = (s for s in count() if 2 * sum(on_policy_steps(steps, s)[WARM_UP:]) == steps)
    return [next(fair) for _ in range(rounds)]


# The two sides: a folder with models and rows in, a trained student in ``output`` out.


def train_trl(
    folder: Path,
    output: Path,
    steps: int,
    seed: int,
    python: Path,
    *,
    trainer: Literal["gkd", "distillation"] = "gkd",
    arguments: Mapping[str, Any] = ARGUMENTS,
) -> Run:
    coins = on_policy_steps(steps, seed, arguments["lmbda"])
    settings = {
        "trainer": trainer,
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "dataset": str(folder / "train.jsonl"),
        "coins": coins,
        "arguments": {
            **arguments,
            "max_steps": len(coins),
            "seed": seed,
            "output_dir": str(output),
        },
    }
    output.mkdir(exist_ok=True)
    (output / "settings.json").write_text(json.dumps(settings))
    script = REPOSITORY / "benchmarks" / "trl_gkd.py"
    command = [python, script, output / "settings.json"]
    with started(command, output / "trainer.log", reads="stdout") as process:
        return watched(output, coins, process)


def train_ours(
    folder: Path,
    output: Path,
    steps: int,
    seed: int,
    *,
    given: Mapping[str, Any] = ARGUMENTS,
) -> Run:
    coins = on_policy_steps(steps, seed, given["lmbda"])
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = {
        **given,
        "model_name_or_path": folder / "student",
        "teacher_url": url,
        "dataset_name": folder / "train.jsonl",
        "max_steps": len(coins),
        "seed": seed,
        "output_dir": output,
    }
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    serve = [sys.executable, "-m", "teacher_server", "serve", folder / "teacher",
             "--backend=transformers", f"--port={port}"]  # fmt: skip
    distill = [sys.executable, "-m", "student_trainer", "distill", *flags]
    output.mkdir(exist_ok=True)
    log = output / "server.log"
    with started(serve, log) as server:
        wait_until_ready(server, url, log)
        with started(distill, output / "trainer.log", reads="stderr") as trainer:
            return watched(output, coins, trainer, server)


@contextmanager
def started(
    command: Sequence[Any], log: Path, reads: Literal["stdout", "stderr"] | None = None
) -> Iterator[subprocess.Popen[Any]]:
    """A process that ends with the block at the latest; ``log`` takes what is not read."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE if reads == "stdout" else file,
            stderr=subprocess.PIPE if reads == "stderr" else file,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            cwd=REPOSITORY,
        )
    try:
        yield process
    except BaseException:
        sys.stderr.write(log.read_text())
        raise
    finally:
        if process.returncode is None:
            process.terminate()
            process.wait()


def watched(
    student: Path,
    coins: Sequence[bool],
    trainer: subprocess.Popen[bytes],
    *others: subprocess.Popen[bytes],
) -> Run:
    """Follow a training process by the line that it logs after each optimizer step, to its end.

    Raises:
        RuntimeError: the process failed, or did not log every step.
    """
    processes = [psutil.Process(process.pid) for process in (trainer, *others)]
    ends, cpu = [], []
    with (student / "steps.log").open("wb") as steps:
        for line in trainer.stdout or trainer.stderr or ():
            steps.write(line)
            if STEP.match(line):
                ends.append(time.perf_counter())
                cpu.append(sum(sum(process.cpu_times()[:2]) for process in processes))
    memory = [ended(process) for process in (trainer, *others)]
    if trainer.returncode or len(ends) != len(coins):
        raise RuntimeError(f"exit code {trainer.returncode} after {len(ends)} steps")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(WARM_UP, len(coins)):
        seconds[coins[step]].append(ends[step] - ends[step - 1])
    return Run(
        student,
        seconds,
        cpu_seconds=(cpu[-1] - cpu[WARM_UP - 1]) / (len(coins) - WARM_UP),
        trainer_memory=memory[0],
        memory=sum(memory),
    )


def ended(process: subprocess.Popen[bytes]) -> int:
    """Return the peak resident memory, in bytes, of a process that has ended or is to end now."""
    if process.stdout is None and process.stderr is None:
        process.terminate()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trl_environment(folder: Path) -> Path:
    """Return this interpreter if it has TRL, or one with the versions of constraints.txt."""
    if find_spec("trl") is not None:
        return Path(sys.executable)
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"installing TRL in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        # torch alone and first, as in the Makefile: it takes a CPU build where there is one.
        torch_version = torch.__version__.split("+")[0]
        subprocess.run([*install, f"torch=={torch_version}"], check=True, stdout=sys.stderr)
        constraints = str(REPOSITORY / "constraints.txt")
        wanted = ["-c", constraints, "trl", "transformers"]
        subprocess.run([*install, *wanted], check=True, stdout=sys.stderr)
        ready.touch()
    return python


# Models and rows.


def prepare(folder: Path, vocab_size: int, gsm8k: Path | None) -> None:
    """Make teacher and student, pretrained for a moment, and the rows to distil on."""
    print(f"pretraining models of {vocab_size} tokens in {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = gsm8k_rows(gsm8k) if gsm8k else synthetic_rows(rng, vocab_size)
    held_out, train, pretraining = rows[:HELD_OUT], rows[HELD_OUT:512], rows[512:]
    tokenizer = word_tokenizer(rows, vocab_size)
    for name, part in (("held_out", held_out), ("train", train)):
        lines = (json.dumps({"messages": messages(row)}) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name, shape in SHAPES.items():
        save_model(
            folder / name, family="llama", vocab_size=vocab_size, tie_word_embeddings=True,
            initializer_range=0.02, max_position_embeddings=512, **shape,
        )  # fmt: skip
        tokenizer.save_pretrained(folder / name)
        # For some families transformers loads another kind of tokenizer than was saved.
        loaded = AutoTokenizer.from_pretrained(folder / name)
        wanted, found = (token_ids(t, messages(rows[0]))[0].tolist() for t in (tokenizer, loaded))
        if wanted != found:
            raise RuntimeError(f"the saved tokenizer reads {len(wanted)} tokens as {len(found)}")
        pretrain(folder / name, tokenizer, pretraining, PRETRAINING[name])
    (folder / "ready").touch()


def _recipe() -> str:
    """Return a hash of how models are made: a folder of another one is made anew."""
    recipe = (SHAPES, KNOWN_WORDS, PRETRAINING, PRETRAINING_ROWS, PRETRAINING_TARGETS)
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


def synthetic_rows(rng: np.random.Generator, vocab_size: int) -> list[Row]:
    """Make rows in a language where a word has four usual successors.

    A twentieth of the text is any word, by Zipf's law. Teachers of it have most of their mass on
    few tokens, as real ones have.
    """
    known = KNOWN_WORDS
    share = 1.0 / (np.arange(vocab_size - len(SPECIAL)) + 10.0)
    successors = rng.choice(known, (known, 4), p=share[:known] / share[:known].sum())
    count, length = 512 + PRETRAINING_ROWS * PRETRAINING["teacher"], PROMPT + COMPLETION
    any_word = rng.choice(len(share), (count, length), p=share / share.sum())
    chosen = rng.choice(4, (count, length), p=[0.6, 0.2, 0.1, 0.1])
    jumps = rng.random((count, length)) < 0.05
    ids = any_word.copy()  # [rows, length]
    for place in range(1, length):
        before = ids[:, place - 1] % known
        following = successors[before, chosen[:, place]]
        ids[:, place] = np.where(jumps[:, place], any_word[:, place], following)
    texts = [[f"w{id}" for id in row] for row in ids.tolist()]
    return [(" ".join(text[:PROMPT]), " ".join(text[PROMPT:])) for text in texts]


def gsm8k_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def words(text: str, limit: int) -> str:
        return " ".join(re.findall(r"\w+|[^\w\s]", text)[:limit])

    return [(words(r["question"], 2 * PROMPT), words(r["answer"], COMPLETION)) for r in rows]


def messages(row: Row) -> list[dict[str, str]]:
    prompt, completion = row
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def word_tokenizer(rows: Sequence[Row], vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a word; words that no row has fill up the vocabulary."""
    counted = Counter(word for row in rows for text in row for word in text.split())
    known = [word for word, _ in counted.most_common(vocab_size - len(SPECIAL))]
    known += [f"unused{i}" for i in range(vocab_size - len(SPECIAL) - len(known))]
    vocabulary = {word: id for id, word in enumerate([*SPECIAL, *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[4]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1],
        unk_token=SPECIAL[4], additional_special_tokens=list(SPECIAL[2:4]),
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def pretrain(
    folder: Path, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], steps: int
) -> None:
    """Train with cross-entropy on words of the completions, so that distributions have a shape.

    Never on a completion's end: both trainers' students then write to the limit, and so as much.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 6, steps)
    for step in range(steps):
        first = step * PRETRAINING_ROWS % len(rows)
        texts = [token_ids(tokenizer, messages(row)) for row in rows[first:][:PRETRAINING_ROWS]]
        input_ids = pad_sequence([ids for ids, _ in texts], batch_first=True)  # [B, L]
        learned = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (ids, start) in enumerate(texts):
            learned[row, start : len(ids) - 1] = True
        places = learned.nonzero()
        places = places[torch.randperm(len(places))[:PRETRAINING_TARGETS]]
        hidden = model.model(input_ids=input_ids).last_hidden_state  # [B, L, d]
        logits = model.lm_head(hidden[places[:, 0], places[:, 1] - 1])
        loss = torch.nn.functional.cross_entropy(logits, input_ids[places[:, 0], places[:, 1]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)


def token_ids(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> tuple[torch.Tensor, int]:
    """Return the ids [L] of a row, and where its completion begins."""
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    return torch.tensor(whole), len(prompt)


@torch.inference_mode()
def held_out_divergences(
    folder: Path, students: Sequence[Path], beta: float = ARGUMENTS["beta"]
) -> list[float]:
    """Return the dense generalized JSD to each student, nats a completion token, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    texts = [token_ids(tokenizer, json.loads(line)["messages"]) for line in lines]
    sums, tokens = [0.0] * len(students), 0
    teacher, *models = (
        AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        for path in (folder / "teacher", *students)
    )
    for ids, start in texts:

        def logits(model: Any, ids: torch.Tensor = ids, start: int = start) -> torch.Tensor:
            return model(input_ids=ids[None]).logits[0, start - 1 : -1].double()

        theirs = logits(teacher)  # [T, V]
        tokens += len(theirs)
        for index, model in enumerate(models):
            sums[index] += float(generalized_jsd(logits(model), theirs, Divergence(beta)).sum())
    return [value / tokens for value in sums]


if __name__ == "__main__":
    main()
