"""A teacher with a cache of its answers: a request is sent only if the cache has no answer.

A score depends only on the teacher and the request, so its key is a hash of both. A completion's
key is the prompt, seed and sampling; its scores have the same keys as if the sequence had been
scored, so it does not matter which request was first.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared import codec
from shared.errors import TeacherChangedError, TeacherUnreachableError
from shared.protocol import Completion, InfoResponse, LogprobDtype
from shared.sparse import SparseLogprobs
from student_trainer.teacher.base import (
    Sampling,
    ScoreOptions,
    Sequences,
    check_completion,
    check_info,
    check_scores,
    sequence_of,
    with_scores,
)
from student_trainer.teacher.deprecated import former_score_parameters
from student_trainer.teacher.records import UNUSABLE, CheckedRecords, Reader, dump, load
from student_trainer.teacher.replicas import connected_info
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from student_trainer.teacher.sparse_gkd_messages import requested_width
from student_trainer.teacher.store import AnswerStore

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

OneSequence: TypeAlias = tuple[NDArray[np.uint32], int]  # token_ids [L], completion_start

_NAME = "--teacher_cache"
_FORMAT = 1  # part of each key, so that records of another format are never found


class CachedTeacher:
    """A `Teacher` that sends another one only the requests whose answers the store lacks.

    The teacher's answers are checked before they are stored. A stored answer is used only if its
    checksum is right and it passes the same checks; else it counts as missing. Of several answers
    to one request the first is kept and returned to all callers, so that a run from its store
    repeats to the last bit.

    Args:
        teacher: not yet connected.
        store: closed with this teacher. Several teachers may share it: answers belong to a
            teacher's identity, so it may get another name or address.
        logprob_dtype: dtype of log-probs that ``teacher`` requests.
        starts_alone: `connect` succeeds without a teacher that is switched off, if the store has
            its description. It is waited for once an answer is missing.
    """

    def __init__(
        self,
        teacher: SparseGkdTeacher,
        store: AnswerStore,
        *,
        logprob_dtype: LogprobDtype,
        starts_alone: bool,
    ) -> None:
        self._teacher = teacher
        self._store = store
        self._dtype = logprob_dtype
        self._starts_alone = starts_alone
        self._info: InfoResponse | None = None
        self._connected = False
        self._connecting = threading.Lock()
        self._records = CheckedRecords(store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client and the store; requests in flight fail."""
        self._teacher.close()
        self._store.close()

    def ready(self) -> bool:
        """Return whether `connect` need not wait; where it must, log for whom."""
        known = self._noted_info() if self._starts_alone else None
        return (known is not None and self._teacher.switched_off()) or self._teacher.ready()

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and return the description, as `Teacher.connect`."""
        known = self._noted_info() if self._starts_alone else None
        if known is not None and self._teacher.switched_off():
            logger.warning(
                "The teacher at %s is switched off: the answers of %s come from --teacher_cache, "
                "and it is waited for only if one is missing",
                ", ".join(self._teacher.urls), known.teacher,
            )  # fmt: skip
            self._info = known
            return known
        self._info = self._teacher.connect()
        self._connected = True
        self._note_info(self._info)
        return self._info

    @property
    def info(self) -> InfoResponse:
        return connected_info(self._info)

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def live(self) -> SparseGkdTeacher:
        return self._ensure_connected("no answer to this request is")

    def require(self, missing: int, wanted: int) -> None:
        """Wait for the teacher now if any answer that a run will need is missing.

        Raises:
            TeacherUnreachableError: it is not ready in time; says how many answers are missing.
        """
        if missing:
            self._ensure_connected(f"{missing} of {wanted} answers that this run needs are missing")

    def submit(
        self, call: Callable[P, list[R]], *arguments: P.args, **options: P.kwargs
    ) -> Future[list[R]]:
        """Run this teacher's `score` or `generate` in a thread."""
        return self._teacher.submit(call, *arguments, **options)

    def take_traffic(self) -> tuple[int, int]:
        """Return (bytes received, completion tokens scored) since the last call."""
        return self._teacher.take_traffic()

    def take_lookups(self) -> tuple[int, int, int]:
        """Return (cache lookups, answers found, corrupt answers) since the last call."""
        return self._records.take_lookups()

    @former_score_parameters
    def score(
        self,
        sequences: Sequences,
        options: ScoreOptions,
        *,
        requested: Sequence[NDArray[np.uint32]] | None = None,
    ) -> list[SparseLogprobs]:
        """Return the distributions at every completion position, as `Teacher.score`."""
        if options.sample_seed is not None:  # new in each step, so the request never repeats
            return self.live.score(sequences, options, requested=requested)
        return self._scores(sequences, options, requested, {})

    def _scores(
        self,
        sequences: Sequences,
        options: ScoreOptions,
        requested: Sequence[NDArray[np.uint32]] | None,
        known: Mapping[bytes, SparseLogprobs],
    ) -> list[SparseLogprobs]:
        """Return the scores of `score`, of which ``known`` holds some by key."""
        ids = [None] * len(sequences) if requested is None else list(requested)
        keys = [
            self._score_key(sequence, options, more)
            for sequence, more in zip(sequences, ids, strict=True)
        ]
        widths = map(requested_width, ids)
        requests = dict(zip(keys, zip(sequences, widths, strict=True), strict=True))
        read = self._score_reader(requests, options.top_k)
        found = {**known, **self._records.look_up([key for key in keys if key not in known], read)}
        missing = _first_missing(keys, found)
        if missing:
            scores = self._ensure_connected(
                f"{len(missing)} of {len(keys)} scores are missing"
            ).score(
                [sequences[i] for i in missing],
                options,
                requested=None if requested is None else [requested[i] for i in missing],
            )
            new = {keys[i]: score for i, score in zip(missing, scores, strict=True)}
            found |= self._records.add(new, read)
        return [found[key] for key in keys]

    def generate(
        self, prompts: Sequence[NDArray[np.uint32]], sampling: Sampling
    ) -> list[Completion]:
        """Return a completion of each prompt [P], as `Teacher.generate`."""
        scoring = sampling.scoring
        keys = [self._completion_key(prompt, sampling) for prompt in prompts]
        read = self._completion_reader(sampling)
        found = self._records.look_up(keys, read)
        missing = _first_missing(keys, found)
        fresh: dict[bytes, SparseLogprobs] = {}  # scores that came with new completions
        if missing:
            missing_prompts = [prompts[i] for i in missing]
            completions = self._ensure_connected(
                f"{len(missing)} of {len(keys)} completions are missing"
            ).generate(missing_prompts, sampling)
            new: dict[bytes, Completion] = {}
            scored: dict[bytes, tuple[OneSequence, int]] = {}
            for i, completion in zip(missing, completions, strict=True):
                new[keys[i]] = completion.model_copy(update={"scores": None})
                if completion.scores is not None and scoring is not None:
                    sequence = sequence_of(prompts[i], completion)
                    key = self._score_key(sequence, scoring)
                    fresh[key], scored[key] = completion.scores, (sequence, 0)
            fresh = self._records.add(fresh, self._score_reader(scored, sampling.top_k or 0))
            found |= self._records.add(new, read)
        written = [found[key] for key in keys]
        if scoring is None:
            return written
        sequences = [sequence_of(p, c) for p, c in zip(prompts, written, strict=True)]
        scores = self._scores(sequences, scoring, None, fresh)
        return with_scores(written, scores)

    def count_scores(self, sequences: Sequences, options: ScoreOptions) -> int:
        """Return for how many of the sequences `score` needs no teacher."""
        return self._store.count([self._score_key(s, options) for s in sequences])

    def count_completions(self, prompts: Sequence[NDArray[np.uint32]], sampling: Sampling) -> int:
        """Return for how many of the prompts `generate` needs no teacher."""
        keys = [self._completion_key(prompt, sampling) for prompt in prompts]
        found = self._records.read(keys, self._completion_reader(sampling))
        sequences = [
            sequence_of(prompt, found[key])
            for key, prompt in zip(keys, prompts, strict=True)
            if key in found
        ]
        scoring = sampling.scoring
        return len(sequences) if scoring is None else self.count_scores(sequences, scoring)

    def _noted_as(self) -> list[list[str]]:
        """Return the names of notes about this teacher, the surest ones first.

        They are the addresses, with the model, as a server may have several; the addresses alone,
        as the teacher may have got its model's name later; and its own name.
        """
        urls, name = self._teacher.urls, self._teacher.name
        model = self._teacher.named_model or name
        found = [[f"{url}#{model}" for url in urls]] if model else []
        return [*found, list(urls), *([[f"{name}="]] if name else [])]

    def _note_info(self, info: InfoResponse) -> None:
        """Store the description under every name by which it is looked up."""
        with_model, *others = self._noted_as()
        first = not info.models or info.teacher == info.models[0]
        named = [note for notes in others for note in notes if first or note.endswith("=")]
        for note in [*with_model, *named]:
            self._store.note(note, dump(info))

    def _noted_info(self) -> InfoResponse | None:
        """Return the stored description of this teacher; None if it is unknown.

        Without one for its addresses or name, the only one in the store is used, if it describes
        the teacher that is meant.
        """
        notes = self._store.notes()
        found: set[bytes] = set()
        for names in self._noted_as():
            found = found or {notes[name] for name in names if name in notes}
        found = found or set(notes.values())
        if len(found) != 1:
            return None
        try:
            known = load(InfoResponse, found.pop())
            check_info(_NAME, known)
        except UNUSABLE:
            logger.warning("The teacher cache's note of its teacher is corrupt, and is not used")
            return None
        return self._teacher.meant_by(known)

    def _ensure_connected(self, why: str) -> SparseGkdTeacher:
        """Return the teacher itself, after waiting for it if `connect` did not.

        Args:
            why: the reason to need it, for messages.

        Raises:
            TeacherUnreachableError: it is not ready in time.
            TeacherChangedError: it is not the one whose answers are stored.
        """
        with self._connecting:
            if not self._connected:
                logger.warning("The teacher is waited for: %s in --teacher_cache", why)
                try:
                    info = self._teacher.connect()
                except TeacherUnreachableError as error:
                    raise TeacherUnreachableError(
                        f"{why} in --teacher_cache: {error}. `student-trainer precompute` with the "
                        "same flags fills the cache"
                    ) from error
                if info.teacher != self.info.teacher:
                    raise TeacherChangedError(
                        f"{why} in --teacher_cache, and the teacher is another one now: it was "
                        f"{self.info.teacher}, it is {info.teacher}. Bring the first one back, or "
                        "start again to request everything from this one"
                    )
                self._connected = True
        return self._teacher

    def _score_reader(
        self, requests: Mapping[bytes, tuple[OneSequence, int]], top_k: int
    ) -> Reader[SparseLogprobs]:
        """Return a reader of scores.

        Args:
            requests: for each key the sequence, and the number of requested ids at each position.
        """

        def read(key: bytes, record: bytes) -> SparseLogprobs:
            (sequence, width), score = requests[key], load(SparseLogprobs, record)
            vocab_size = self.info.vocab_size
            check_scores(_NAME, score, sequence, top_k=top_k, width=width, vocab_size=vocab_size)
            return score

        return read

    def _completion_reader(self, sampling: Sampling) -> Reader[Completion]:
        def read(key: bytes, record: bytes) -> Completion:
            completion = load(Completion, record)
            longest, vocab_size = sampling.max_new_tokens, self.info.vocab_size
            check_completion(f"{_NAME}: it", completion, longest=longest, vocab_size=vocab_size)
            return completion

        return read

    def _score_key(
        self,
        sequence: tuple[NDArray[np.uint32], int],
        options: ScoreOptions,
        requested: NDArray[np.uint32] | None = None,
    ) -> bytes:
        ids, start = np.asarray(sequence[0], np.uint32), int(sequence[1])
        top_k, temperature = int(options.top_k), float(options.temperature)
        return self._key("score", ids, start, top_k, temperature, requested, self._dtype)

    def _completion_key(self, prompt: NDArray[np.uint32], sampling: Sampling) -> bytes:
        return self._key(
            "completion",
            np.asarray(prompt, np.uint32),
            int(sampling.max_new_tokens),
            float(sampling.temperature),
            int(sampling.seed),
            sorted({int(i) for i in sampling.stop_token_ids}),
            self.info.eos_token_ids,
        )

    def _key(self, *request: Any) -> bytes:
        encoded = codec.encode([_FORMAT, self.info.teacher.model_dump(), *request])
        return hashlib.sha256(encoded).digest()


def _first_missing(keys: Sequence[bytes], found: Mapping[bytes, object]) -> list[int]:
    """Return the index of the first occurrence of each key that was not found."""
    places: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        if key not in found:
            places.setdefault(key, place)
    return list(places.values())
