"""The interface of a teacher's client, the data that it takes, and the checks of its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import ParamSpec, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import TeacherAnswerError
from shared.printable import one_line
from shared.protocol import Completion, InfoResponse
from shared.sparse import SparseLogprobs

P = ParamSpec("P")
R = TypeVar("R")

Sequences = Sequence[tuple[NDArray[np.uint32], int]]  # (token_ids [L], completion_start) pairs

_LONGEST_NAME = 1_000  # characters


@dataclass(frozen=True)
class ScoreOptions:
    """The options of a request for scores, which are the same for all of its sequences.

    Attributes:
        top_k: log-probs at each position.
        temperature: temperature at which the teacher's logits are normalised.
        sample_seed: seed to return ``top_k`` draws instead, as in `shared.protocol.ScoreRequest`.
    """

    top_k: int
    temperature: float = 1.0
    sample_seed: int | None = None


@dataclass(frozen=True)
class Sampling:
    """The settings with which a teacher generates completions.

    Attributes:
        max_new_tokens: longest completion.
        temperature: temperature of the sampling; 0 is greedy.
        seed: seed of the sampling; a completion is a function of it and of the prompt.
        stop_token_ids: tokens that end a completion, as its last token.
        top_k: log-probs for each position, if the completions are scored too; else None.
        score_temperature: temperature at which the logits of these scores are normalised.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    stop_token_ids: Sequence[int]
    top_k: int | None = None
    score_temperature: float = 1.0

    @property
    def scoring(self) -> ScoreOptions | None:
        """The options of the completions' scores; None if they are not scored."""
        return None if self.top_k is None else ScoreOptions(self.top_k, self.score_temperature)


def sequence_of(
    prompt: NDArray[np.uint32], completion: Completion
) -> tuple[NDArray[np.uint32], int]:
    """Return (token_ids [L], completion_start), as `Teacher.score` takes them."""
    return np.append(prompt, completion.token_ids).astype(np.uint32), len(prompt)


def with_scores(
    completions: Sequence[Completion], scores: Sequence[SparseLogprobs]
) -> list[Completion]:
    """Return the completions, each with its own scores."""
    return [
        completion.model_copy(update={"scores": score})
        for completion, score in zip(completions, scores, strict=True)
    ]


def check_info(where: str, info: InfoResponse) -> None:
    """Check a teacher's description of itself.

    Raises:
        TeacherAnswerError: an end token is outside its vocabulary, or a name is too long or has
            control characters, which would corrupt a terminal or a log.
    """
    outside = [i for i in info.eos_token_ids if not 0 <= i < info.vocab_size]
    if outside:
        raise TeacherAnswerError(
            f"{where}: eos_token_ids names {outside[0]}, which is outside the teacher's vocabulary "
            f"of {info.vocab_size}. Check eos_token_id in its generation_config.json"
        )
    names = {
        **info.teacher.model_dump(),
        "tokenizer": info.tokenizer.fingerprint,
        "tokenizer's encoding": info.tokenizer.encoding or "",
    }
    for field, value in names.items():
        if len(value) > _LONGEST_NAME or not value.isprintable():
            raise TeacherAnswerError(
                f"{where}: the teacher's {field} is {one_line(value, 100)}; expected were at most "
                f"{_LONGEST_NAME} characters, none of them a control character"
            )


def no_such_model(
    url: str, model: str | None, served: Sequence[str], name: str
) -> TeacherAnswerError:
    """Return the error of a server that does not serve the model of a teacher.

    Args:
        served: the models that it serves.
        name: the teacher's, or empty.
    """
    return TeacherAnswerError(
        f"{url} serves no model {model}; it serves {', '.join(served)}. Name one of these after "
        f"the address: {f'{name}=' if name else ''}{url}#MODEL"
    )


def check_scores(
    name: str,
    score: SparseLogprobs,
    sequence: tuple[NDArray[np.uint32], int],
    *,
    top_k: int,
    width: int = 0,
    vocab_size: int,
    drawn: bool = False,
) -> None:
    """Check that scores, from a teacher or a cache, fit one sequence.

    Args:
        name: name of the sequence in the message.
        sequence: (token_ids [L], completion_start).
        top_k: requested log-probs at each of T positions, T = L − completion_start.
        width: requested ids at each position.
        vocab_size: size of the teacher's vocabulary.
        drawn: the support is drawn from the teacher.

    Raises:
        TeacherAnswerError: a wrong shape, a token id outside the vocabulary, a non-finite log-prob,
            or numbers that cannot be the distributions of this sequence.
    """
    ids, start = sequence
    expected = (len(ids) - start, top_k)
    if score.token_ids.shape != expected:
        raise TeacherAnswerError(
            f"{name}: expected top-k arrays of shape {expected}, got {score.token_ids.shape}"
        )
    found = score.requested_logprobs
    if (found.shape if found is not None else (expected[0], 0)) != (expected[0], width):
        raise TeacherAnswerError(
            f"{name}: expected log-probs of {width} requested ids in "
            f"{expected[0]} positions, got {'none' if found is None else found.shape}"
        )
    if score.token_ids.size and int(score.token_ids.max()) >= vocab_size:
        raise TeacherAnswerError(
            f"{name}: token id {int(score.token_ids.max())} is outside "
            f"the teacher's vocabulary of {vocab_size}"
        )
    score.require_finite(name)
    score.require_plausible(name, ids[start:], drawn=drawn)


