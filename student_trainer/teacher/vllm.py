"""The client of a stock `vllm serve` as teacher, through vLLM's ``prompt_logprobs``.

It has a price: log-probs of the prompt's positions are computed and sent too, every log-prob is
some 70 bytes of JSON, and nothing proves that the teacher's vocabulary is the student's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidRequestError, TeacherChangedError
from shared.protocol import Completion, InfoResponse, Limits
from shared.sparse import SparseLogprobs
from student_trainer.teacher.base import (
    Sampling,
    ScoreOptions,
    Sequences,
    check_all_scores,
    check_completion,
    sequence_of,
    with_scores,
)
from student_trainer.teacher.deprecated import former_score_parameters
from student_trainer.teacher.http import ServerKind
from student_trainer.teacher.replicas import Replicas, connected_info
from student_trainer.teacher.retry import Unreachable
from student_trainer.teacher.split import split_and_send
from student_trainer.teacher.vllm_json import (
    Choice,
    read_choices,
    read_completion,
    read_scores,
    request_json,
)
from student_trainer.teacher.vllm_probe import (
    PROBED_TOKENS,
    check_tokenizer,
    check_top_k,
    count_token_ids,
    describe,
)

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

SERVER = ServerKind("application/json", ready="/health", start="vllm serve MODEL")

# Limits an answer to some 75 MB of JSON, because all positions are sent, the prompts' too.
_REQUEST_LIMITS = (1024, 262_144, 1 << 20)  # sequences, tokens, log-probs


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
        model: the model to ask, an adapter or the base; None for ``name`` if it is served, or for
            the base.
        name: the teacher's name, or empty.
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
        model: str | None = None,
        name: str = "",
    ) -> None:
        self._wanted_model, self._name = model, name
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
            name=name,
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
        """Run this teacher's `score` or `generate` in a thread."""
        return self._replicas.submit(call, *arguments, **options)

    def take_traffic(self) -> tuple[int, int]:
        """Return (bytes received, completion tokens scored) since the last call."""
        return self._replicas.traffic.take()

    def take_lookups(self) -> tuple[int, int, int]:
        """Return zeros, because there is no cache."""
        return 0, 0, 0

    def ready(self) -> bool:
        """Return whether `connect` need not wait; where it must, log for whom."""
        return self._replicas.ready()

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
        model = self.info.teacher.model

        def check(url: str) -> None:
            check_tokenizer(self._replicas.http, url, model, self._tokenizer)
            check_top_k(self._replicas.http, url, model, self._top_k)

        def count(url: str) -> int:
            return count_token_ids(self._replicas.http, url, model, self._rows)

        for url in urls:
            self._replicas.call_ready(url, check)
        vocab_size = self._replicas.call_ready(urls[0], count)
        self._info = self.info.model_copy(update={"vocab_size": vocab_size})
        logger.warning(
            "--teacher_protocol vllm: %s serves %s with vLLM %s, which reports no fingerprints: "
            "nothing proves that its weights are those you mean, or its vocabulary the student's. "
            "Checked are its name, its context (%d), how many token ids it knows (%d), and how it "
            "tokenizes %d tokens. `teacher-server serve` lets all of it be checked",
            urls[0], self.info.teacher.model, self.info.teacher.version,
            self.info.max_model_len + 1, vocab_size, min(len(self._tokenizer), PROBED_TOKENS),
        )  # fmt: skip
        return self.info

    @former_score_parameters
    def score(
        self,
        sequences: Sequences,
        options: ScoreOptions,
        *,
        requested: Sequence[NDArray[np.uint32]] | None = None,
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
        if options.sample_seed is not None:
            raise InvalidRequestError(
                "vLLM draws no support; use `teacher-server serve`", field="sample_seed"
            )
        if options.temperature != 1.0:
            raise InvalidRequestError(
                f"temperature {options.temperature}: vLLM never applies a temperature to the "
                "log-probs of a prompt; use 1.0, or `teacher-server serve`",
                field="temperature",
            )
        top_k = options.top_k
        costs = [(1, len(ids) + 1, len(ids) * (top_k + 1)) for ids, _ in sequences]

        def send(first: int, last: int) -> list[SparseLogprobs]:
            part = sequences[first:last]
            url, choices = self._complete(
                [ids for ids, _ in part], max_tokens=1, temperature=0.0, prompt_logprobs=top_k
            )
            scores = [
                read_scores(choice, ids, start, top_k=top_k, vocab_size=self.info.vocab_size)
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
            completions = [read_completion(choice) for choice in choices]
            for number, completion in enumerate(completions, first):
                check_completion(
                    f"{url}: completion {number}",
                    completion,
                    longest=sampling.max_new_tokens,
                    vocab_size=self.info.vocab_size,
                )
            return completions

        completions = split_and_send(costs, _REQUEST_LIMITS, send)
        if sampling.scoring is not None:
            sequences = [sequence_of(p, c) for p, c in zip(prompts, completions, strict=True)]
            scores = self.score(sequences, sampling.scoring)
            completions = with_scores(completions, scores)
        return completions

    def _complete(
        self, prompts: Sequence[NDArray[np.uint32]], *, max_tokens: int, **options: Any
    ) -> tuple[str, list[Choice]]:
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
            lambda url: (
                url,
                request_json(self._replicas.http, url, "POST", "/v1/completions", body),
            ),
            lambda: tokens,
        )
        model = self.info.teacher.model
        return url, read_choices(url, answer, model=model, count=len(prompts))

    def _get_info(self, url: str) -> InfoResponse:
        sequences, tokens, logprobs = _REQUEST_LIMITS
        limits = Limits(
            max_sequences=sequences,
            max_tokens=tokens,
            max_logprobs=logprobs,
            max_top_k=self._top_k,
        )
        return describe(
            self._replicas.http,
            url,
            tokenizer=self._tokenizer,
            rows=self._rows,
            limits=limits,
            model=self._wanted_model,
            name=self._name,
        )

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
