"""Turn OpenAI's requests into requests to score and to generate, or refuse them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from shared.errors import InvalidRequestError
from shared.protocol import GenerateRequest, InfoResponse, ScoreRequest, ScoreSequence
from shared.text import StopStrings
from shared.validation import check_generate_request, check_model, check_score_request
from teacher_server.openai.schema import ChatRequest, Ids, OpenAIRequest
from teacher_server.openai.tokenizer import ServedTokenizer, check_text

# The most log-probs of an answer: each takes some 300 bytes while it is made, and 70 in it.
MAX_LOGPROBS = 1 << 20


@dataclass(frozen=True)
class OpenAIPlan:
    """The work that one OpenAI request needs.

    Attributes:
        prompts: token ids of each prompt, [P] each.
        echo: whether the answer begins with the prompt.
        logprobs: log-probs of each generated token beside its own; None for none.
        prompt_logprobs: the same of each prompt token.
        score: the request for the log-probs of prompts with more than one token, or None.
        generate: the request for the completions, or None.
        stop: texts that end completions, or None.
    """

    request: OpenAIRequest
    prompts: list[Ids]
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    score: ScoreRequest | None
    generate: GenerateRequest | None
    stop: StopStrings | None


def make_plan(request: OpenAIRequest, tokenizer: ServedTokenizer, info: InfoResponse) -> OpenAIPlan:
    """Return the work that a request needs.

    Raises:
        NotFoundError: the request names a model that is not served.
        InvalidRequestError: the teacher of ``info`` cannot do it; names the field.
    """
    check_model(request.model, info)
    for text in request.stop:
        check_text(text, "stop")
    if isinstance(request, ChatRequest):
        prompts, source = [tokenizer.render(request, info)], "messages"
        logprobs, prompt_logprobs, echo = _chat_logprobs(request), None, False
        max_tokens = request.max_completion_tokens or request.max_tokens
        if max_tokens is None:
            max_tokens = max(1, info.max_model_len - len(prompts[0]))
    else:
        prompts, source = tokenizer.encode_prompts(request, info), "prompt"
        logprobs, prompt_logprobs = request.logprobs, request.prompt_logprobs
        echo = bool(request.echo)
        max_tokens = 16 if request.max_tokens is None else request.max_tokens
    n = request.n or 1
    echoed = logprobs if echo else None
    entries = sum(len(ids) for ids in prompts) * (_width(prompt_logprobs) + _width(echoed))
    entries += len(prompts) * max_tokens * _width(logprobs)
    if entries * n > MAX_LOGPROBS:
        raise InvalidRequestError(
            f"{entries * n} log-probs; the limit in JSON is {MAX_LOGPROBS}. Split the request, "
            "or use /v1/score",
            field="logprobs" if prompt_logprobs is None else "prompt_logprobs",
        )
    generate = score = None
    if max_tokens > 0:
        generate = _generate_request(request, prompts, max_tokens, logprobs, info, source)
    else:
        _check_nothing_generated(n, prompts, prompt_logprobs, echo)
    if prompt_logprobs is not None and request.temperature not in (None, 0, 1):
        raise InvalidRequestError(
            f"temperature {request.temperature}: prompt_logprobs are at temperature 1, and "
            "only the token generated after them would be at another; use 1 or 0, or "
            "/v1/score, which applies a temperature",
            field="temperature",
        )
    scored = [k for k in (prompt_logprobs, echoed) if k is not None]
    # Without a completion, only scoring checks the prompt.
    if scored or generate is None:
        score = _score_request(prompts, max(scored, default=0), info)
    stop = StopStrings(tuple(request.stop), request.skip_special_tokens) if request.stop else None
    return OpenAIPlan(request, prompts, echo, logprobs, prompt_logprobs, score, generate, stop)


def _width(logprobs: int | None) -> int:
    """Return the number of log-probs at a position of the answer."""
    return 0 if logprobs is None else logprobs + 1


def _check_nothing_generated(
    n: int, prompts: list[Ids], prompt_logprobs: int | None, echo: bool
) -> None:
    """Refuse ``max_tokens`` 0 where it leaves nothing to answer.

    Raises:
        InvalidRequestError: names the field.
    """
    if prompt_logprobs is None and not echo:
        raise InvalidRequestError(
            "max_tokens 0 asks for nothing without prompt_logprobs or echo", field="max_tokens"
        )
    if n > 1:
        raise InvalidRequestError(f"n {n} of nothing: max_tokens is 0", field="n")
    for index, ids in enumerate(prompts):
        if len(ids) < 2:
            raise InvalidRequestError(
                f"a prompt of {len(ids)} tokens has no row to score, and max_tokens is 0",
                field=f"prompt.{index}",
            )


def _chat_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequestError(
            f"top_logprobs {request.top_logprobs} has no effect without logprobs true",
            field="top_logprobs",
        )
    return None


def _score_request(prompts: list[Ids], k: int, info: InfoResponse) -> ScoreRequest | None:
    long = [ids for ids in prompts if len(ids) > 1]
    if not long:
        return None
    request = ScoreRequest(
        sequences=[ScoreSequence(token_ids=ids, completion_start=1) for ids in long],
        top_k=max(1, k),
    )
    with _named({"sequences": "prompt", "top_k": "prompt_logprobs"}):
        check_score_request(request, info)
    return request


def _generate_request(
    request: OpenAIRequest,
    prompts: list[Ids],
    max_tokens: int,
    logprobs: int | None,
    info: InfoResponse,
    source: str,
) -> GenerateRequest:
    made = GenerateRequest(
        prompts=prompts,
        n=request.n or 1,
        max_new_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else float(request.temperature),
        top_p=1.0 if request.top_p is None else float(request.top_p),
        sampling_top_k=max(0, request.top_k or 0),
        seed=request.seed,
        stop_token_ids=np.array(request.stop_token_ids or [], dtype=np.uint32),
        top_k=None if logprobs is None else max(1, logprobs),
    )
    top = "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"
    with _named({"prompts": source, "top_k": top}):
        check_generate_request(made, info)
    return made


@contextlib.contextmanager
def _named(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the field in a refusal to that of the request that was sent."""
    try:
        yield
    except InvalidRequestError as error:
        first, *rest = (error.field or "").split(".")
        error.field = ".".join([names.get(first, first), *rest[:1]])
        raise
