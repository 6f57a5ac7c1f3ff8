"""The evaluation on held-out rows: divergence on fixed completions, checkers on the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from shared.protocol import Completion
from shared.sparse import SparseLogprobs
from shared.text import completion_text
from student_trainer.data.sample import Example, Sample, completed
from student_trainer.evaluation.checkers import CheckResult, check_completions, summarize
from student_trainer.pipeline.context import context_divergence
from student_trainer.pipeline.targets import ScoredSample
from student_trainer.reporting.runs import read_held_out
from student_trainer.reporting.samples import evenly
from student_trainer.rollouts import RolloutEngine, RolloutRequest
from student_trainer.runtime.ranks import Ranks
from student_trainer.teacher.base import Teacher
from student_trainer.teacher.named import Teachers
from student_trainer.training import held_out
from student_trainer.training.metrics import spans_of
from student_trainer.training.micro_batch import MicroBatch, MicroBatchBuilder
from student_trainer.training.plan import TrainingPlan


@dataclass
class HeldOutEvaluation:
    """An evaluation of the student as it is, the same whenever it is called.

    Attributes:
        builder: of micro-batches.
        teachers: connected; None for SFT.
        rollouts: write the student's greedy completions.
        on_device: a micro-batch as the model takes it.
        autocast: the context in which the loss is computed.
        folder: gets the file that `held_out` writes.
        unsafe_sandbox: run programs also where the kernel refuses a fence.
    """

    plan: TrainingPlan
    builder: MicroBatchBuilder
    teachers: Teachers | None
    rollouts: RolloutEngine
    tokenizer: Any
    ranks: Ranks
    on_device: Callable[[MicroBatch], MicroBatch]
    autocast: Callable[[], AbstractContextManager[Any]]
    folder: Path
    unsafe_sandbox: bool

    def __post_init__(self) -> None:
        self._scored: dict[int, list[ScoredSample]] = {}  # by dataset
        self._context: dict[int, NDArray[np.float64]] = {}  # likewise, [samples, 2]
        self._first_look: dict[str, Any] | None = None

    def resume(self) -> None:
        """Continue the file that the run wrote before it was interrupted."""
        self._first_look = read_held_out(self.folder)

    def run(
        self,
        model: Any,
        examples: list[Example],
        *,
        dataset: int,
        batch_size: int,
        step: int,
        before_rollouts: Callable[[], None],
    ) -> dict[str, float]:
        """Return ``loss``, ``divergence`` and the checkers' scores, over all ranks.

        With named teachers also ``divergence/NAME`` of each one's rows. Where a teacher sees a
        prompt of its own, ``context_divergence`` is how far that prompt moves the teacher: see
        `pipeline.context`, in nats a token. It is measured once, so it is the same in each
        evaluation.

        The completions compared are the dataset's own; a bare prompt gets the teacher's greedy one,
        written once. A few samples are kept token by token, see `held_out`.

        Args:
            dataset: number of the dataset, whose samples are scored only once.
            step: of the optimizer.
            before_rollouts: called before the student writes.
        """
        measured, real = self.ranks.share([e for e in examples if self._has_completion(e)])
        scored = self._score_once(dataset, measured)
        names = () if self.teachers is None else self.teachers.names
        sums = np.zeros((1 + len(names), 2))  # of all rows, then of each teacher's
        for first in range(0, len(scored), batch_size):
            last = min(first + batch_size, max(real, first + 1))
            found = self._divergence(model, scored[first:last])
            if first < real:
                sums += found
        checked = self._check(examples, step, before_rollouts)
        own = {e.index: (text, r.passed) for e, text, r in checked.mine}
        rows = sum(map(self._has_completion, examples))
        self._show(model, measured, scored, own, step, rows)
        sums = np.append(sums, [self._context[dataset][:real].sum(axis=0)], axis=0)
        total, *of_each, context = self.ranks.sum(torch.tensor(sums)).tolist()
        metrics = {"loss": total} if self.teachers is None else {"loss": total, "divergence": total}
        metrics |= {f"divergence/{name}": one for name, one in zip(names, of_each, strict=True)}
        metrics["context_divergence"] = context
        metrics = {name: nats / tokens for name, (nats, tokens) in metrics.items() if tokens}
        return metrics | summarize(gather_object([r for _, _, r in checked.mine[: checked.real]]))

    def _has_completion(self, example: Example) -> bool:
        """Return whether the dataset has a completion, or the teacher can write one."""
        if example.sample is not None:
            return True
        teachers = self.teachers
        return teachers is not None and teachers.of(example.teacher).info.capabilities.generate

    def _score_once(self, dataset: int, examples: list[Example]) -> list[ScoredSample]:
        """Return the samples that the divergence is measured on, fixed through the run."""
        if dataset not in self._scored:
            bare = [e for e in examples if e.sample is None]
            written = iter(self._written_by_teacher(bare))
            samples = [next(written) if e.sample is None else e.sample for e in examples]
            scores: Sequence[Any] = [None] * len(samples)
            self._context[dataset] = np.zeros((len(samples), 2))
            if self.teachers is not None:
                pairs = list(zip(examples, samples, strict=True))
                scores = self.ranks.together(partial(self._scores, self.teachers, pairs))
                self._context[dataset] = self.ranks.together(
                    partial(self._context_effects, self.teachers, pairs, scores)
                )
                self.teachers.take_traffic()  # neither is part of a training step
                self.teachers.take_lookups()
            self._scored[dataset] = [
                ScoredSample(sample, score, teacher=example.teacher)
                for example, sample, score in zip(examples, samples, scores, strict=True)
            ]
        return self._scored[dataset]

    def _scores(
        self, teachers: Teachers, pairs: Sequence[tuple[Example, Sample]]
    ) -> list[SparseLogprobs]:
        """Return the scores of each example's sample by its own teacher."""

        def score(teacher: Teacher, part: Sequence[tuple[Example, Sample]]) -> list[SparseLogprobs]:
            sequences = [example.sequence_of_teacher(sample) for example, sample in part]
            return teacher.score(sequences, self.plan.method.scoring())

        return teachers.request_each(pairs, lambda pair: pair[0].teacher, score)

    def _context_effects(
        self,
        teachers: Teachers,
        pairs: Sequence[tuple[Example, Sample]],
        scores: Sequence[SparseLogprobs],
    ) -> NDArray[np.float64]:
        """Return [sum of context divergences, tokens] of each sample; zeros where there is none."""
        effects = np.zeros((len(pairs), 2))
        numbered = [
            (index, example, sample, scored)
            for index, ((example, sample), scored) in enumerate(zip(pairs, scores, strict=True))
            if example.teacher_prompt_ids is not None
        ]
        for teacher, part in teachers.by_teacher(numbered, lambda item: item[1].teacher):
            if not (teacher.connected and teacher.info.capabilities.requested_token_ids):
                continue
            most = teacher.info.limits.max_requested_token_ids
            unseen = teacher.live.score(
                [(sample.token_ids, sample.completion_start) for _, _, sample, _ in part],
                self.plan.method.scoring(),
                requested=[seen.token_ids[:, :most] for _, _, _, seen in part],
            )
            for (index, _, sample, seen), other in zip(part, unseen, strict=True):
                nats = context_divergence(seen, other)[sample.completion_mask]
                effects[index] = nats.sum(), len(nats)
        return effects

    def _written_by_teacher(self, bare: list[Example]) -> list[Sample]:
        """Return the teacher's greedy completions of bare prompts."""
        if self.teachers is None:
            return []
        # Ranks without prompts take part too, since all ranks wait for one another here.
        completions = self.ranks.together(partial(self._completions, self.teachers, bare))
        return [
            completed(e, c.token_ids, "teacher", truncated=c.finish_reason == "length")
            for e, c in zip(bare, completions, strict=True)
        ]

    def _completions(self, teachers: Teachers, bare: Sequence[Example]) -> list[Completion]:
        """Return each teacher's greedy completions of its own prompts."""
        sampling = self.plan.method.sampling(0.0, scored=False)
        return teachers.request_each(
            bare,
            lambda example: example.teacher,
            lambda teacher, part: teacher.generate([e.prompt_of_teacher for e in part], sampling),
        )

    @torch.no_grad()
    def _divergence(self, model: Any, scored: Sequence[ScoredSample]) -> NDArray[np.float64]:
        """Return [sum of divergences, tokens] of samples, then of each teacher's; [1 + n, 2]."""
        batch = self.on_device(self.builder.held_out(scored))
        model.eval()
        with self.autocast():
            outputs = model(**batch)
        names = () if self.teachers is None else self.teachers.names
        sums = np.zeros((1 + len(names), 2))
        sums[0] = float(outputs["loss"]), len(batch["sparse_targets"].positions)
        if names:
            divergence = outputs["statistics"].divergence.double().cpu().numpy()
            for name, span in spans_of(batch["sparse_targets"].taught, names[0]):
                sums[1 + names.index(name)] += divergence[span].sum(), span.stop - span.start
        return sums

    def _check(
        self, examples: list[Example], step: int, before_rollouts: Callable[[], None]
    ) -> _Checked:
        share, real = self.ranks.share([e for e in examples if e.checker is not None])
        if share:
            before_rollouts()
            self.rollouts.sync(step)
        checked = check_examples(self.rollouts, self.tokenizer, share, unsafe=self.unsafe_sandbox)
        return _Checked(
            [(e, text, result) for e, (text, result) in zip(share, checked, strict=True)], real
        )

    def _show(
        self,
        model: Any,
        examples: Sequence[Example],
        scored: Sequence[ScoredSample],
        own: dict[int, tuple[str, bool]],
        step: int,
        rows: int,
    ) -> None:
        """Write what `held_out` shows: every rank runs equally many samples, rank 0 writes."""
        places = evenly(range(len(scored)), held_out.COUNT)
        shown = [held_out.cut(scored[place]) for place in places]
        model.eval()
        looks = []
        for item in shown:
            inputs = self.on_device(self.builder.held_out([item]))
            with self.autocast():
                looks.append(held_out.look(model, inputs, self.tokenizer))
        if not shown or self.ranks.rank != 0:
            return
        chosen = [examples[place] for place in places]
        content = held_out.write(
            self.folder,
            [
                held_out.described(item, example.name, example.prompt, self.tokenizer)
                for item, example in zip(shown, chosen, strict=True)
            ],
            looks,
            [own.get(example.index) for example in chosen],
            step=step,
            first=self._first_look,
            beta=self.plan.method.divergence.beta,
            temperature=self.plan.method.divergence.temperature,
            teacher=self.teachers is not None,
            rows=rows,
        )
        self._first_look = self._first_look or content


@dataclass(frozen=True)
class _Checked:
    """The examples of this rank with the student's text and its verdict.

    Only the first ``real`` count; the others fill up the share of this rank.
    """

    mine: list[tuple[Example, str, CheckResult]]
    real: int


def check_examples(
    rollouts: RolloutEngine, tokenizer: Any, examples: Sequence[Example], *, unsafe: bool = False
) -> list[tuple[str, CheckResult]]:
    """Return the student's own completions of examples that carry a checker, and the verdicts."""
    requests = [RolloutRequest(e.prompt_ids, key=("evaluation", e.index)) for e in examples]
    texts, truncated = [""] * len(examples), [False] * len(examples)
    for group in rollouts.generate(requests):
        for index, rollout in group:
            prompt_ids = examples[index].prompt_ids
            texts[index] = completion_text(tokenizer, prompt_ids, rollout.token_ids)
            truncated[index] = rollout.truncated
    checkers = [e.checker for e in examples if e.checker]
    results = check_completions(checkers, texts, truncated=truncated, unsafe=unsafe)
    return list(zip(texts, results, strict=True))
