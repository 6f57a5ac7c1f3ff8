"""The step: prompts in, gradient out.

`DistillationTrainer` is transformers' Trainer with three rooms rebuilt: what a generation batch
becomes (`get_batch_samples`), the loss (`compute_loss`) and evaluation (`evaluation_loop`). SFT
runs through it too, as forward KL to the data's one-hot distribution.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from shared.protocol import Completion
from student_trainer.batch import padded_inputs, predicting_rows
from student_trainer.data import Example, Sample, completed
from student_trainer.evaluation.checkers import check_completions, summarize
from student_trainer.losses import Kernel, Tail
from student_trainer.metrics import WindowMetrics
from student_trainer.pipeline import Method, PendingBatch, Pipeline
from student_trainer.proposals import TopTokenProposals
from student_trainer.rollouts import (
    RolloutEngine,
    RolloutRequest,
    TransformersRollouts,
    VllmEngine,
    VllmRollouts,
)
from student_trainer.student import SparseTargets, install_sparse_loss
from student_trainer.support import ScoredSample, hard_labels, sparse_distribution
from student_trainer.teacher import Teacher

MicroBatch = dict[str, Any]


class DistillationTrainer(Trainer):
    """Distils a served teacher (or, without one, the data) into ``model``.

    Args:
        model: causal language model, or a peft model around one.
        method: lmbda, seq_kd and the like.
        beta: of the divergence; 0 for SFT.
        teacher: connected client, or None for SFT.
        vocab_size: the vocabulary that teacher and student share.
        tail: what becomes of the mass off the support in training; held-out divergences keep the
            bucket, so that runs can be compared.
        sft_weight: share of the cross-entropy on what the dataset or the teacher wrote.
        kernel: who computes the loss.
        student_top_m: the student's own most probable tokens that the teacher scores in each row
            of a training step; held-out rows keep one support, so that they can be compared.
        generation_batch_size: prompts generated at once; None for all of a step.
        rollout_temperature: of the student's sampling.
        vllm: writes the student's completions in its place.
        train_dataset, eval_dataset: lists of `Example`.
        Everything else: as transformers' Trainer.
    """

    def __init__(
        self,
        model: Any,
        *,
        method: Method,
        beta: float,
        teacher: Teacher | None,
        vocab_size: int,
        tail: Tail = "bucket",
        sft_weight: float = 0.0,
        kernel: Kernel = "auto",
        student_top_m: int = 0,
        rollout_temperature: float = 1.0,
        generation_batch_size: int | None = None,
        vllm: VllmEngine | None = None,
        **trainer_arguments: Any,
    ) -> None:
        install_sparse_loss(model)
        super().__init__(model, data_collator=list, **trainer_arguments)
        self.loss_is_scaled_for_ga = True  # normalised over the whole optimizer step, see below
        self.method = method
        self.beta = beta
        self.tail: Tail = tail
        self.sft_weight = sft_weight
        self.kernel: Kernel = kernel
        self.teacher = teacher
        self.vocab_size = vocab_size
        tokenizer: Any = self.processing_class
        pad = tokenizer.pad_token_id
        self.pad_token_id = int(pad if pad is not None else method.stop_ids[0])
        self.window = WindowMetrics()
        self.vllm = vllm
        self.rollouts = self._rollout_engine(
            rollout_temperature, generation_batch_size, one_group=student_top_m > 0
        )
        self.pipeline = Pipeline(
            method,
            teacher,
            self.rollouts,
            share=_share_over_ranks,
            propose=self._proposals(student_top_m),
            clock=self.window.add_seconds,
        )
        self._greedy = self._rollout_engine(0.0, generation_batch_size)
        self._eval_scored: dict[int, list[ScoredSample]] = {}
        self._ahead: tuple[Iterator[list[Example]], list[list[Example]]] | None = None
        self._pending: tuple[int, PendingBatch] | None = None
        self.add_callback(_StepClock(self.window))

    def _rollout_engine(
        self, temperature: float, batch_size: int | None, *, one_group: bool = False
    ) -> RolloutEngine:
        if self.vllm is not None:
            return VllmRollouts(
                self.vllm,
                stop_ids=self.method.stop_ids,
                max_new_tokens=self.method.max_new_tokens,
                temperature=temperature,
                vocab_size=self.vocab_size,
            )
        return TransformersRollouts(
            self.model,
            stop_ids=self.method.stop_ids,
            pad_token_id=self.pad_token_id,
            max_new_tokens=self.method.max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            vocab_size=self.vocab_size,
            one_group=one_group,
        )

    def _proposals(self, count: int) -> TopTokenProposals | None:
        if count == 0:
            return None
        return TopTokenProposals(
            self.model,
            count=count,
            vocab_size=self.vocab_size,
            pad_token_id=self.pad_token_id,
            batch_size=self.args.per_device_train_batch_size,
        )

    # A training step: collect the generation batch, count its tokens, then one loss a micro-batch.

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], torch.Tensor]:
        """The micro-batches of one optimizer step, generated and scored, and their token count."""
        step = self.state.global_step
        groups, following = self._take(epoch_iterator, num_batches)
        examples = _flat(groups)
        pending = self._take_pending(step) or self.pipeline.submit(step, examples)
        assert [e.index for e in pending.examples] == [e.index for e in examples]
        last = step + 1 >= self.state.max_steps
        if following and not last and self.pipeline.independent_of_weights(step + 1):
            # The teacher may score it while this step trains.
            self._pending = (step + 1, self.pipeline.submit(step + 1, _flat(following)))
        scored = self.pipeline.collect(pending)
        self._count_traffic()
        self.window.add_step(scored, on_policy=pending.on_policy)
        tokens = sum(int(item.sample.completion_mask.sum()) for item in scored)
        total = self.accelerator.reduce(torch.tensor(tokens, device=device), "sum")
        batches, first = [], 0
        for group in groups:
            part = scored[first : first + len(group)]
            batches.append(
                self._micro_batch(
                    part, normalizer=float(total), tail=self.tail, sft_weight=self.sft_weight
                )
            )
            first += len(group)
        self.window.add_seconds("training", -time.perf_counter())  # until the step's end
        return batches, total

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the divergences / learned tokens of the whole step over all ranks.

        Times the number of ranks, because the distributed wrappers average gradients over them.
        """
        targets: SparseTargets = inputs["sparse_targets"]
        inputs = {**inputs, "sparse_targets": targets.to(inputs["input_ids"].device)}
        outputs = model(**inputs)
        self.window.add_statistics(outputs["statistics"])
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            window = self.window.drain(self._sum_over_ranks, with_teacher=self.teacher is not None)
            logs = {**logs, **window}
            if self.vllm is not None and self.vllm.drift is not None:
                logs["rollout_drift"] = self.vllm.drift
        super().log(logs, start_time)

    def _take(
        self, epoch_iterator: Iterator[list[Example]], count: int
    ) -> tuple[list[list[Example]], list[list[Example]]]:
        """This step's micro-batches, and those of the next one as far as this epoch has them."""
        groups: list[list[Example]] = []
        if self._ahead is not None and self._ahead[0] is epoch_iterator:
            groups = self._ahead[1]
        groups += _next(epoch_iterator, count - len(groups))
        following = _next(epoch_iterator, self.args.gradient_accumulation_steps)
        self._ahead = (epoch_iterator, following)
        return groups, following

    def _take_pending(self, step: int) -> PendingBatch | None:
        if self._pending is None or self._pending[0] != step:
            return None
        pending, self._pending = self._pending[1], None
        return pending

    def _micro_batch(
        self,
        scored: Sequence[ScoredSample],
        *,
        normalizer: float,
        tail: Tail = "bucket",
        sft_weight: float = 0.0,
    ) -> MicroBatch:
        """Right-padded input_ids and attention_mask [B, L], and what the rows are compared with."""
        samples = [item.sample for item in scored]
        weights, labels = hard_labels(scored, sft_weight)
        return {
            **padded_inputs(samples, self.pad_token_id),
            "sparse_targets": SparseTargets(
                rows=predicting_rows(samples, [s.completion_mask for s in samples]),
                teacher=sparse_distribution(scored, self.vocab_size),
                beta=self.beta,
                temperature=self.method.temperature,
                normalizer=normalizer,
                vocab_size=self.vocab_size,
                tail=tail,
                weights=weights,
                labels=labels,
                kernel=self.kernel,
            ),
        }

    def _count_traffic(self) -> None:
        if self.teacher is None:
            return
        received, scored = self.teacher.take_traffic()
        self.window.add("bytes", received)
        self.window.add("scored_tokens", scored)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        summed = self.accelerator.reduce(values.to(self.args.device), "sum")
        return summed.cpu()

    # Evaluation: divergence on held-out completions, and checkers on greedy ones.

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Held-out divergence per completion token, and pass@1 or exact match by the checkers.

        The completions compared are the dataset's own; a bare prompt gets the teacher's greedy one,
        written once. Each rank takes every n-th row; sums are added over ranks.
        """
        examples: list[Example] = list(dataloader.dataset)
        measured, real = self._share([e for e in examples if self._has_completion(e)])
        sums = np.zeros(2)
        scored = self._held_out(id(dataloader.dataset), measured)
        size = self.args.per_device_eval_batch_size
        for first in range(0, len(scored), size):
            found = self._divergence_of(scored[first : min(first + size, max(real, first + 1))])
            if first < real:
                sums += found
        asked, real = self._share([e for e in examples if e.checker is not None])
        if asked:
            self._greedy.sync(self.state.global_step)
        checked = check_examples(self._greedy, self.processing_class, asked)[:real]
        divergence, tokens = self._sum_over_ranks(torch.tensor(sums)).tolist()
        metrics: dict[str, float] = {}
        if tokens:
            metrics[f"{metric_key_prefix}_loss"] = divergence / tokens
            if self.teacher is not None:
                metrics[f"{metric_key_prefix}_divergence"] = divergence / tokens
        for name, value in summarize(gather_object(checked)).items():
            metrics[f"{metric_key_prefix}_{name}"] = value
        return EvalLoopOutput(None, None, metrics, len(examples))

    def _share(self, examples: list[Example]) -> tuple[list[Example], int]:
        """Every n-th example for this rank, and how many of them are real.

        The rest repeats one: under a sharded model all ranks must call it equally often.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = examples[rank::world]
        missing = -(-len(examples) // world) - len(mine)
        return mine + examples[:1] * missing, len(mine)

    def _has_completion(self, example: Example) -> bool:
        """Of the dataset's own, or the teacher can write one."""
        writes = self.teacher is not None and self.teacher.info.capabilities.generate
        return example.sample is not None or writes

    def _held_out(self, key: int, examples: list[Example]) -> list[ScoredSample]:
        """Samples to measure the divergence on; fixed through the run, so scored only once."""
        if key not in self._eval_scored:
            bare = [e for e in examples if e.sample is None]
            written = iter(self._written_greedily(bare))
            samples = [next(written) if e.sample is None else e.sample for e in examples]
            scores: Sequence[Any] = [None] * len(samples)
            if self.teacher is not None:
                scores = self.teacher.score(
                    [(s.token_ids, s.completion_start) for s in samples],
                    top_k=self.method.top_k,
                    temperature=self.method.temperature,
                )
                self.teacher.take_traffic()  # not part of a training step
            self._eval_scored[key] = [
                ScoredSample(sample, score) for sample, score in zip(samples, scores, strict=True)
            ]
        return self._eval_scored[key]

    def _written_greedily(self, bare: list[Example]) -> list[Sample]:
        """The teacher's completions of bare prompts."""
        if not bare or self.teacher is None:
            return []
        completions = self.teacher.generate(
            [e.prompt_ids for e in bare],
            max_new_tokens=self.method.max_new_tokens,
            temperature=0.0,
            seed=self.method.seed,
            stop_token_ids=self.method.stop_ids,
        )
        return [
            completed(e, c.token_ids, "teacher", truncated=c.finish_reason == "length")
            for e, c in zip(bare, completions, strict=True)
        ]

    @torch.no_grad()
    def _divergence_of(self, scored: Sequence[ScoredSample]) -> Any:
        """[sum of divergences, tokens] of a few samples."""
        batch = self._prepare_inputs(self._micro_batch(scored, normalizer=1.0))
        batch["sparse_targets"] = batch["sparse_targets"].to(self.args.device)
        self.model.eval()
        with self.compute_loss_context_manager():
            outputs = self.model(**batch)
        return np.array([float(outputs["loss"]), len(batch["sparse_targets"].rows)])


def check_examples(
    rollouts: RolloutEngine, tokenizer: Any, examples: Sequence[Example]
) -> list[Any]:
    """Verdicts on the model's own completions of the examples that carry a checker."""
    checkable = [e for e in examples if e.checker is not None]
    requests = [RolloutRequest(e.prompt_ids, key=("evaluation", e.index)) for e in checkable]
    texts = [""] * len(checkable)
    for group in rollouts.generate(requests):
        for index, rollout in group:
            texts[index] = tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
    return list(check_completions([e.checker for e in checkable if e.checker], texts))


class _StepClock(TrainerCallback):
    """Ends the measurement of a step's training time, before logging and saving."""

    def __init__(self, window: WindowMetrics) -> None:
        self.window = window

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.window.add_seconds("training", time.perf_counter())


def _share_over_ranks(new: dict[bytes, Completion]) -> dict[bytes, Completion]:
    return dict(gather_object(list(new.items())))


def _next(iterator: Iterator[list[Example]], count: int) -> list[list[Example]]:
    taken: list[list[Example]] = []
    while len(taken) < count:
        try:
            taken.append(next(iterator))
        except StopIteration:
            break
    return taken


def _flat(groups: list[list[Example]]) -> list[Example]:
    return [example for group in groups for example in group]
