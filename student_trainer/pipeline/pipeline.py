"""The overlap of generation, scoring and training.

Every finished group of completions is sent to the teacher at once, in requests no larger than a
micro-batch. So the teacher scores while the student still generates, and the first micro-batch is
trained while the last is still being scored. Batches of later steps are started ahead: those that
do not depend on the student's weights by up to ``prefetch_steps``, and those that do by up to
``staleness``, with the weights as they are. A rollout engine in other processes generates them
while the step before trains. The distance ahead is counted in steps, never in time, so what is
learned does not depend on the teacher's speed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigurationError, DatasetError
from shared.protocol import Completion
from shared.sparse import SparseLogprobs
from student_trainer.data.micro_batches import order_by_length
from student_trainer.data.sample import Example, Sample, completed
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.pipeline.prefetched import PrefetchedBatch
from student_trainer.pipeline.targets import ScoredSample
from student_trainer.rollouts import RolloutEngine, RolloutRequest
from student_trainer.runtime.threads import in_thread
from student_trainer.runtime.timeline import Timeline
from student_trainer.teacher.base import Teacher
from student_trainer.teacher.named import Teachers, as_teachers

R = TypeVar("R")

_Written = list[list[Completion]]


@dataclass
class PendingSample:
    """An example on its way to a scored sample.

    Attributes:
        example: the row that it is made of.
        sample: None until its completion is written.
        requested: proposed ids [T, m]; None if none are proposed.
        answer: the request that scores it, while its scores have not been taken from there.
        place: its place in the answer.
        scores: scores that have arrived or came with the completion, until they are handed out.
    """

    example: Example
    sample: Sample | None = None
    requested: NDArray[np.uint32] | None = None
    answer: Future[list[SparseLogprobs]] | None = None
    place: int = 0
    scores: SparseLogprobs | None = None

    @property
    def written(self) -> Sample:
        """The sample, once its completion is written."""
        assert self.sample is not None
        return self.sample


@dataclass
class PendingBatch:
    """A generation batch whose completions or scores are not all there yet.

    Attributes:
        step: step that learns it, from 0.
        pending: its samples, in the order of the step's examples.
        weight_version: number of optimizer steps of the weights that it was started with.
        completions: samples that the teacher writes, and its completions of them.
        writing: the thread that generates the student's completions, or None.
    """

    step: int
    pending: list[PendingSample]
    on_policy: bool
    weight_version: int
    completions: list[tuple[list[PendingSample], Future[list[Completion]]]] = field(
        default_factory=list
    )
    writing: Future[None] | None = None


class Pipeline:
    """The pipeline that turns examples into scored samples, some steps ahead of training.

    Args:
        method: settings of the distillation.
        teachers: None for SFT.
        rollouts: None if no step is on-policy.
        upcoming: returns the examples of any step.
        staleness: steps by which batches that depend on the student's weights are started ahead. 0
            is strictly on-policy. No sample is thrown away.
        prefetch_steps: steps by which all other batches are started ahead.
        request_size: sequences in a request.
        share: gives every rank's new teacher completions to all ranks, so that each prompt is
            generated once.
        remember: keep the teacher's completions for prompts that occur again.
        together: waits for a server on every rank, and fails on all if it fails on one.
        propose: returns for each sample ids [T, m] that the teacher scores too, such as the
            student's own most probable ones. Called for each group of rollouts that bring no such
            ids, and for other batches equally often on every rank.
        timeline: records "generating" (proposals included), waiting for the "teacher", and
            requests.
        waited: is called with the name of a teacher and the seconds of each wait for it.
    """

    def __init__(
        self,
        method: DistillationConfig,
        teachers: Teacher | Teachers | None,
        rollouts: RolloutEngine | None,
        *,
        upcoming: Callable[[int], list[Example]],
        staleness: int = 0,
        prefetch_steps: int = 0,
        request_size: int = 8,
        share: Callable[[dict[bytes, Completion]], dict[bytes, Completion]] = lambda new: new,
        together: Callable[[Callable[[], Any]], Any] = lambda wait: wait(),
        propose: Callable[[Sequence[Sample]], list[NDArray[np.uint32]]] | None = None,
        timeline: Timeline | None = None,
        waited: Callable[[str | None, float], None] = lambda name, seconds: None,
        remember: bool = True,
    ) -> None:
        self._remember = remember
        self.method = method
        self.teachers = as_teachers(teachers)
        self.rollouts = rollouts
        self._upcoming = upcoming
        self._staleness = staleness
        self._prefetch_steps = prefetch_steps
        self._request_size = request_size
        self._share = share
        self._together = together
        self._propose = propose
        self._timeline = timeline or Timeline()
        self._waited = waited
        self._batches: dict[int, PendingBatch] = {}  # by step, until it is learned
        self._written: dict[bytes, Completion] = {}  # SeqKD's completions by hash of the prompt

    def take(self, step: int, last: int) -> PendingBatch:
        """Start every batch that may run ahead, none after ``last``; return that of ``step``.

        Raises:
            DatasetError: an off-policy row has no completion to learn from.
        """
        furthest = step + max(self._staleness, self._prefetch_steps)
        for ahead in range(step, min(furthest, max(step, last)) + 1):
            if ahead not in self._batches and ahead - step <= self._max_lead(ahead):
                self._batches[ahead] = self._begin(ahead, weight_version=step)
        for learned in [begun for begun in self._batches if begun < step]:
            del self._batches[learned]
        return self._batches[step]

    def samples(self, batch: PendingBatch) -> list[Sample]:
        """Wait for all completions of a batch, and return its samples in the examples' order.

        It is called once for each batch, on every rank.
        """
        if batch.writing is not None:
            with self._timeline.during("generating"):
                self._together(lambda: _wait_for_writers([batch]))
        new: dict[bytes, Completion] = {}
        written: _Written = []
        if self.method.seq_kd and not batch.on_policy:
            written = self._together(
                lambda: [self._wait(answer, some[0]) for some, answer in batch.completions]
            )
        for (unwritten, _), completions in zip(batch.completions, written, strict=True):
            for one, completion in zip(unwritten, completions, strict=True):
                one.sample = _teacher_sample(one.example, completion)
                one.scores = completion.scores
                bare = completion.model_copy(update={"scores": None})
                new[self._key(one.example)] = bare
        batch.completions.clear()  # frees the scores, which are kept per sample from here on
        if self._scores_after_writing(batch):
            self._score(batch, batch.pending)
        if self.method.seq_kd and not batch.on_policy and self._remember:
            self._written.update(self._share(new))
        return [one.written for one in batch.pending]

    def scored(self, batch: PendingBatch, indices: Sequence[int]) -> list[ScoredSample]:
        """Wait for the scores of the given samples only, and hand them out."""
        wanted = [batch.pending[index] for index in indices]
        for one in wanted:
            if one.answer is not None:
                answer, one.answer = one.answer, None
                one.scores = self._wait(answer, one)[one.place]
        found = [
            ScoredSample(
                one.written,
                one.scores,
                one.requested,
                sampled=self.method.sampled,
                teacher=one.example.teacher,
                teacher_prompt_ids=one.example.teacher_prompt_ids,
            )
            for one in wanted
        ]
        for one in wanted:
            one.scores = None  # frees the memory once the micro-batch is learned
        return found

    def finish_writing(self) -> None:
        """Wait until the rollout engine has generated all completions of all batches.

        All ranks call it together; if it fails on one, it fails on all.
        """
        writing = [batch for batch in self._batches.values() if batch.writing is not None]
        if writing:  # or not, on all ranks: they begin to write together
            self._together(lambda: _wait_for_writers(writing))

    def prefetched(self, step: int) -> list[PrefetchedBatch]:
        """Return the batches of ``step`` and later that a resumed run could not write again.

        The weights that wrote them are gone, or are those of the checkpoint.
        """
        self.finish_writing()
        return [
            PrefetchedBatch(
                batch.step,
                batch.weight_version,
                batch.on_policy,
                [one.example.index for one in batch.pending],
                [one.written for one in batch.pending],
                [one.requested for one in batch.pending if one.requested is not None],
            )
            for batch in self._batches.values()
            if batch.step >= step and not self._independent_of_weights(batch.step)
        ]

    def resume(self, ahead: Sequence[PrefetchedBatch]) -> None:
        """Continue with the batches that `prefetched` returned; the teacher scores them again.

        Raises:
            ConfigurationError: a batch is of other rows, or further ahead than ``staleness``.
        """
        for saved in ahead:
            examples = self._upcoming(saved.step)
            if [example.index for example in examples] != saved.examples:
                raise ConfigurationError(
                    f"the checkpoint holds completions for step {saved.step + 1}, but this run "
                    "has other rows in it: resume with the same data, --seed, batch sizes and "
                    "number of processes, or delete ahead-*.npz there to generate anew"
                )
            if saved.step - saved.weight_version > self._staleness:
                raise ConfigurationError(
                    f"the checkpoint holds completions for step {saved.step + 1} of the weights "
                    f"after step {saved.weight_version}: resume with --rollout_staleness "
                    f"{saved.step - saved.weight_version}, or delete ahead-*.npz there"
                )
            none: list[None] = [None] * len(examples)
            requested = saved.requested or none
            pending = [
                PendingSample(*values)
                for values in zip(examples, saved.samples, requested, strict=True)
            ]
            batch = PendingBatch(saved.step, pending, saved.on_policy, saved.weight_version)
            self._submit(batch, pending)
            self._batches[saved.step] = batch

    def _max_lead(self, step: int) -> int:
        """Return the steps by which the batch of ``step`` may be started ahead."""
        if self._independent_of_weights(step):
            return max(self._staleness, self._prefetch_steps)
        return self._staleness

    def _independent_of_weights(self, step: int) -> bool:
        if self.teachers is None:
            return True
        # SeqKD proposes ids only when all completions are there, so its start needs no weights.
        proposed = self._propose is not None and not self.method.seq_kd
        return not (self.method.on_policy(step) or proposed)

    def _begin(self, step: int, weight_version: int) -> PendingBatch:
        """Start a batch, which the student writes (on-policy), the teacher (SeqKD) or the dataset.

        The student's completions are generated before this returns, except ahead of their step by
        an engine in other processes: these are left to a thread.
        """
        on_policy = self.teachers is not None and self.method.on_policy(step)
        pending = [PendingSample(example) for example in self._upcoming(step)]
        batch = PendingBatch(step, pending, on_policy, weight_version)
        if batch.on_policy:
            self._sample_from_student(batch, step)
        elif self.method.seq_kd and self.teachers is not None:
            self._generate_with_teacher(batch)
        else:
            for one in pending:
                one.sample = dataset_sample(one.example)
            self._score(batch, pending)
        return batch

    def _wait(self, answer: Future[list[R]], sample: PendingSample) -> list[R]:
        """Return the answer of the teacher of a sample; the wait for it is counted as its own."""
        if answer.done():
            return answer.result()
        began = time.perf_counter()
        try:
            with self._timeline.during("teacher"):
                return answer.result()
        finally:
            self._waited(sample.example.teacher, time.perf_counter() - began)

    def _scores_after_writing(self, batch: PendingBatch) -> bool:
        """Return whether the batch is scored only after all of its completions are written.

        In SeqKD the teacher generates and scores in one call, before the student can propose ids.
        If it proposes ids, scoring is therefore a second call, of all samples at once, because the
        number of completions written before differs between ranks. The same holds if the support is
        drawn, which the first call cannot do.
        """
        late = self._propose is not None or self.method.sampled
        return late and self.method.seq_kd and not batch.on_policy

    def _sample_from_student(self, batch: PendingBatch, step: int) -> None:
        assert self.rollouts is not None
        requests = [
            RolloutRequest(one.example.prompt_ids, key=(self.method.seed, step, *one.example.key))
            for one in batch.pending
        ]
        if any(begun.writing for begun in self._batches.values()):
            with self._timeline.during("generating"):
                self.finish_writing()  # the engine must finish before it gets new weights
        with self._timeline.during("syncing"):
            self.rollouts.sync(batch.weight_version)
        ahead = step > batch.weight_version
        if ahead and self.rollouts.elsewhere:
            batch.writing = in_thread(lambda: self._write(batch, requests), name="rollouts")
        else:
            with self._timeline.during("generating", step=step + 1):
                if self.rollouts.elsewhere:
                    self._together(lambda: self._write(batch, requests))
                else:
                    self._write(batch, requests)

    def _write(self, batch: PendingBatch, requests: Sequence[RolloutRequest]) -> None:
        """Generate the student's completions, and send each finished group to the teacher."""
        assert self.rollouts is not None
        for group in self.rollouts.generate(requests):
            for index, rollout in group:
                one = batch.pending[index]
                one.sample = completed(
                    one.example,
                    rollout.token_ids,
                    "student",
                    truncated=rollout.truncated,
                    weight_version=batch.weight_version,
                )
                one.requested = rollout.proposed
            self._score(batch, [batch.pending[i] for i in sorted(index for index, _ in group)])

    def _generate_with_teacher(self, batch: PendingBatch) -> None:
        assert self.teachers is not None
        unwritten: list[PendingSample] = []
        for one in batch.pending:
            completion = self._written.get(self._key(one.example))
            if completion is None:
                unwritten.append(one)
            else:
                one.sample = _teacher_sample(one.example, completion)
        late = self._scores_after_writing(batch)
        if not late:
            self._score(batch, [one for one in batch.pending if one.sample is not None])
        sampling = self.method.sampling(self.method.seq_kd_temperature, scored=not late)
        for teacher, part in self.teachers.by_teacher(unwritten, _teacher_of):
            prompts = [one.example.prompt_of_teacher for one in part]
            future = teacher.submit(teacher.generate, prompts, sampling)
            self._timeline.request(future, prompts=len(part))
            batch.completions.append((part, future))

    def _key(self, example: Example) -> bytes:
        """Return a hash of what the completion of an example by its teacher depends on."""
        assert self.teachers is not None
        name = self.teachers.name_of(example.teacher)
        prompt = example.prompt_of_teacher.astype("<u4").tobytes()
        return hashlib.sha256(name.encode() + b"\0" + prompt).digest()

    def _score(self, batch: PendingBatch, pending: list[PendingSample]) -> None:
        """Send written samples to their teachers, with the ids that are proposed for them."""
        if self.teachers is None or not pending:
            return
        unproposed = [one for one in pending if one.requested is None]  # all of them, or none
        if self._propose is not None and unproposed:
            with self._timeline.during("generating"):
                proposed = self._propose([one.written for one in unproposed])
            for one, ids in zip(unproposed, proposed, strict=True):
                one.requested = ids
        self._submit(batch, pending)

    def _submit(self, batch: PendingBatch, pending: list[PendingSample]) -> None:
        assert self.teachers is not None
        proposed = any(one.requested is not None for one in pending)  # for all of them, or none
        # Requests go out in training order, so that the first micro-batch is scored first.
        lengths = [len(one.written.token_ids) for one in pending]
        order = order_by_length(lengths, shortest_first=batch.on_policy)
        for first in range(0, len(order), self._request_size):
            some = [pending[index] for index in order[first : first + self._request_size]]
            for teacher, part in self.teachers.by_teacher(some, _teacher_of):
                # Requests that depend on the student's weights never repeat: they need no cache.
                client = teacher.live if batch.on_policy or proposed else teacher
                self._request_scores(client, batch, part)

    def _request_scores(
        self, teacher: Teacher, batch: PendingBatch, part: Sequence[PendingSample]
    ) -> None:
        """Send samples to one teacher in one request."""
        requested = [one.requested for one in part if one.requested is not None]
        answer = teacher.submit(
            teacher.score,
            [one.example.sequence_of_teacher(one.written) for one in part],
            self.method.scoring(batch.step),
            requested=requested or None,
        )
        scored_tokens = sum(len(one.written.completion_mask) for one in part)
        self._timeline.request(answer, sequences=len(part), scored_tokens=scored_tokens)
        for place, one in enumerate(part):
            one.answer, one.place = answer, place


def _teacher_of(one: PendingSample) -> str | None:
    return one.example.teacher


def _wait_for_writers(batches: Sequence[PendingBatch]) -> None:
    """Wait for the threads that write the batches' completions, where there is one."""
    for batch in batches:
        if batch.writing is not None:
            batch.writing.result()
            batch.writing = None


def dataset_sample(example: Example) -> Sample:
    """Return the example's prompt with the dataset's own completion.

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
