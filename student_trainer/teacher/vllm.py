"""The client of a stock `vllm serve` as teacher, through vLLM's ``prompt_logprobs``.

It has a price: log-probs of the prompt's positions are computed and sent too, every log-prob is
some 70 bytes of JSON, and nothing proves that the teacher's vocabulary is the student's.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.errors import (
    ConfigurationError,
    InvalidRequestError,
    MalformedRequestError,
    TeacherAnswerError,
    TeacherChangedError,
    TokenizerMismatchError,
)
from shared.identity import tokenizer_identity
from shared.protocol import (
    PROTOCOL_VERSION,
    Capabilities,
    Completion,
    InfoResponse,
    Limits,
    TeacherIdentity,
)
from shared.sparse import SparseLogprobs
from shared.tokenizer_file import PROBES
from student_trainer.teacher.base import (
    Sampling,
    Sequences,
    check_all_scores,
    check_completion,
    check_info,
    connected_info,
    sequence_of,
    with_scores,
)
from student_trainer.teacher.http import ServerKind
from student_trainer.teacher.replicas import Replicas
from student_trainer.teacher.retry import Unreachable
from student_trainer.teacher.split import split_and_send

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

SERVER = ServerKind("application/json", ready="/health", start="vllm serve MODEL")

_PROBED_TOKENS = 4096
# Limits an answer to some 75 MB of JSON, because all positions are sent, the prompts' too.
_REQUEST_LIMITS = (1024, 262_144, 1 << 20)  # sequences, tokens, log-probs
# A tail mass below this cannot be told from 0, because the log-probs are float32.
_RESOLUTION = 2.0**-24
_MAX_VOCABULARY = 1 << 24
_ROUNDING_ABOVE_ZERO = 0.01  # rounding may raise a log-prob of 0 to this


class VllmTeacher:
    """A `Teacher` client of vLLM's own OpenAI-style server.

    vLLM reports neither fingerprint nor vocabulary. `connect` checks what can be checked;
    ``info`` holds the student's tokenizer in place of the teacher's, and a warning says so. An
    answer names the model only, so other weights under the same name are not noticed.

    Args:
        urls: addresses of replicas of one teacher, such as ``http://host:8000``.
        tokenizer: the student's tokenizer.
        rows: size of the student's output layer, in token ids.
        top_k: log-probs that will be requested at each position.
        timeout: seconds to wait for a teacher: at `connect`, and for each request with retries.
        accept_change: continue when a replica comes back with another version of vLLM.
        api_key: one of vLLM's ``--api-key``.
        unreachable: as in `student_trainer.teacher.replicas.Replicas`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        tokenizer: Any,
        rows: int,
        top_k: int,
        timeout: float = 600.0,
        accept_change: bool = False,
        api_key: str | None = None,
        unreachable: Unreachable = "wait",
    ) -> None:
        self.accept_change = accept_change
        self._tokenizer = tokenizer
        self._rows = rows
        self._top_k = top_k
        self._info: InfoResponse | None = None
        self._replicas = Replicas(
            urls,
            SERVER,
            timeout=timeout,
            rejoins=self._rejoins,
            api_key=api_key,
            unreachable=unreachable,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client; requests in flight fail."""
        self._replicas.close()

    @property
    def info(self) -> InfoResponse:
        """The teacher's description of itself, known since `connect`."""
        return connected_info(self._info)

    @property
    def connected(self) -> bool:
        return self._info is not None

    @property
    def live(self) -> Self:
        return self

    def submit(
        self, call: Callable[P, list[R]], *arguments: P.args, **options: P.kwargs
    ) -> Future[list[R]]:
        return self._replicas.submit(call, *arguments, **options)

    def take_traffic(self) -> tuple[int, int]:
        return self._replicas.traffic.take()

    def take_lookups(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and check everything that vLLM reports.

        It checks that every address serves the same model with the same version, the tokenization
        of some 4,000 tokens from all over the vocabulary and of every special token, the number of
        token ids that the model knows, and that ``top_k`` log-probs are served.

        Raises:
            TeacherUnreachableError: a replica is not ready within the timeout.
            TeacherChangedError: replicas differ.
            TokenizerMismatchError: teacher and student tokenize differently.
            ConfigurationError: vLLM serves fewer log-probs; names the flag that raises its limit.
            TeacherAnswerError: this is not vLLM.
        """
        self._info = self._replicas.connect(self._get_info, self._info)
        urls = self._replicas.urls
        for url in urls:
            self._replicas.call_ready(url, self._check_tokenizer)
            self._replicas.call_ready(url, self._check_top_k)
        vocab_size = self._replicas.call_ready(urls[0], self._count_token_ids)
        self._info = self.info.model_copy(update={"vocab_size": vocab_size})
        logger.warning(
            "--teacher_protocol vllm: %s serves %s with vLLM %s, which reports no fingerprints: "
            "nothing proves that its weights are those you mean, or its vocabulary the student's. "
            "Checked are its name, its context (%d), how many token ids it knows (%d), and how it "
            "tokenizes %d tokens. `teacher-server serve` lets all of it be checked",
            urls[0], self.info.teacher.model, self.info.teacher.version,
            self.info.max_model_len + 1, vocab_size, min(len(self._tokenizer), _PROBED_TOKENS),
        )  # fmt: skip
        return self.info

    def score(
        self,
        sequences: Sequences,
        *,
        top_k: int,
        temperature: float = 1.0,
        requested: Sequence[NDArray[np.uint32]] | None = None,
        sample_seed: int | None = None,
    ) -> list[SparseLogprobs]:
        """Return the teacher's distributions at every completion position, in the given order.

        Raises: as `Teacher`; `InvalidRequestError` for requested ids and a sampled support, which
            vLLM does not have, and for a temperature other than 1, which it does not apply to
            log-probs of a prompt.
        """
        if requested is not None:
            raise InvalidRequestError(
                "vLLM scores no requested ids; use `teacher-server serve`",
                field="requested_token_ids",
            )
        if sample_seed is not None:
            raise InvalidRequestError(
                "vLLM draws no support; use `teacher-server serve`", field="sample_seed"
            )
        if temperature != 1.0:
            raise InvalidRequestError(
                f"temperature {temperature}: vLLM never applies a temperature to the log-probs of "
                "a prompt; use 1.0, or `teacher-server serve`",
                field="temperature",
            )
        costs = [(1, len(ids) + 1, len(ids) * (top_k + 1)) for ids, _ in sequences]

        def send(first: int, last: int) -> list[SparseLogprobs]:
            part = sequences[first:last]
            url, choices = self._complete(
                [ids for ids, _ in part], max_tokens=1, temperature=0.0, prompt_logprobs=top_k
            )
            scores = [
                self._read_scores(choice, ids, start, top_k)
                for choice, (ids, start) in zip(choices, part, strict=True)
            ]
            vocab_size = self.info.vocab_size
            check_all_scores(url, scores, part, top_k=top_k, offset=first, vocab_size=vocab_size)
            self._replicas.traffic.count_scored(sum(map(len, scores)))
            return scores

        return split_and_send(costs, _REQUEST_LIMITS, send)

    def generate(
        self, prompts: Sequence[NDArray[np.uint32]], sampling: Sampling
    ) -> list[Completion]:
        """Return a completion of each prompt, as `Teacher.generate`, scored in a second request."""
        costs = [(1, len(ids) + sampling.max_new_tokens, 0) for ids in prompts]

        def send(first: int, last: int) -> list[Completion]:
            url, choices = self._complete(
                prompts[first:last],
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed,
                stop_token_ids=[int(i) for i in sampling.stop_token_ids],
                return_token_ids=True,
            )
            completions = [_read_completion(choice) for choice in choices]
            for number, completion in enumerate(completions, first):
                check_completion(
                    f"{url}: completion {number}",
                    completion,
                    longest=sampling.max_new_tokens,
                    vocab_size=self.info.vocab_size,
                )
            return completions

        completions = split_and_send(costs, _REQUEST_LIMITS, send)
        if sampling.top_k is not None:
            scores = self.score(
                [sequence_of(p, c) for p, c in zip(prompts, completions, strict=True)],
                top_k=sampling.top_k,
                temperature=sampling.score_temperature,
            )
            completions = with_scores(completions, scores)
        return completions

    def _complete(
        self, prompts: Sequence[NDArray[np.uint32]], *, max_tokens: int, **options: Any
    ) -> tuple[str, list[dict[str, Any]]]:
        """Return the URL that answered, and a choice of `/v1/completions` for each prompt."""
        body = {
            "model": self.info.teacher.model,
            "prompt": [ids.tolist() for ids in prompts],
            "max_tokens": max_tokens,
            # Set explicitly, because the checkpoint's generation_config.json may set other values.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            **options,
        }
        tokens = sum(len(ids) + max_tokens for ids in prompts)
        url, answer = self._replicas.call(
            lambda url: (url, self._request_json(url, "POST", "/v1/completions", body)),
            lambda: tokens,
        )
        model, choices = answer.get("model"), answer.get("choices")
        if model != self.info.teacher.model:
            raise TeacherChangedError(
                f"{self.info.teacher.model} was asked, {url} answered as {model!r:.200}; check "
                "--teacher_url"
            )
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise TeacherAnswerError(
                f"{len(prompts)} prompts were sent, {url} answered "
                f"{len(choices) if isinstance(choices, list) else f'{choices!r:.60}'} choices"
            )
        by_index = {
            choice["index"]: choice
            for choice in choices
            if isinstance(choice, dict) and isinstance(choice.get("index"), int)
        }
        if by_index.keys() != set(range(len(prompts))):
            raise TeacherAnswerError(
                f"{len(prompts)} prompts were sent, {url} answered choices of {list(by_index)}"
            )
        return url, [by_index[index] for index in range(len(prompts))]

    def _read_scores(
        self, choice: Mapping[str, Any], ids: NDArray[np.uint32], start: int, top_k: int
    ) -> SparseLogprobs:
        """Return the scores of the completion in one choice.

        vLLM names at each position its top-k and, if that is not among them, the next token. The
        tail is 1 minus their sum, in float64 from log-probs that were float32: a tail mass below
        2⁻²⁴ becomes 2⁻²⁴, and it is 0 only if the position names the whole vocabulary.
        """
        positions = choice.get("prompt_logprobs")
        if not isinstance(positions, list) or len(positions) != len(ids):
            raise TeacherAnswerError(
                f"{len(ids)} rows of prompt_logprobs were asked for, the teacher answered "
                f"{len(positions) if isinstance(positions, list) else f'{positions!r:.60}'}"
            )
        count = len(ids) - start
        token_ids = np.zeros((count, top_k), np.uint32)
        logprobs = np.zeros((count, top_k), np.float32)
        next_logprob = np.zeros(count, np.float32)
        tail = np.full(count, -np.inf, np.float32)
        for t, next_id in enumerate(ids[start:].tolist()):
            named = _read_position(positions[start + t], t, self.info.vocab_size)
            if next_id not in named or len(named) < top_k:
                raise TeacherAnswerError(
                    f"row {t} names {len(named)} tokens, {top_k} and token {next_id} were asked for"
                )
            next_logprob[t] = named[next_id]
            if len(named) < self.info.vocab_size:
                mass = math.fsum(map(math.exp, named.values()))
                tail[t] = math.log(max(1.0 - mass, _RESOLUTION))
            if len(named) > top_k:
                del named[next_id]
            top = sorted(named.items(), key=lambda item: -item[1])[:top_k]
            token_ids[t] = [token_id for token_id, _ in top]
            logprobs[t] = [logprob for _, logprob in top]
        return SparseLogprobs(
            token_ids=token_ids,
            logprobs=logprobs,
            next_token_logprob=next_logprob,
            tail_logprob=tail,
        )

    def _get_info(self, url: str) -> InfoResponse:
        """Return vLLM's description of its model, with the student's tokenizer and vocabulary."""
        models = self._request_json(url, "GET", "/v1/models").get("data")
        models = models if isinstance(models, list) else []
        own = [m for m in models if isinstance(m, dict) and m.get("parent") is None]
        length = own[0].get("max_model_len") if own else None
        if not isinstance(length, int) or length < 2:
            raise TeacherAnswerError(
                f"{url}/v1/models names no model of vLLM; start it with `vllm serve MODEL`, or use "
                "--teacher_protocol sparse-gkd for `teacher-server serve`"
            )
        info = InfoResponse(
            protocol_version=PROTOCOL_VERSION,
            teacher=TeacherIdentity(
                model=str(own[0].get("id")),
                fingerprint="unknown",
                dtype="unknown",
                backend="vllm serve",
                version=str(self._request_json(url, "GET", "/version").get("version")),
            ),
            tokenizer=tokenizer_identity(self._tokenizer),
            vocab_size=self._rows,  # until `connect` has counted the ids
            max_model_len=length - 1,  # because scoring generates one token too
            eos_token_ids=[],
            limits=Limits(
                max_sequences=_REQUEST_LIMITS[0],
                max_tokens=_REQUEST_LIMITS[1],
                max_logprobs=_REQUEST_LIMITS[2],
                max_top_k=self._top_k,
            ),
            capabilities=Capabilities(temperature=False, requested_token_ids=False, generate=True),
        )
        check_info(url, info)
        return info

    def _rejoins(self, url: str) -> bool:
        """Return whether a replica that is ready again is the same teacher as the others.

        Raises:
            TeacherChangedError: it is another teacher.
        """
        identity = self._get_info(url).teacher
        if identity == self.info.teacher:
            return True
        if self.accept_change and identity.model == self.info.teacher.model:
            logger.warning("%s is vLLM %s now", url, identity.version)
            return True
        raise TeacherChangedError(
            f"{url} is another teacher now: it was {self.info.teacher}, it is {identity}. Bring "
            "the first one back; --accept_teacher_change accepts another version of vLLM alone"
        )

    def _check_tokenizer(self, url: str) -> None:
        """Check that the teacher tokenizes text from all over the vocabulary as the student does.

        Raises:
            TokenizerMismatchError: it does not; names the first different token.
        """
        size = len(self._tokenizer)
        spread = list(range(0, size, max(1, size // _PROBED_TOKENS)))
        special = "".join(self._tokenizer.all_special_tokens)
        text = self._tokenizer.decode(spread, skip_special_tokens=True) + special
        text = "\n".join([text, *PROBES])
        ours = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": self._model_name(), "prompt": text, "add_special_tokens": False}
        theirs = self._request_json(url, "POST", "/tokenize", body).get("tokens")
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

    def _check_top_k(self, url: str) -> None:
        """Check that vLLM serves ``top_k`` log-probs.

        Raises:
            ConfigurationError: it does not; names the flag that raises its limit.
        """
        body = {"prompt": [[0, 0]], "max_tokens": 1, "prompt_logprobs": self._top_k}
        try:
            self._request_json(
                url, "POST", "/v1/completions", {"model": self._model_name(), **body}
            )
        except MalformedRequestError as error:
            raise ConfigurationError(
                f"--top_k_logprobs {self._top_k}: {url} refuses it ({error}). Restart it with "
                f"`vllm serve {self._model_name()} --max-logprobs {self._top_k}`, or lower "
                "--top_k_logprobs (vLLM's own limit is 20)"
            ) from error

    def _count_token_ids(self, url: str) -> int:
        """Return the number of token ids that vLLM accepts, by binary search.

        vLLM does not report the size of its output layer, but refuses ids beyond it.
        """
        known, unknown = 0, self._rows
        while self._accepts_id(url, unknown):
            known, unknown = unknown, 2 * unknown
            if unknown > _MAX_VOCABULARY:
                raise TeacherAnswerError(f"{url} takes any token id: this is not vLLM")
        while unknown - known > 1:
            middle = (known + unknown) // 2
            if self._accepts_id(url, middle):
                known = middle
            else:
                unknown = middle
        return unknown

    def _accepts_id(self, url: str, token_id: int) -> bool:
        body = {"model": self._model_name(), "prompt": [[token_id]], "max_tokens": 1}
        try:
            self._request_json(url, "POST", "/v1/completions", body)
        except MalformedRequestError:
            return False
        return True

    def _model_name(self) -> str:
        return self.info.teacher.model

    def _request_json(
        self, url: str, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send a JSON request to one replica, and return its answer, a JSON object."""
        data = None if body is None else json.dumps(body).encode()
        content = self._replicas.http.request(url, method, path, data)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise TeacherAnswerError(f"{url}{path} answered something else: {error}") from error
        if not isinstance(answer, dict):
            raise TeacherAnswerError(f"{url}{path} answered {type(answer).__name__}, not an object")
        return answer


def _read_position(position: Any, number: int, vocab_size: int) -> dict[int, float]:
    """Return {token id: log-prob} of one position of ``prompt_logprobs``.

    Raises:
        TeacherAnswerError: it is malformed; names its number.
    """
    try:
        named = {int(token_id): float(entry["logprob"]) for token_id, entry in position.items()}
        if len(named) == len(position) and all(
            0 <= token_id < vocab_size and not logprob > _ROUNDING_ABOVE_ZERO
            for token_id, logprob in named.items()
        ):
            return named
        raise ValueError("an id outside the vocabulary or twice, or a log-prob above 0")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TeacherAnswerError(
            f"row {number} of prompt_logprobs is malformed: {error!r:.200}"
        ) from error


def _read_completion(choice: Mapping[str, Any]) -> Completion:
    token_ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(token_ids, list) or not token_ids or reason not in ("stop", "length"):
        raise TeacherAnswerError(
            f"a completion came without token_ids or with finish_reason {reason!r:.60}; "
            "return_token_ids needs vLLM 0.10.2 or later"
        )
    try:
        return Completion.model_validate({"token_ids": token_ids, "finish_reason": reason})
    except ValidationError as error:
        raise TeacherAnswerError(
            f"a completion came with token_ids that are none: {token_ids!r:.60}"
        ) from error
