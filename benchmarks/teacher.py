"""Tokens scored per second by a served teacher, against stock vLLM and against the bare model.

Every server is a process of its own with one thread for its model; all are up, and take turns, one
round each, so that a disturbance of the machine falls on all of them. A token is scored when its
row of top-k, next token and tail has arrived; prompts are read and not scored, as in training.

    python -m benchmarks.teacher --quick    # the headline case, in a minute
    python -m benchmarks.teacher            # all, with the memory test, in 12 minutes

All: the headline case, and each of vocabulary, k and clients varied alone around it. What is given
by flags is measured in every combination.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from benchmarks.harness import (
    Cell,
    Worker,
    argument_parser,
    listener,
    print_report,
    resident_bytes,
    set_threads,
)
from shared import wire
from shared.protocol import LogprobDtype, ScoreRequest, ScoreResponse, ScoreSequence
from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server, running_stock_vllm

LENGTH, PROMPT = 256, 64
ROWS = LENGTH - PROMPT
LIMIT_BATCH = 8  # sequences of the bare forward pass
STOCK_FLAGS = ("--served-model-name", "stock", "--max-logprobs", "1024",
               "--max-num-batched-tokens", "16384", "--no-enable-log-requests",
               "--uvicorn-log-level", "warning")  # fmt: skip
OURS, OTHER, STOCK = "teacher-server, vLLM", "teacher-server, transformers", "vllm serve, JSON"
ENGINE, LIMIT = "bare vLLM prefill, no log-probs", "bare forward + log-softmax + top-k"
NOTES = (
    f"Sequences of {LENGTH} tokens, {PROMPT} of them prompt; one sequence a request; models in "
    "float32, one thread for each; on the wire the top k in float16, next token and tail in "
    "float32. Answers are received, not decoded.",
    "The limit is a transformers forward pass over batches of "
    f"{LIMIT_BATCH} in the benchmark's own process, the output layer on completion rows alone, "
    "log-softmax and top-k: what is computed for an answer, and nothing else.",
    "memory: resident, all processes of a server, after the last round.",
)


@dataclass(frozen=True)
class Case:
    """A point at which all methods are measured."""

    vocab_size: int
    top_k: int
    clients: int


HEADLINE = Case(32_000, 64, 8)  # whose figures are the benchmark's, or the first case's
STAR = (
    HEADLINE,
    *(replace(HEADLINE, top_k=k) for k in (1, 16, 256)),
    *(replace(HEADLINE, clients=clients) for clients in (1, 64)),
    replace(HEADLINE, vocab_size=152_064),
)


@dataclass
class Figures:
    """The figures of one method in one case: a value for each round."""

    rows_per_second: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    bytes_per_token: float = 0.0
    memory: int = 0

    @property
    def speed(self) -> float:
        return statistics.median(self.rows_per_second)

    def cells(self) -> list[Cell]:
        if not self.latencies:
            return ["-"] * 4
        p50, p99 = np.quantile(self.latencies, [0.5, 0.99])
        return [float(p50), float(p99), round(self.bytes_per_token), f"{self.memory / 2**20:.0f}"]


# A method runs one round of sequences and says what it saw.
Round = Callable[[Case, list[NDArray[np.uint32]], Figures], None]


def over_http(url: str, body: Callable[[Case, NDArray[np.uint32]], bytes], media_type: str,
              process: psutil.Process) -> Round:  # fmt: skip
    """Send each sequence in a request of its own, ``case.clients`` of them at a time."""

    def run(case: Case, sequences: list[NDArray[np.uint32]], figures: Figures) -> None:
        bodies = [body(case, sequence) for sequence in sequences]
        limits = httpx.Limits(max_connections=case.clients)
        with httpx.Client(
            timeout=300, limits=limits, headers={"content-type": media_type}
        ) as client, ThreadPoolExecutor(case.clients) as clients:  # fmt: skip

            def send(content: bytes) -> tuple[float, int]:
                since = time.perf_counter()
                response = client.post(url, content=content)
                response.raise_for_status()
                return time.perf_counter() - since, len(response.content)

            since = time.perf_counter()
            answers = list(clients.map(send, bodies))
            seconds = time.perf_counter() - since
        figures.rows_per_second.append(len(sequences) * ROWS / seconds)
        figures.latencies.extend(latency for latency, _ in answers)
        figures.bytes_per_token = sum(size for _, size in answers) / (len(sequences) * ROWS)
        figures.memory = resident_bytes(process)

    return run


def score_body(case: Case, sequence: NDArray[np.uint32], dtype: LogprobDtype = "float16") -> bytes:
    one = ScoreSequence(token_ids=sequence, completion_start=PROMPT)
    asked = ScoreRequest(sequences=[one], top_k=case.top_k, logprob_dtype=dtype)
    return wire.dump(asked, wire.MSGPACK_MEDIA_TYPE)


def stock_body(case: Case, sequence: NDArray[np.uint32]) -> bytes:
    asked = {
        "model": "stock",
        "prompt": sequence.tolist(),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": case.top_k,
    }
    return json.dumps(asked).encode()


def bare_forward(folder: Path) -> Round:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    output = model.lm_head.weight.detach().T  # [d, V]
    memory = torch.empty(ROWS, output.shape[1])  # reused: fresh pages cost as much as arithmetic

    @torch.inference_mode()
    def run(case: Case, sequences: list[NDArray[np.uint32]], figures: Figures) -> None:
        near_the_caches = max(1, (16 << 20) // (4 * case.vocab_size))  # the faster way
        since = time.perf_counter()
        for i in range(0, len(sequences), LIMIT_BATCH):
            batch = torch.from_numpy(np.stack(sequences[i : i + LIMIT_BATCH]).astype(np.int64))
            hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
            rows = hidden[:, PROMPT - 1 : -1].flatten(0, 1)
            for chunk in rows.split(ROWS):
                for logits in torch.mm(chunk, output, out=memory).split(near_the_caches):
                    logits.log_softmax(dim=-1).topk(case.top_k, dim=-1)
        seconds = time.perf_counter() - since
        figures.rows_per_second.append(len(sequences) * ROWS / seconds)

    return run


def bare_engine(engine: Worker) -> Round:
    """Return rounds of vLLM's own `LLM`, which runs `serve_engine`."""

    def run(case: Case, sequences: list[NDArray[np.uint32]], figures: Figures) -> None:
        seconds = engine.ask([sequence.tolist() for sequence in sequences])
        figures.rows_per_second.append(len(sequences) * ROWS / seconds)

    engine.receive()  # "loaded"
    return run


