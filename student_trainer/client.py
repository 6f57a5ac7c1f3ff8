"""The `TeacherClient`: a served teacher in a notebook or in your own training loop."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from shared.errors import ConfigurationError, DatasetError, InvalidRequestError
from shared.protocol import Completion, InfoResponse, LogprobDtype
from shared.sparse import SparseLogprobs
from shared.text import completion_text
from student_trainer.config.arguments import DataArguments, TeacherArguments
from student_trainer.config.checks import api_key_of, check_teacher
from student_trainer.config.keywords import keywords_in_errors
from student_trainer.data.end_tokens import stop_token_ids
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.sample import Example, Sample
from student_trainer.data.tokenize import tokenize_rows
from student_trainer.losses import SparseDistribution
from student_trainer.model.load import check_loaded_tokenizer, tokenizer_from
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution
from student_trainer.teacher.base import Sampling, ScoreOptions, sequence_of
from student_trainer.teacher.compatible import check_vocabulary
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher

Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """A sequence, and the teacher's distribution at each of its T completion tokens.

    Attributes:
        sample: token_ids [L] uint32, completion_start and completion_ids [T], T = L −
            completion_start; and whether the completion was ``truncated`` by a limit.
        scores: numpy arrays, in nats: token_ids [T, k] uint32, logprobs [T, k], and in float32
            next_token_logprob [T], of the token that came next, and tail_logprob [T], of all the
            mass on tokens that are not named.
        tokenizer: the client's, for `text`; None if it has none.
    """

    sample: Sample
    scores: SparseLogprobs
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        positions, k = self.scores.token_ids.shape
        cut = ", truncated" if self.sample.truncated else ""
        return f"Scored({positions} tokens, k={k}, perplexity {self.perplexity:.3g}{cut})"

    @property
    def perplexity(self) -> float:
        """The teacher's perplexity of the completion, of its T tokens."""
        return float(np.exp(-self.scores.next_token_logprob.mean(dtype=np.float64)))

    @property
    def text(self) -> str:
        """The completion as text, without special tokens.

        Raises:
            ConfigurationError: the client has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigurationError(
                "token ids travel, never text: give TeacherClient tokenizer= to read the text of "
                "what it returns"
            )
        return completion_text(self.tokenizer, self.sample.prompt_ids, self.sample.completion_ids)


def teacher_distribution(scored: Sequence[Scored], vocab_size: int) -> SparseDistribution:
    """Return the teacher's distributions of all completions, as the losses take them.

    Args:
        scored: what `TeacherClient.score` or `generate` returned.
        vocab_size: the smaller of the student's and the teacher's vocabulary; teacher mass outside
            goes to the tail.

    Returns:
        N = ΣT positions, one completion after another: token_ids [N, K] int64, logprobs [N, K] and
        tail_logprob [N] float32, on the CPU. The support is the top-k joined with the token that
        came next.
    """
    samples = [ScoredSample(one.sample, one.scores) for one in scored]
    return sparse_distribution(samples, vocab_size)


# Flags of the trainer that are other keywords, or none, of the client.
_keywords_in_errors = partial(
    keywords_in_errors,
    {"absent_timeout": "absent_timeout", "top_k_logprobs": "top_k"},
)


class TeacherClient:
    """A client of a served teacher, which scores sequences and generates completions.

    It closes itself when nothing refers to it any more; a ``with`` block or `close` does so sooner.
    The first call waits until the teacher is ready.
    Work of any size is cut to the teacher's limits; a request that fails is tried again until
    ``teacher_timeout``. Safe to use from several threads.

    Args:
        teacher_url: address of a teacher server, such as ``http://localhost:8000``, or several of
            replicas.
        tokenizer: the student's, or its folder or Hub id. Rows of text need it; one with another
            vocabulary than the teacher's is refused.
        teacher_api_key_file: file that holds the API key; by default the environment variable
            ``TEACHER_API_KEY`` is the key, if it is set.
        teacher_timeout: seconds to wait for the teacher, at first and in each request.
        absent_timeout: seconds to wait where nothing listens at the address; a server that loads
            its model listens, and is waited for until ``teacher_timeout``.
        teacher_logprob_dtype: of the top-k on the wire and in the answer. float16 is a third
            smaller, and what `distill` uses by default.

    Raises:
        ConfigurationError: an invalid address or key.

    Every other call raises a `SparseGKDError`: `TeacherUnreachableError`,
    `TeacherUnauthorizedError`, `TokenizerMismatchError`, `TeacherAnswerError` for an answer that
    cannot be right, `TeacherChangedError` once another model answers, `InvalidRequestError` for
    what the teacher cannot do, and `PayloadTooLargeError` or `DeadlineExceededError` for one
    sequence that is too much alone.
    """

    @_keywords_in_errors()
    def __init__(
        self,
        teacher_url: str | Sequence[str],
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        teacher_api_key_file: str | None = None,
        teacher_timeout: float = 600.0,
        absent_timeout: float = 10.0,
        teacher_logprob_dtype: LogprobDtype = "float32",
    ) -> None:
        flags = TeacherArguments(
            teacher_url=[teacher_url] if isinstance(teacher_url, str) else list(teacher_url),
            teacher_api_key_file=teacher_api_key_file,
            teacher_timeout=teacher_timeout,
            teacher_logprob_dtype=teacher_logprob_dtype,
        )
        check_teacher(flags)
        self.tokenizer = None if tokenizer is None else tokenizer_from(tokenizer)
        self._teacher = SparseGkdTeacher(
            flags.teacher_url or [],
            timeout=teacher_timeout,
            logprob_dtype=teacher_logprob_dtype,
            api_key=api_key_of(flags),
            absent_timeout=absent_timeout,
        )
        self._close = weakref.finalize(self, self._teacher.close)

    def __repr__(self) -> str:
        known = f", {self.info.teacher.model}" if self._teacher.connected else ""
        return f"TeacherClient({', '.join(self._teacher.urls)}{known})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and drop the requests under way."""
        self._close()

    @cached_property
    @_keywords_in_errors()
    def info(self) -> InfoResponse:
        """The teacher's identity, vocabulary, limits and capabilities."""
        info = self._teacher.connect()
        if self.tokenizer is not None:
            check_loaded_tokenizer(self.tokenizer)
            check_vocabulary(self.tokenizer, len(self.tokenizer), info)
        return info

    @property
    def _connected(self) -> SparseGkdTeacher:
        """The teacher, whose vocabulary is known to be the tokenizer's."""
        _ = self.info
        return self._teacher

    @_keywords_in_errors()
    def score(
        self,
        sequences: Sequence[Row | tuple[Ids, int]],
        *,
        top_k: int = 64,
        temperature: float = 1.0,
    ) -> list[Scored]:
        """Return the teacher's distribution at each token of the completions.

        Args:
            sequences: rows as `distill` reads them, such as ``{"prompt": …, "completion": …}`` or
                ``{"messages": […]}``, which become the same ids as in training, end token
                included; or (token_ids [L], completion_start) pairs.
            top_k: most probable tokens at each position.
            temperature: divides the teacher's logits.

        Returns:
            One for each sequence; `teacher_distribution` makes of them what the losses take.

        Raises:
            DatasetError: a row that has no completion, or cannot be tokenized.
            ConfigurationError: rows of text without a tokenizer.
        """
        samples = [self._sample(number, sequence) for number, sequence in enumerate(sequences)]
        pairs = [(sample.token_ids, sample.completion_start) for sample in samples]
        scores = self._connected.score(pairs, ScoreOptions(top_k, temperature))
        return [
            Scored(sample, score, self.tokenizer)
            for sample, score in zip(samples, scores, strict=True)
        ]

    @_keywords_in_errors()
    def generate(
        self,
        prompts: Sequence[str | Row | Ids],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_k: int = 64,
        score_temperature: float = 1.0,
    ) -> list[Scored]:
        """Return a completion for each prompt, generated and scored by the teacher in one pass.

        Args:
            prompts: text as it stands, rows (``{"messages": […]}`` for the chat template), or
                token ids [P].
            max_new_tokens: longest completion, in tokens.
            temperature: of the sampling; 0 is greedy.
            seed: a completion is a function of it, of the prompt and of the sampling.
            stop_token_ids: each ends a completion, as its last token; by default those that end one
                in training: of the tokenizer, if there is one, and of the teacher.
            top_k, score_temperature: of the scores, as in `score`.

        Returns:
            One for each prompt; its ``sample.completion_ids`` is what the teacher wrote, its end
            token included, and ``sample.truncated`` that ``max_new_tokens`` cut it.

        Raises:
            As `score`.
        """
        prompt_ids = [self._prompt(number, prompt) for number, prompt in enumerate(prompts)]
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_token_ids=self._stop_ids() if stop_token_ids is None else stop_token_ids,
            top_k=top_k,
            score_temperature=score_temperature,
        )
        completions = self._connected.generate(prompt_ids, sampling)
        return [
            _scored(prompt, completion, self.tokenizer)
            for prompt, completion in zip(prompt_ids, completions, strict=True)
        ]

    def _sample(self, number: int, sequence: Row | tuple[Ids, int]) -> Sample:
        if isinstance(sequence, Mapping):
            example = self._example(number, sequence)
            if example.sample is None:
                raise DatasetError(f"{example.name} has no completion to score")
            return example.sample
        token_ids, start = _ids(sequence[0]), sequence[1]
        if not 0 < start < len(token_ids):
            raise InvalidRequestError(
                f"sequence {number}: completion_start {start} must be from 1 to "
                f"{len(token_ids) - 1}, a token before it and one after",
                field="completion_start",
            )
        learned = np.ones(len(token_ids) - start, dtype=bool)
        return Sample(token_ids, start, learned, source="dataset")

    def _prompt(self, number: int, prompt: str | Row | Ids) -> NDArray[np.uint32]:
        row = {"prompt": prompt} if isinstance(prompt, str) else prompt
        return self._example(number, row).prompt_ids if isinstance(row, Mapping) else _ids(row)

    def _example(self, number: int, row: Row) -> Example:
        if self.tokenizer is None:
            raise ConfigurationError(
                "token ids travel, never text: give TeacherClient the student's tokenizer, or "
                "token ids in the place of rows"
            )
        [example] = tokenize_rows(
            [(f"row {number}", dict(row))],
            RowTokenizer(
                self.tokenizer,
                tuple(self._stop_ids()),
                # A special token spelled in plain text is that token, as in vLLM's completions.
                DataArguments(split_special_tokens=False),
                self.info.max_model_len,
            ),
            remedy="That is the teacher's context",
            progress=False,
        )
        return example

    def _stop_ids(self) -> list[int]:
        own = self.info.eos_token_ids
        if self.tokenizer is None:
            return own
        return stop_token_ids(self.tokenizer, GenerationConfig(eos_token_id=own))


def _ids(token_ids: Ids) -> NDArray[np.uint32]:
    return np.asarray(token_ids, dtype=np.uint32)


def _scored(
    prompt: NDArray[np.uint32], completion: Completion, tokenizer: PreTrainedTokenizerBase | None
) -> Scored:
    assert completion.scores is not None  # `SparseGkdTeacher` has checked it
    token_ids, start = sequence_of(prompt, completion)
    learned = np.ones(len(completion.token_ids), dtype=bool)
    cut = completion.finish_reason == "length"
    sample = Sample(token_ids, start, learned, source="teacher", truncated=cut)
    return Scored(sample, completion.scores, tokenizer)
