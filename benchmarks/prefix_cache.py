"""Tokens scored per second where a long prompt repeats, with vLLM's prefix cache and without it.

Two servers on vLLM, one thread each, take turns: one as it comes, one with
``--no-enable-prefix-caching``. Every sequence is the same long prompt, such as what only the
teacher sees, and a completion of its own. A token is scored when its row of top-k, next token and
tail has arrived.

    python -m benchmarks.prefix_cache --quick    # one round, in 2 minutes
    python -m benchmarks.prefix_cache            # five rounds
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

from benchmarks.harness import argument_parser, print_report
from shared import wire
from shared.protocol import ScoreRequest, ScoreResponse, ScoreSequence
from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server

COMPLETION = 64
TOP_K = 64
WITH, WITHOUT = "prefix cache", "no prefix cache"


def main(argv: Sequence[str] | None = None) -> None:
    """Serve a model twice, measure, and print the table and its JSON."""
    parser = argument_parser(__doc__, quick="one round of 16 sequences")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens; default 2000")
    args = parser.parse_args(argv)
    rounds, count = (1, 16) if args.quick else (5, 32)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as servers:
        folder = Path(name)
        save_tokenizer(folder)
        save_model(
            folder, family="qwen2", vocab_size=32_000, hidden_size=256, intermediate_size=1024,
            num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=2 * args.prompt,
        )  # fmt: skip
        flags = ("--backend", "vllm", "--dtype", "float32")
        urls = {
            WITH: servers.enter_context(running_server(folder, *flags)),
            WITHOUT: servers.enter_context(
                running_server(folder, *flags, "--no-enable-prefix-caching")
            ),
        }
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, 260, args.prompt).astype(np.uint32)
        rates: dict[str, list[float]] = {name: [] for name in urls}
        worst = 0.0
        for number in range(rounds + 1):
            sequences = [
                ScoreSequence(
                    token_ids=np.append(prompt, rng.integers(0, 260, COMPLETION)).astype(np.uint32),
                    completion_start=args.prompt,
                )
                for _ in range(count)
            ]
            answers = {}
            for name, url in urls.items():
                began = time.perf_counter()
                answers[name] = _scores(url, sequences)
                if number:  # the first round fills the cache
                    rates[name].append(count * COMPLETION / (time.perf_counter() - began))
            pairs = zip(answers[WITH], answers[WITHOUT], strict=True)
            worst = max([worst, *(float(np.abs(one - other).max()) for one, other in pairs)])
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print_report(
        f"Scoring behind a prompt of {args.prompt} tokens that repeats",
        ["server", "scored tokens/s"],
        [[name, f"{rate:.0f}"] for name, rate in medians.items()],
        {
            "prompt_tokens": args.prompt,
            "completion_tokens": COMPLETION,
            "scored_tokens_per_second": medians[WITH],
            "scored_tokens_per_second_without": medians[WITHOUT],
            "speedup": medians[WITH] / medians[WITHOUT],
            "largest_logprob_difference": worst,
        },
    )


def _scores(url: str, sequences: Sequence[ScoreSequence]) -> list[np.ndarray]:
    """Return the log-probs of the next tokens, each sequence in a request of its own, 8 at once."""

    def score(one: ScoreSequence) -> np.ndarray:
        request = ScoreRequest(sequences=[one], top_k=TOP_K)
        answer = httpx.post(
            f"{url}/v1/score",
            content=wire.dump(request, wire.MSGPACK_MEDIA_TYPE),
            headers={"content-type": wire.MSGPACK_MEDIA_TYPE},
            timeout=600,
        )
        scores = wire.load(
            ScoreResponse, answer.content, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 28
        )
        return scores.sequences[0].next_token_logprob

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(score, sequences))


if __name__ == "__main__":
    main()