def serve_engine(parent: Connection, folder: Path) -> None:
    """Read prompts with vLLM's `LLM`, in a child; answer the seconds that each list took."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(str(folder), dtype="float32", enforce_eager=True, enable_prefix_caching=False,
              max_num_batched_tokens=16_384, skip_tokenizer_init=True)  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    parent.send("loaded")
    while True:
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in parent.recv()]
        since = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        parent.send(time.perf_counter() - since)


def random_sequences(rng: np.random.Generator, count: int, case: Case) -> list[Any]:
    return list(rng.integers(0, case.vocab_size, (count, LENGTH)).astype(np.uint32))


@torch.inference_mode()
def largest_error(folder: Path, url: str, case: Case) -> float:
    """Return the largest error of a float32 log-prob, from a plain float32 forward pass."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    worst = 0.0
    for sequence in random_sequences(np.random.default_rng(1), 3, case):
        answered = httpx.post(
            f"{url}/v1/score", content=score_body(case, sequence, "float32"), timeout=300,
            headers={"content-type": wire.MSGPACK_MEDIA_TYPE},
        )  # fmt: skip
        [scores] = wire.load(
            ScoreResponse, answered.content, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 30
        ).sequences
        ids = torch.from_numpy(sequence.astype(np.int64))
        logits = model(ids[None]).logits[0, PROMPT - 1 : -1].double()  # [T, V]
        dense = logits.log_softmax(dim=-1)
        named = torch.from_numpy(scores.token_ids.astype(np.int64))  # [T, k]
        following = ids[PROMPT:, None]
        tail = dense.scatter(1, named, -torch.inf).scatter(1, following, -torch.inf)
        for found, wanted in (
            (scores.logprobs, dense.gather(1, named)),
            (scores.next_token_logprob, dense.gather(1, following)[:, 0]),
            (scores.tail_logprob, tail.logsumexp(dim=-1)),
        ):
            worst = max(worst, float(np.abs(found - wanted.numpy()).max()))
    return worst


