"""Turn OpenAI's requests into jobs, and the results of the jobs into answers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.protocol import Completion, InfoResponse
from shared.sparse import SparseLogprobs
from shared.text import completion_text, decoded
from teacher_server.openai.answers import (
    LOWEST,
    Part,
    WrittenJson,
    chat_logprobs,
    completion_logprobs,
    json_pieces,
)
from teacher_server.openai.plan import OpenAIPlan, make_plan
from teacher_server.openai.schema import ChatRequest, CompletionRequest, Ids, OpenAIRequest
from teacher_server.openai.tokenizer import ServedTokenizer


@dataclass(frozen=True)
class _Echo:
    """The prompt as an answer repeats it before each of its completions."""

    text: str
    parts: list[Part]


class OpenAIAdapter:
    """An adapter between OpenAI's requests and answers and the jobs of one served model."""

    def __init__(self, model: str, *, trust_remote_code: bool) -> None:
        self._tokenizer = ServedTokenizer(model, trust_remote_code=trust_remote_code)

    def plan(self, request: OpenAIRequest, info: InfoResponse) -> OpenAIPlan:
        """Return the jobs of a request; see `make_plan`."""
        return make_plan(request, self._tokenizer, info)

    def answer(
        self,
        plan: OpenAIPlan,
        scored: Sequence[SparseLogprobs],
        completions: Sequence[Completion],
        info: InfoResponse,
        request_id: str,
    ) -> bytearray:
        """Return the JSON of an answer.

        Args:
            plan: from `plan`.
            scored: the scores of ``plan.score``, in order.
            completions: the completions of ``plan.generate``, n of each prompt, in order.
            info: the teacher.
            request_id: part of the answer's id.
        """
        request, n = plan.request, plan.request.n or 1
        if plan.generate is None:
            nothing = Completion(token_ids=np.zeros(0, np.uint32), finish_reason="length")
            completions = [nothing] * (len(plan.prompts) * n)
        scores_of_prompts = iter(scored)
        choices: list[dict[str, Any]] = []
        for number, prompt in enumerate(plan.prompts):
            one = next(scores_of_prompts) if plan.score is not None and len(prompt) > 1 else None
            prompt_logprobs = None
            if plan.prompt_logprobs is not None:
                prompt_logprobs = self._prompt_logprobs(prompt, one, plan.prompt_logprobs)
            echo = self._echo(plan, number, one) if plan.echo else None
            for completion in completions[number * n : (number + 1) * n]:
                ended = self._ended(plan, prompt, completion, info)
                index = len(choices)
                choices.append(
                    self._choice(plan, index, prompt, completion, prompt_logprobs, echo, ended)
                )
        generated = sum(len(completion.token_ids) for completion in completions)
        prompt_tokens = sum(len(prompt) for prompt in plan.prompts)
        chat = isinstance(request, ChatRequest)
        body: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": generated,
                "total_tokens": prompt_tokens + generated,
            },
        }
        if chat and request.return_token_ids:
            body["prompt_token_ids"] = plan.prompts[0].tolist()
        answer = bytearray()
        for piece in json_pieces(body):
            answer += piece.encode()
        return answer

    def _choice(
        self,
        plan: OpenAIPlan,
        index: int,
        prompt: Ids,
        completion: Completion,
        prompt_logprobs: list[WrittenJson | None] | None,
        echo: _Echo | None,
        ended: tuple[str, str, str | int | None],
    ) -> dict[str, Any]:
        request = plan.request
        ids = completion.token_ids
        text, finish_reason, stop_reason = ended
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if isinstance(request, ChatRequest):
            choice["message"] = {"role": "assistant", "content": text}
        else:
            text = text if echo is None else echo.text + text
            choice |= {"text": text, "prompt_logprobs": prompt_logprobs}
        choice["logprobs"] = None
        parts = [] if echo is None else echo.parts
        if completion.scores is not None:
            parts = [*parts, (ids, completion.scores)]
        if plan.logprobs is not None and parts:
            as_ids = bool(request.return_tokens_as_token_ids)
            write = chat_logprobs if isinstance(request, ChatRequest) else completion_logprobs
            name = "token_id:{}".format if as_ids else self._tokenizer.token
            choice["logprobs"] = write(parts, plan.logprobs, name)
        if request.return_token_ids:
            choice["token_ids"] = ids.tolist()
            if not isinstance(request, ChatRequest):
                choice["prompt_token_ids"] = prompt.tolist()
        return choice

    def _echo(self, plan: OpenAIPlan, number: int, scores: SparseLogprobs | None) -> _Echo:
        """Return a prompt as an answer repeats it: text as sent, ids with special tokens."""
        assert isinstance(plan.request, CompletionRequest)
        text, ids = plan.request.prompt[number], plan.prompts[number]
        if not isinstance(text, str):
            text = decoded(self._tokenizer.tokenizer, ids, skip_special_tokens=False)
        parts: list[Part] = [(ids[:1], None)]  # the first token has no log-prob
        return _Echo(text, parts if scores is None else [*parts, (ids[1:], scores)])

    def _ended(
        self, plan: OpenAIPlan, prompt: Ids, completion: Completion, info: InfoResponse
    ) -> tuple[str, str, str | int | None]:
        """Return the text of a completion, its finish reason, and vLLM's stop reason.

        The stop reason is the stop string or stop token; None for the end token and for the length
        limit.
        """
        request, ids, reason = plan.request, completion.token_ids, completion.finish_reason
        text = self._text(prompt, ids, request)
        match = None if plan.stop is None else plan.stop.find(text)
        if match is not None:
            start, end, stop = match
            return text[: end if request.include_stop_str_in_output else start], "stop", stop
        last = int(ids[-1]) if len(ids) else -1
        if reason != "stop" or last not in {*info.eos_token_ids, *(request.stop_token_ids or [])}:
            return text, reason, None
        if not request.include_stop_str_in_output:
            text = self._text(prompt, ids[:-1], request)
        return text, reason, None if last == self._tokenizer.tokenizer.eos_token_id else last

    def _text(self, prompt: Ids, ids: Ids, request: OpenAIRequest) -> str:
        skip = request.skip_special_tokens
        return completion_text(self._tokenizer.tokenizer, prompt, ids, skip_special_tokens=skip)

    def _prompt_logprobs(
        self, prompt: Ids, scores: SparseLogprobs | None, k: int
    ) -> list[WrittenJson | None]:
        """Return vLLM's ``prompt_logprobs``: each prompt token and the k most probable ones there.

        The rank of a token outside the top-k is given as k + 1, the least that it can be.
        """
        entries: list[WrittenJson | None] = [None]  # the first token has no log-prob
        if scores is None:
            return entries
        for t, next_id in enumerate(prompt[1:].tolist()):
            named = {next_id: (float(scores.next_token_logprob[t]), k + 1)}
            top = zip(scores.token_ids[t].tolist(), scores.logprobs[t].tolist(), strict=True)
            for rank, (token_id, logprob) in enumerate(top, start=1):
                if rank <= k or token_id == next_id:
                    named[token_id] = (logprob, rank)
            entry = {
                str(token_id): {
                    "logprob": max(logprob, LOWEST),
                    "rank": rank,
                    "decoded_token": self._tokenizer.token(token_id),
                }
                for token_id, (logprob, rank) in named.items()
            }
            entries.append(WrittenJson(json.dumps(entry)))
        return entries
