"""Generate completions by the model's own `generate`, each by the rules of its job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation import (
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shared.errors import InternalError
from shared.protocol import Completion
from shared.sampling import uniforms
from shared.text import StopSearch
from teacher_server.backends.base import GenerateJob


@torch.inference_mode()
def generate_completions(
    model: Any,
    jobs: Sequence[GenerateJob],
    eos_token_ids: Sequence[int],
    pad: int,
    waiting: Callable[[], list[bool]],
    ended: Callable[[dict[int, Completion]], None],
    *,
    vocab_size: int,
    tokenizer: Any = None,
    use_cache: bool = True,
) -> None:
    """Generate one left-padded batch whose jobs may differ in lengths, stop tokens and sampling.

    Args:
        eos_token_ids: end every completion, beside a job's own stop tokens.
        pad: any valid id; the attention mask hides it.
        waiting: tells for each job whether somebody still waits for it; the others end at once.
        ended: is called after each token with the completions that it ended, by index of the job. A
            job that nobody waits for is never among them.
        vocab_size: ids from here on, padding of the output layer, are never generated.
        tokenizer: for the text of jobs with stop strings.
        use_cache: False makes each token a forward pass over all before it.

    Raises:
        InternalError: the model answered NaN or infinity.
    """
    device = next(model.parameters()).device
    width = max(len(job.prompt) for job in jobs)
    input_ids = torch.full((len(jobs), width), pad)  # [B, P]
    attention_mask = torch.zeros_like(input_ids)
    for index, job in enumerate(jobs):
        first = width - len(job.prompt)
        input_ids[index, first:] = torch.from_numpy(job.prompt.astype(np.int64))
        attention_mask[index, first:] = 1
    searches = {
        index: StopSearch(tokenizer, job.prompt, job.stop)
        for index, job in enumerate(jobs)
        if job.stop is not None
    }
    stops = [sorted({*eos_token_ids, *job.stop_token_ids}) for job in jobs]
    # Set on the model, because `generate` fills unset fields from the checkpoint's defaults, which
    # may hold a repetition penalty that no request asked for.
    model.generation_config = GenerationConfig(
        max_new_tokens=max(job.max_new_tokens for job in jobs),
        do_sample=False,
        pad_token_id=pad,
        use_cache=use_cache,
    )
    model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        logits_processor=LogitsProcessorList([_SampleEachJob(jobs, device, vocab_size)]),
        stopping_criteria=StoppingCriteriaList(
            [_StopEachJob(jobs, stops, searches, width, waiting, ended, device)]
        ),
    )


def within_context(jobs: Sequence[GenerateJob], max_model_len: int) -> list[list[int]]:
    """Group the indices of jobs so that each group fits the context as one padded batch.

    Each job fits alone, but a long prompt beside a long completion would exceed the context.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(jobs)), key=lambda i: len(jobs[i].prompt)):
        for group in groups:
            longest = max(jobs[i].max_new_tokens for i in [*group, index])
            if len(jobs[index].prompt) + longest <= max_model_len:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


class _StopEachJob(StoppingCriteria):
    """A criterion that ends each completion at its stops or length, or when nobody waits for it."""

    def __init__(
        self,
        jobs: Sequence[GenerateJob],
        stops: Sequence[Sequence[int]],
        searches: dict[int, StopSearch],
        prompt_width: int,
        waiting: Callable[[], list[bool]],
        ended: Callable[[dict[int, Completion]], None],
        device: torch.device,
    ) -> None:
        self.prompt_width = prompt_width
        self.waiting = waiting
        self.ended = ended
        self.searches = searches
        self.running = torch.ones(len(jobs), dtype=torch.bool, device=device)
        self.lengths = torch.tensor([job.max_new_tokens for job in jobs], device=device)
        widest = max(map(len, stops))
        padded = [[*stop, *[-1] * (widest - len(stop))] for stop in stops]
        self.stops = torch.tensor(padded, dtype=torch.long, device=device)  # [B, S]

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        length = input_ids.shape[1] - self.prompt_width
        self.running &= torch.tensor(self.waiting(), device=input_ids.device)
        stopped = (input_ids[:, -1:] == self.stops).any(dim=1)  # [B]
        for index, search in self.searches.items():
            if self.running[index] and search.add(int(input_ids[index, -1])):
                stopped[index] = True
        now = self.running & (stopped | (self.lengths <= length))
        self.running &= ~now
        self.ended(
            {
                index: Completion(
                    token_ids=input_ids[index, self.prompt_width :].cpu().numpy().astype(np.uint32),
                    finish_reason="stop" if stopped[index] else "length",
                )
                for index in now.nonzero()[:, 0].tolist()
            }
        )
        return ~self.running


class _SampleEachJob(LogitsProcessor):
    """A processor that samples each completion's next token by the parameters of its job.

    It leaves one id, which `generate` then takes. Sampling is by inverse CDF from one uniform a
    token, fixed by the job's key, over the softmax of the logits after temperature, top-k and
    top-p. Jobs with equal parameters are sampled together.
    """

    def __init__(self, jobs: Sequence[GenerateJob], device: torch.device, vocab_size: int) -> None:
        self.step = 0
        self.vocab_size = vocab_size
        longest = max(job.max_new_tokens for job in jobs)
        alike: dict[tuple[float, int, float], list[int]] = {}
        for index, job in enumerate(jobs):
            if job.temperature > 0:
                key = (job.temperature, job.sampling_top_k, job.top_p)
                alike.setdefault(key, []).append(index)
        self.groups = [
            (
                torch.tensor(indices, device=device),
                torch.from_numpy(
                    np.stack([uniforms("generate", *jobs[i].key, count=longest) for i in indices])
                ).to(device),  # [n, steps]
                _warpers(*key),
            )
            for key, indices in alike.items()
        ]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not scores.amax(dim=-1).isfinite().all():
            raise InternalError(
                "the model's logits are not finite while generating. Check the teacher's weights, "
                "or serve it with --dtype float32"
            )
        scores[:, self.vocab_size :] = float("-inf")
        for indices, draws, warp in self.groups:
            logits = warp(input_ids[indices], scores[indices].float())
            cdf = logits.double().softmax(dim=-1).cumsum(dim=-1)  # [n, V]
            total = cdf[:, -1:]
            # A point below the total, searched from the right, never picks an id of zero
            # probability.
            point = torch.minimum(
                draws[:, self.step, None] * total, total.nextafter(torch.zeros_like(total))
            )
            chosen = torch.searchsorted(cdf, point, right=True)  # [n, 1]
            scores[indices] = torch.full_like(logits, float("-inf")).scatter_(1, chosen, 0.0)
        self.step += 1
        return scores


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers
