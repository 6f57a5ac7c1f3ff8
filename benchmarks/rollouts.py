"""Completion tokens per second of the student's rollout engines, and when completions leave.

A random 4-layer model and completions of very different lengths: each 25th token of the
vocabulary ends one, so lengths are geometric. Engines take turns, one round each, over the same
prompts, so that a disturbance of the machine falls on all of them.

    python -m benchmarks.rollouts --quick
    python -m benchmarks.rollouts_vllm        # vLLM beside the trainer, and as a server
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from benchmarks.harness import Cell, Figure, argument_parser, print_report, set_threads
from shared.sampling import uniforms
from student_trainer.rollouts import Rollout, RolloutRequest, TransformersRollouts

HIDDEN, LAYERS, MOST = 256, 4, 64
PLACES = 8
Engine = Callable[[Sequence[RolloutRequest]], Iterator[list[tuple[int, Rollout]]]]
NOTES = (
    f"A Llama of {LAYERS} layers, d = {HIDDEN}, float32; prompts of 8 to 64 tokens, "
    f"completions of 1 to {MOST}, geometric with mean 20 or so; temperature 1.",
    "generate: `model.generate` over the same rows, all kept until the last has ended; in float64 "
    "with inverse-CDF sampling from the request's key, multinomial as transformers samples itself.",
    f"in {PLACES} places: at most that many rows at once; `generate` takes them in waves.",
    "half: seconds until half of the completions were handed over.",
)


@dataclass
class Figures:
    """The figures of one engine in one case: a value for each round."""

    tokens_per_second: list[float] = field(default_factory=list)
    seconds_to_half: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return statistics.median(self.tokens_per_second)


class Generate:
    """An engine that calls `model.generate` on batches of prompts of similar length."""

    def __init__(self, model: Any, stop_ids: Sequence[int], places: int | None, *, keyed: bool):
        self.model = model
        self.stop_ids = list(stop_ids)
        self.places = places
        self.keyed = keyed
        self.config = GenerationConfig(
            max_new_tokens=MOST, do_sample=not keyed, eos_token_id=self.stop_ids, pad_token_id=0,
            use_cache=True, **({} if keyed else {"top_k": 0}),
        )  # fmt: skip

    def __call__(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        size = self.places or len(order)
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            rollouts = self._batch([requests[i] for i in indices])
            yield list(zip(indices, rollouts, strict=True))

    @torch.no_grad()
    def _batch(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        width = max(len(r.prompt_ids) for r in requests)
        input_ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):
            prompt = torch.from_numpy(request.prompt_ids.astype(np.int64))
            input_ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        processors = LogitsProcessorList()
        if self.keyed:
            draws = np.stack([uniforms(*r.key, count=MOST) for r in requests])
            processors.append(_WholeCdf(torch.from_numpy(draws), width))
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            logits_processor=processors,
            generation_config=self.config,
        )
        rollouts = []
        for row in output[:, width:].numpy():
            ends = np.flatnonzero(np.isin(row, self.stop_ids))
            length = int(ends[0]) + 1 if len(ends) else len(row)
            rollouts.append(Rollout(row[:length].astype(np.uint32), truncated=not len(ends)))
        return rollouts


class _WholeCdf:
    """An inverse-CDF sampler over a float64 cumulative sum of all tokens."""

    def __init__(self, draws: torch.Tensor, prompt_width: int) -> None:
        self.draws = draws
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        cdf = scores.double().softmax(-1).cumsum(-1)  # [B, V]
        chosen = torch.searchsorted(cdf, self.draws[:, step, None] * cdf[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


def random_model(vocab_size: int) -> tuple[Any, range]:
    """Return a model with random weights, and the tokens that end a completion."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), range(1, vocab_size // 25)


def own_engines(model: Any, stop_ids: range) -> dict[str, Engine]:
    """Return the engines that generate with the student itself, by name."""
    vocab_size = model.config.vocab_size

    def ours(places: int | None) -> Engine:
        return TransformersRollouts(
            model, stop_ids=stop_ids, pad_token_id=0, max_new_tokens=MOST, temperature=1.0,
            batch_size=places, vocab_size=vocab_size,
        ).generate  # fmt: skip

    return {
        "generate, float64": Generate(model, stop_ids, None, keyed=True),
        "generate, multinomial": Generate(model, stop_ids, None, keyed=False),
        "rollouts": ours(None),
        f"generate, float64, in {PLACES} places": Generate(model, stop_ids, PLACES, keyed=True),
        f"rollouts in {PLACES} places": ours(PLACES),
    }


def measure(
    engines: Mapping[str, Engine], vocab_size: int, prompts: int, rounds: int
) -> dict[str, Figures]:
    """Return each engine's figures, after two prompts to warm up."""
    figures = {name: Figures() for name in engines}
    rng = np.random.default_rng(0)
    for number in range(rounds):
        asked = [
            RolloutRequest(
                rng.integers(vocab_size // 25, vocab_size, rng.integers(8, 65)).astype(np.uint32),
                (number, i),
            )
            for i in range(prompts)
        ]
        for name, engine in engines.items():
            if not number:
                list(engine(asked[:2]))
            since, tokens, handed, half = time.perf_counter(), 0, 0, 0.0
            for group in engine(asked):
                tokens += sum(len(rollout.token_ids) for _, rollout in group)
                handed += len(group)
                if handed >= prompts / 2 and not half:
                    half = time.perf_counter() - since
            figures[name].tokens_per_second.append(tokens / (time.perf_counter() - since))
            figures[name].seconds_to_half.append(half)
    return figures


def speed_rows(case: str, figures: Mapping[str, Figures], base: float) -> list[list[Cell]]:
    """Return a row for each engine: tokens a second, their ratio to ``base``, seconds to half."""
    return [
        [f"{case}: {name}", round(found.speed), found.speed / base,
         statistics.median(found.seconds_to_half)]
        for name, found in figures.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, quick="two cases, two rounds", threads=1)
    arguments = parser.parse_args(argv)
    set_threads(arguments.threads)
    cases = [(32_000, 16), (152_000, 16), (32_000, 64), (152_000, 64)]
    rounds = 3
    if arguments.quick:
        cases, rounds = cases[:2], 2
    rows: list[list[Cell]] = []
    summary: dict[str, Figure] = {}
    for vocab_size, prompts in cases:
        model, stop_ids = random_model(vocab_size)
        figures = measure(own_engines(model, stop_ids), vocab_size, prompts, rounds)
        base = figures["generate, float64"].speed
        name = f"V={vocab_size // 1000}k, {prompts} prompts"
        rows += speed_rows(name, figures, base)
        ratio = figures["rollouts"].speed / base
        summary[f"speedup_v{vocab_size // 1000}k_{prompts}"] = round(ratio, 2)
    print_report(
        f"Rollouts: completion tokens per second, threads: {torch.get_num_threads()}",
        ["case", "tokens/s", "× generate", "half, s"],
        rows,
        summary,
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