def check_all_scores(
    url: str,
    scores: Sequence[SparseLogprobs],
    sequences: Sequences,
    *,
    top_k: int,
    requested: Sequence[int] | None = None,
    offset: int,
    vocab_size: int,
    drawn: bool = False,
) -> None:
    """Check that scores fit the request.

    Args:
        url: URL of the replica that answered, for messages.
        requested: number m of requested ids of each sequence; None for none.
        offset: number of the first sequence, for messages.
        vocab_size: size of the teacher's vocabulary.
        drawn: the supports are drawn from the teacher.

    Raises:
        TeacherAnswerError: a wrong number of scores, or as in `check_scores`.
    """
    if len(scores) != len(sequences):
        raise TeacherAnswerError(
            f"{len(sequences)} sequences were sent, {url} answered {len(scores)}"
        )
    widths = [0] * len(scores) if requested is None else requested
    triples = zip(scores, sequences, widths, strict=True)
    for number, (score, sequence, width) in enumerate(triples, offset):
        check_scores(
            f"{url}, sequence {number}",
            score,
            sequence,
            top_k=top_k,
            width=width,
            vocab_size=vocab_size,
            drawn=drawn,
        )


def check_completion(name: str, completion: Completion, *, longest: int, vocab_size: int) -> None:
    """Check the tokens of a completion from a teacher or a cache.

    Args:
        name: name of the completion in the message.
        longest: largest number of tokens that was requested.
        vocab_size: size of the teacher's vocabulary.

    Raises:
        TeacherAnswerError: no token, too many, or one outside the vocabulary.
    """
    ids = completion.token_ids
    if not 1 <= len(ids) <= longest or int(ids.max()) >= vocab_size:
        raise TeacherAnswerError(
            f"{name} has {len(ids)} tokens and ids up to {ids.max(initial=0)}; requested were 1 to "
            f"{longest} of a vocabulary of {vocab_size}"
        )


class Teacher(Protocol):
    """A client of a served teacher, for any protocol; safe in several threads.

    Scores are at the requested temperature. Errors of every call but `close`:
        InvalidRequestError: the teacher cannot do this; names the field and the limit.
        PayloadTooLargeError, DeadlineExceededError: one sequence alone is too much; names it.
        TeacherUnreachableError: no answer within the timeout.
        TeacherUnauthorizedError: the teacher requires a key, or another one.
        TeacherAnswerError: an answer has the wrong shape, or a non-finite log-prob.
        TeacherChangedError: another teacher answered.
    """

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and return the teacher's description.

        Raises:
            TeacherUnreachableError: a replica is not ready within the timeout.
            TeacherChangedError: the replicas are different teachers.
            TeacherAnswerError: something other than a teacher listens there.
        """
        ...

    def ready(self) -> bool:
        """Return whether `connect` need not wait; where it must, log for whom.

        Raises:
            TeacherError: waiting is of no use.
        """
        ...

    @property
    def info(self) -> InfoResponse:
        """The teacher's description of itself, known since `connect`."""
        ...

    @property
    def connected(self) -> bool:
        """The connection state: True if the teacher itself is connected, not only its cache."""
        ...

    @property
    def live(self) -> Teacher:
        """The teacher without its cache, if there is one, for requests that never repeat."""
        ...

    def score(
        self,
        sequences: Sequences,
        options: ScoreOptions,
        *,
        requested: Sequence[NDArray[np.uint32]] | None = None,
    ) -> list[SparseLogprobs]:
        """Return the teacher's distributions at every completion position, in the given order.

        Args:
            options: how many log-probs, at which temperature, and whether they are drawn.
            requested: for each sequence, ids [T, m] whose log-probs are returned too.
        """
        ...

    def generate(
        self, prompts: Sequence[NDArray[np.uint32]], sampling: Sampling
    ) -> list[Completion]:
        """Return a completion of each prompt [P], with scores if ``sampling`` has a ``top_k``."""
        ...

    def submit(
        self, call: Callable[P, list[R]], *arguments: P.args, **options: P.kwargs
    ) -> Future[list[R]]:
        """Run ``call``, which is this teacher's `score` or `generate`, in a thread."""
        ...

    def take_traffic(self) -> tuple[int, int]:
        """Return (bytes received, completion tokens scored) since the last call."""
        ...

    def take_lookups(self) -> tuple[int, int, int]:
        """Return (cache lookups, answers found, corrupt answers) since the last call."""
        ...

    def close(self) -> None:
        """Close the client; requests in flight fail."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...
