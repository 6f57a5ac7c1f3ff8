"""The requests that find out what a stock vLLM serves: what it reports, and what it does not."""

from __future__ import annotations

from typing import Any

from shared.errors import (
    ConfigurationError,
    MalformedRequestError,
    TeacherAnswerError,
    TokenizerMismatchError,
)
from shared.identity import tokenizer_identity
from shared.protocol import (
    PROTOCOL_VERSION,
    Capabilities,
    InfoResponse,
    Limits,
    TeacherIdentity,
)
from shared.tokenizer_file import PROBES
from student_trainer.teacher.base import check_info, no_such_model
from student_trainer.teacher.http import HttpClient
from student_trainer.teacher.vllm_json import request_json

PROBED_TOKENS = 4096
_MAX_VOCABULARY = 1 << 24


def describe(
    http: HttpClient,
    url: str,
    *,
    tokenizer: Any,
    rows: int,
    limits: Limits,
    model: str | None = None,
    name: str = "",
) -> InfoResponse:
    """Return vLLM's description of its model, with the student's tokenizer and vocabulary.

    Args:
        model: the model to ask; None for an adapter called ``name``, or for the base model.

    Raises:
        TeacherAnswerError: this is not vLLM, or it does not serve the model.
    """
    models = request_json(http, url, "GET", "/v1/models").get("data")
    models = models if isinstance(models, list) else []
    own = [m for m in models if isinstance(m, dict) and m.get("parent") is None]
    length = own[0].get("max_model_len") if own else None
    if not isinstance(length, int) or length < 2:
        raise TeacherAnswerError(
            f"{url}/v1/models names no model of vLLM; start it with `vllm serve MODEL`, or use "
            "--teacher_protocol sparse-gkd for `teacher-server serve`"
        )
    served = [str(m.get("id")) for m in models if isinstance(m, dict)]
    adapters = len(served) > len(own)
    wanted = model or (name if name and adapters else str(own[0].get("id")))
    if wanted not in served:
        raise no_such_model(url, wanted, served, name)
    version = request_json(http, url, "GET", "/version").get("version")
    info = InfoResponse(
        protocol_version=PROTOCOL_VERSION,
        teacher=TeacherIdentity(
            model=wanted,
            fingerprint="unknown",
            dtype="unknown",
            backend="vllm serve",
            version=str(version),
        ),
        tokenizer=tokenizer_identity(tokenizer),
        vocab_size=rows,  # until `count_token_ids` has counted them
        max_model_len=length - 1,  # because scoring generates one token too
        eos_token_ids=[],
        limits=limits,
        capabilities=Capabilities(temperature=False, requested_token_ids=False, generate=True),
    )
    check_info(url, info)
    return info


def check_tokenizer(http: HttpClient, url: str, model: str, tokenizer: Any) -> None:
    """Check that the teacher tokenizes text from all over the vocabulary as the student does.

    Raises:
        TokenizerMismatchError: it does not; names the first different token.
    """
    size = len(tokenizer)
    spread = list(range(0, size, max(1, size // PROBED_TOKENS)))
    special = "".join(tokenizer.all_special_tokens)
    text = tokenizer.decode(spread, skip_special_tokens=True) + special
    text = "\n".join([text, *PROBES])
    ours = tokenizer(text, add_special_tokens=False)["input_ids"]
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    theirs = request_json(http, url, "POST", "/tokenize", body).get("tokens")
    if theirs == ours:
        return
    if not isinstance(theirs, list):
        raise TeacherAnswerError(f"{url}/tokenize answered no tokens")
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    raise TokenizerMismatchError(
        f"teacher and student tokenize differently: of one text the teacher at {url} makes "
        f"{len(theirs)} tokens, the student {len(ours)}, and they part at token {place} "
        f"({theirs[place:][:1]} and {ours[place:][:1]}). Distil within one tokenizer family"
    )


def check_top_k(http: HttpClient, url: str, model: str, top_k: int) -> None:
    """Check that vLLM serves ``top_k`` log-probs.

    Raises:
        ConfigurationError: it does not; names the flag that raises its limit.
    """
    body = {"prompt": [[0, 0]], "max_tokens": 1, "prompt_logprobs": top_k}
    try:
        request_json(http, url, "POST", "/v1/completions", {"model": model, **body})
    except MalformedRequestError as error:
        raise ConfigurationError(
            f"--top_k_logprobs {top_k}: {url} refuses it ({error}). Restart it with "
            f"`vllm serve {model} --max-logprobs {top_k}`, or lower "
            "--top_k_logprobs (vLLM's own limit is 20)"
        ) from error


def count_token_ids(http: HttpClient, url: str, model: str, rows: int) -> int:
    """Return the number of token ids that vLLM accepts, by binary search.

    vLLM does not report the size of its output layer, but refuses ids beyond it.
    """
    known, unknown = 0, rows
    while _accepts_id(http, url, model, unknown):
        known, unknown = unknown, 2 * unknown
        if unknown > _MAX_VOCABULARY:
            raise TeacherAnswerError(f"{url} takes any token id: this is not vLLM")
    while unknown - known > 1:
        middle = (known + unknown) // 2
        if _accepts_id(http, url, model, middle):
            known = middle
        else:
            unknown = middle
    return unknown


def _accepts_id(http: HttpClient, url: str, model: str, token_id: int) -> bool:
    body = {"model": model, "prompt": [[token_id]], "max_tokens": 1}
    try:
        request_json(http, url, "POST", "/v1/completions", body)
    except MalformedRequestError:
        return False
    return True
