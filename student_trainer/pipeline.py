"""What overlaps with what: one generation batch from prompts to scored samples.

Every finished group of completions leaves for the teacher at once, so the teacher scores while the
student still generates. An off-policy batch does not depend on the weights: it is submitted one
step ahead, so the teacher scores it while this step trains.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import DatasetError
from shared.protocol import Completion
from shared.sampling import uniforms
from shared.sparse import SparseLogprobs
from student_trainer.data import Example, Sample, completed
from student_trainer.rollouts import RolloutEngine, RolloutRequest
from student_trainer.support import ScoredSample
from student_trainer.teacher import Teacher

R = TypeVar("R")


@dataclass(frozen=True)
class Method:
    """Which completions are learned from, and how the teacher scores them.

    SFT is no teacher at all; Supervised KD is lmbda 0; SeqKD is seq_kd; on-policy GKD is lmbda 1.
    """

    lmbda: float
    seq_kd: bool
    seq_kd_temperature: float
    temperature: float
    top_k: int
    max_new_tokens: int
    seed: int
    stop_ids: tuple[int, ...]

    def on_policy(self, step: int) -> bool:
        """The coin of a step: depends on seed and step alone, so it is the same on every rank."""
        return bool(uniforms("coin", self.seed, step, count=1)[0] < self.lmbda)


@dataclass
class PendingBatch:
    """A generation batch on its way: samples as far as known, answers still in flight."""

    examples: list[Example]
    on_policy: bool
    samples: dict[int, Sample] = field(default_factory=dict)
    requested: dict[int, NDArray[np.uint32]] = field(default_factory=dict)
    scores: list[tuple[list[int], Future[list[SparseLogprobs]]]] = field(default_factory=list)
    completions: list[tuple[list[int], Future[list[Completion]]]] = field(default_factory=list)


class Pipeline:
    """Turns examples into scored samples.

    Args:
        method: what to do.
        teacher: None for SFT.
        rollouts: None when no step is on-policy.
        share: gives every rank's new teacher completions to all ranks, so that each prompt is
            generated once whichever rank meets it next.
        propose: gives each sample ids [T, m] that its rows shall be scored at too, such as the
            student's own most probable ones. Called equally often on every rank.
        clock: is told seconds by name, "generating" (proposals included) and "teacher".
    """

    def __init__(
        self,
        method: Method,
        teacher: Teacher | None,
        rollouts: RolloutEngine | None,
        *,
        share: Callable[[dict[bytes, Completion]], dict[bytes, Completion]] = lambda new: new,
        propose: Callable[[Sequence[Sample]], list[NDArray[np.uint32]]] | None = None,
        clock: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self.method = method
        self.teacher = teacher
        self.rollouts = rollouts
        self._share = share
        self._propose = propose
        self._clock = clock
        self._written: dict[bytes, Completion] = {}  # SeqKD: prompt -> the teacher's completion

    def independent_of_weights(self, step: int) -> bool:
        """Whether `submit` gives the same answers before the step's weights are there."""
        if self.teacher is None:
            return True
        proposed = self._propose is not None and not self.method.seq_kd  # SeqKD's come at the end
        return not (self.method.on_policy(step) or proposed)

    def submit(self, step: int, examples: Sequence[Example]) -> PendingBatch:
        """Start a generation batch: student completions are sampled here and now.

        Raises:
            DatasetError: an off-policy row has no completion to learn from.
        """
        batch = PendingBatch(
            list(examples), self.teacher is not None and self.method.on_policy(step)
        )
        if batch.on_policy:
            self._sample_from_student(batch, step)
        elif self.method.seq_kd and self.teacher is not None:
            self._ask_teacher(batch)
        else:
            for index, example in enumerate(batch.examples):
                batch.samples[index] = dataset_sample(example)
            self._score(batch, list(batch.samples))
        return batch

    def collect(self, batch: PendingBatch) -> list[ScoredSample]:
        """Wait for the answers; scored samples in the order of the examples."""
        scores: dict[int, SparseLogprobs] = {}
        new: dict[bytes, Completion] = {}
        for indices, generated in batch.completions:
            for index, completion in zip(indices, self._wait(generated), strict=True):
                example = batch.examples[index]
                batch.samples[index] = _teacher_sample(example, completion)
                if completion.scores is not None:
                    scores[index] = completion.scores
                new[_key(example.prompt_ids)] = completion.model_copy(update={"scores": None})
        if self._scores_late(batch):
            self._score(batch, list(range(len(batch.examples))))
        for indices, scored in batch.scores:
            scores.update(zip(indices, self._wait(scored), strict=True))
        if self.method.seq_kd and not batch.on_policy:
            self._written.update(self._share(new))
        return [
            ScoredSample(batch.samples[i], scores.get(i), batch.requested.get(i))
            for i in range(len(batch.examples))
        ]

    def _wait(self, answer: Future[list[R]]) -> list[R]:
        since = time.perf_counter()
        result = answer.result()
        self._clock("teacher", time.perf_counter() - since)
        return result

    def _scores_late(self, batch: PendingBatch) -> bool:
        """Whether nothing of the batch is scored before all of it is written.

        The teacher generates and scores in one call, when the student has not seen the completion
        yet. Where the student proposes ids, SeqKD therefore scores in a second call; all samples
        of the batch at once, because how many were written before differs between ranks.
        """
        return self._propose is not None and self.method.seq_kd and not batch.on_policy

    def _sample_from_student(self, batch: PendingBatch, step: int) -> None:
        assert self.rollouts is not None
        requests = [
            RolloutRequest(example.prompt_ids, key=(self.method.seed, step, example.index))
            for example in batch.examples
        ]
        since = time.perf_counter()
        self.rollouts.sync(step)
        for group in self.rollouts.generate(requests):
            for index, rollout in group:
                batch.samples[index] = completed(
                    batch.examples[index], rollout.token_ids, "student", truncated=rollout.truncated
                )
            self._score(batch, [index for index, _ in group])
        self._clock("generating", time.perf_counter() - since)

    def _ask_teacher(self, batch: PendingBatch) -> None:
        assert self.teacher is not None
        unwritten: list[int] = []
        for index, example in enumerate(batch.examples):
            completion = self._written.get(_key(example.prompt_ids))
            if completion is None:
                unwritten.append(index)
            else:
                batch.samples[index] = _teacher_sample(example, completion)
        late = self._scores_late(batch)
        if not late:
            self._score(batch, list(batch.samples))
        if unwritten:
            future = self.teacher.submit_generate(
                [batch.examples[i].prompt_ids for i in unwritten],
                max_new_tokens=self.method.max_new_tokens,
                temperature=self.method.seq_kd_temperature,
                seed=self.method.seed,
                stop_token_ids=self.method.stop_ids,
                top_k=None if late else self.method.top_k,
                score_temperature=self.method.temperature,
            )
            batch.completions.append((unwritten, future))

    def _score(self, batch: PendingBatch, indices: list[int]) -> None:
        if self.teacher is None or not indices:
            return
        samples = [batch.samples[i] for i in indices]
        requested = None
        if self._propose is not None:
            since = time.perf_counter()
            requested = self._propose(samples)
            batch.requested.update(zip(indices, requested, strict=True))
            if not batch.on_policy:  # else it is part of the sampling's time
                self._clock("generating", time.perf_counter() - since)
        future = self.teacher.submit_score(
            [(s.token_ids, s.completion_start) for s in samples],
            top_k=self.method.top_k,
            temperature=self.method.temperature,
            requested=requested,
        )
        batch.scores.append((indices, future))


def dataset_sample(example: Example) -> Sample:
    """The dataset's own completion of the example.

    Raises:
        DatasetError: the row is a bare prompt.
    """
    if example.sample is None:
        raise DatasetError(
            f"{example.name}: no completion to learn from. Bare prompts are for distill with "
            "--lmbda 1 (the student writes the completions) or --seq_kd (the teacher does)"
        )
    return example.sample


def _teacher_sample(example: Example, completion: Completion) -> Sample:
    truncated = completion.finish_reason == "length"
    return completed(example, completion.token_ids, "teacher", truncated=truncated)


def _key(prompt_ids: NDArray[np.uint32]) -> bytes:
    return hashlib.sha256(prompt_ids.astype("<u4").tobytes()).digest()