def soak(url: str, process: psutil.Process, requests: int, case: Case) -> float:
    """Return the growth, a ratio, of resident memory over the last nine tenths of requests."""
    rng = np.random.default_rng(2)
    bodies = [score_body(case, s[: PROMPT + 16]) for s in random_sequences(rng, 64, case)]
    sizes = []
    with httpx.Client(
        timeout=300, headers={"content-type": wire.MSGPACK_MEDIA_TYPE}
    ) as client, ThreadPoolExecutor(16) as clients:  # fmt: skip
        for _ in range(10):
            share = [bodies[i % 64] for i in range(requests // 10)]
            for response in clients.map(
                lambda content: client.post(f"{url}/v1/score", content=content), share
            ):
                response.raise_for_status()
            sizes.append(resident_bytes(process))
    return sizes[-1] / sizes[0]


def main() -> None:
    parser = argument_parser(__doc__, quick="the headline case, no memory test")
    parser.add_argument("--vocab_size", type=int, nargs="+", help="of all combinations")
    parser.add_argument("--top_k", type=int, nargs="+", help="of all combinations")
    parser.add_argument("--clients", type=int, nargs="+", help="of all combinations")
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 2")
    parser.add_argument(
        "--soak", type=int, help="requests of the memory test; default 10000, 0 none"
    )
    args = parser.parse_args()
    cases = list(STAR)
    if args.quick or args.vocab_size or args.top_k or args.clients:
        cases = [
            Case(vocab_size, k, clients)
            for vocab_size in args.vocab_size or [HEADLINE.vocab_size]
            for k in args.top_k or [HEADLINE.top_k]
            for clients in args.clients or [HEADLINE.clients]
        ]
    rounds = args.rounds or (2 if args.quick else 3)
    soaked = args.soak if args.soak is not None else (0 if args.quick else 10_000)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    set_threads(1)
    rows: list[list[Cell]] = []
    figures: dict[str, Any] = {}
    for vocab_size in dict.fromkeys(case.vocab_size for case in cases):
        measure([c for c in cases if c.vocab_size == vocab_size], rounds, soaked, rows, figures)
        soaked = 0  # the first vocabulary's server is soaked, and stands for the others
    columns = ["method", "V", "k", "clients", "tokens/s", "of limit", "p50 s", "p99 s",
               "bytes/token", "memory MiB"]  # fmt: skip
    print_report("Tokens scored per second", columns, rows, figures, notes=NOTES)


def measure(cases: list[Case], rounds: int, soaked: int, rows: list[list[Cell]],
            figures: dict[str, Any]) -> None:  # fmt: skip
    """Run all methods on all cases of one vocabulary; adds to ``rows`` and ``figures``."""
    vocab_size = cases[0].vocab_size
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_tokenizer(folder)
        save_model(
            folder, family="qwen2", vocab_size=vocab_size, hidden_size=256, num_hidden_layers=4,
            intermediate_size=1024, max_position_embeddings=2 * LENGTH,
        )  # fmt: skip
        methods: dict[str, Round] = {}
        urls = {}
        for name, backend in ((OURS, "vllm"), (OTHER, "transformers")):
            urls[name] = stack.enter_context(
                running_server(folder, "--backend", backend, command_line=True)
            )
            score = f"{urls[name]}/v1/score"
            process = listener(urls[name])
            methods[name] = over_http(score, score_body, wire.MSGPACK_MEDIA_TYPE, process)
        url = stack.enter_context(running_stock_vllm(folder, *STOCK_FLAGS, command_line=True))
        methods[STOCK] = over_http(
            f"{url}/v1/completions", stock_body, wire.JSON_MEDIA_TYPE, listener(url)
        )
        engine = stack.enter_context(Worker(serve_engine, folder, quiet=True))
        methods[ENGINE] = bare_engine(engine)
        methods[LIMIT] = bare_forward(folder)
        rng = np.random.default_rng(0)
        for case in cases:
            found = {name: Figures() for name in methods}
            for run in methods.values():  # warm
                run(case, random_sequences(rng, 2, case), Figures())
            for _ in range(rounds):
                for name, run in methods.items():
                    run(case, random_sequences(rng, max(16, case.clients), case), found[name])
            limit = found[LIMIT].speed
            for name, one in found.items():
                rows.append([name, vocab_size, case.top_k, case.clients, round(one.speed),
                             one.speed / limit, *one.cells()])  # fmt: skip
            if case == replace(HEADLINE, vocab_size=vocab_size) != HEADLINE:
                figures[f"fraction_of_limit_{vocab_size}"] = found[OURS].speed / limit
                figures[f"speedup_vs_stock_vllm_{vocab_size}"] = (
                    found[OURS].speed / found[STOCK].speed
                )
            if "fraction_of_limit" not in figures or case == HEADLINE:
                figures.update(
                    vocab_size=vocab_size, top_k=case.top_k, clients=case.clients,
                    fraction_of_limit=found[OURS].speed / limit,
                    fraction_of_limit_transformers=found[OTHER].speed / limit,
                    fraction_of_bare_engine=found[OURS].speed / found[ENGINE].speed,
                    speedup_vs_stock_vllm=found[OURS].speed / found[STOCK].speed,
                    bytes_per_token=found[OURS].bytes_per_token,
                    bytes_per_token_stock_vllm=found[STOCK].bytes_per_token,
                    max_abs_logprob_error=largest_error(folder, urls[OURS], case),
                )  # fmt: skip
        if soaked:
            figures["memory_growth"] = soak(urls[OURS], listener(urls[OURS]), soaked, cases[0])
            figures["memory_growth_requests"] = soaked


if __name__ == "__main__":
    main()
