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
        clock: is told seconds by name, "generating" and "teacher".
    """

    def __init__(
        self,
        method: Method,
        teacher: Teacher | None,
        rollouts: RolloutEngine | None,
        *,
        share: Callable[[dict[bytes, Completion]], dict[bytes, Completion]] = lambda new: new,
        clock: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self.method = method
        self.teacher = teacher
        self.rollouts = rollouts
        self._share = share
        self._clock = clock
        self._written: dict[bytes, Completion] = {}  # SeqKD: prompt -> the teacher's completion

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
        since = time.perf_counter()
        scores: dict[int, SparseLogprobs] = {}
        new: dict[bytes, Completion] = {}
        for indices, generated in batch.completions:
            for index, completion in zip(indices, generated.result(), strict=True):
                example = batch.examples[index]
                batch.samples[index] = _teacher_sample(example, completion)
                assert completion.scores is not None  # the client checked
                scores[index] = completion.scores
                new[_key(example.prompt_ids)] = completion.model_copy(update={"scores": None})
        for indices, scored in batch.scores:
            scores.update(zip(indices, scored.result(), strict=True))
        self._clock("teacher", time.perf_counter() - since)
        if self.method.seq_kd and not batch.on_policy:
            self._written.update(self._share(new))
        return [ScoredSample(batch.samples[i], scores.get(i)) for i in range(len(batch.examples))]

    def _sample_from_student(self, batch: PendingBatch, step: int) -> None:
        assert self.rollouts is not None
        requests = [
            RolloutRequest(example.prompt_ids, key=(self.method.seed, step, example.index))
            for example in batch.examples
        ]
        since = time.perf_counter()
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
        self._score(batch, list(batch.samples))
        if unwritten:
            future = self.teacher.submit_generate(
                [batch.examples[i].prompt_ids for i in unwritten],
                max_new_tokens=self.method.max_new_tokens,
                temperature=self.method.seq_kd_temperature,
                seed=self.method.seed,
                stop_token_ids=self.method.stop_ids,
                top_k=self.method.top_k,
                score_temperature=self.method.temperature,
            )
            batch.completions.append((unwritten, future))

    def _score(self, batch: PendingBatch, indices: list[int]) -> None:
        if self.teacher is None or not indices:
            return
        samples = [batch.samples[i] for i in indices]
        future = self.teacher.submit_score(
            [(s.token_ids, s.completion_start) for s in samples],
            top_k=self.method.top_k,
            temperature=self.method.temperature,
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
