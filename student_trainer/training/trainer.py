"""The step: prompts in, gradient out.

`DistillationTrainer` is transformers' Trainer, made durable (`DurableTrainer`), with three rooms
rebuilt: what a generation batch becomes (`get_batch_samples`), the loss (`compute_loss`) and
evaluation (`evaluation_loop`). SFT runs through it too, as forward KL to the data's one-hot
distribution.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from shared.errors import ConfigurationError, NonFiniteError
from shared.logs import in_json
from shared.protocol import Completion
from shared.rope import length_dependent_rope
from shared.text import completion_text
from student_trainer.config.arguments import uses_fsdp
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.micro_batches import (
    assign_to_substeps,
    group_by_sizes,
    group_within_budget,
    split_to_count,
)
from student_trainer.data.order import TrainingOrder
from student_trainer.data.sample import Example, Sample, completed
from student_trainer.data.stream import ExampleStream, StreamOrder, load_state, save_state
from student_trainer.evaluation.checkers import CheckResult, check_completions, summarize
from student_trainer.losses import Kernel, Tail
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.model.packing import Packing, decide_packing
from student_trainer.model.top_tokens import TopTokenProposals
from student_trainer.pipeline.pipeline import DistillationConfig, PendingBatch, Pipeline
from student_trainer.pipeline.prefetched import load_prefetched, save_prefetched
from student_trainer.pipeline.targets import ScoredSample, hard_labels, sparse_distribution
from student_trainer.reporting.runs import read_held_out
from student_trainer.rollouts import (
    RolloutEngine,
    RolloutRequest,
    TransformersRollouts,
    VllmEngine,
    VllmRollouts,
)
from student_trainer.runtime.log_lines import LogLines
from student_trainer.runtime.timeline import Timeline, Trace
from student_trainer.teacher.base import Teacher
from student_trainer.training import held_out
from student_trainer.training.durable import DurableTrainer
from student_trainer.training.metrics import WindowMetrics
from student_trainer.training.nonfinite import save_batch

logger = logging.getLogger(__name__)

MicroBatch = dict[str, Any]


class DistillationTrainer(DurableTrainer):
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
        generation_batch_size: prompts generated at once; None for as many as a step has.
        max_tokens_per_batch: regroups a step's samples into micro-batches of at most so many
            tokens, padding included; None for those of the data loader's size.
        packing: whether a micro-batch is one row of sequences instead of padded ones.
        longest: tokens of the longest sequence there may be; None where that is not known.
        rollout_temperature: of the student's sampling.
        staleness, prefetch_steps: see `Pipeline`.
        card: README.md's text, by the model's name and what was logged; None for the Trainer's.
        trace_steps: (first, last) step to trace, counted from 1, in ``trace.json`` in the output
            folder; on the main process alone.
        vllm: writes the student's completions in its place.
        train_dataset, eval_dataset: lists of `Example`; to train on also an `ExampleStream`.
        Everything else: as transformers' Trainer.
    """

    def __init__(
        self,
        model: Any,
        *,
        method: DistillationConfig,
        beta: float,
        teacher: Teacher | None,
        vocab_size: int,
        tail: Tail = "bucket",
        sft_weight: float = 0.0,
        kernel: Kernel = "auto",
        student_top_m: int = 0,
        rollout_temperature: float = 1.0,
        generation_batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        packing: Packing = "auto",
        longest: int | None = None,
        staleness: int = 0,
        prefetch_steps: int = 0,
        card: Callable[[str, list[dict[str, Any]]], str] | None = None,
        trace_steps: tuple[int, int] | None = None,
        inputs: Mapping[str, Any] | None = None,
        vllm: VllmEngine | None = None,
        **trainer_arguments: Any,
    ) -> None:
        install_sparse_loss(model)
        if length_dependent_rope(model.config) is not None:
            # Each rank has the frequencies of its own sequences; DDP would send the first rank's.
            trainer_arguments["args"].ddp_broadcast_buffers = False
        super().__init__(model, inputs=inputs, data_collator=list, **trainer_arguments)
        self.loss_is_scaled_for_ga = True  # normalised over the whole optimizer step, see below
        self.method = method
        self.beta = beta
        self.tail: Tail = tail
        self.sft_weight = sft_weight
        self.kernel: Kernel = kernel
        self.teacher = teacher
        self.vocab_size = vocab_size
        self._card = card
        self.max_tokens_per_batch = max_tokens_per_batch
        with self.accelerator.autocast():  # flash attention takes half precision only
            self.packed = decide_packing(model, packing, longest)
        self._check_positions(longest)
        tokenizer: Any = self.processing_class
        pad = tokenizer.pad_token_id
        self.pad_token_id = int(pad if pad is not None else method.stop_ids[0])
        self.window = WindowMetrics()
        self.timeline = Timeline(self.window.add_seconds, self._trace(trace_steps))
        self.order = self._training_order()
        self.vllm = vllm
        self.rollouts = self._rollout_engine(
            rollout_temperature, generation_batch_size, one_group=student_top_m > 0
        )
        self.pipeline = Pipeline(
            method,
            teacher,
            self.rollouts,
            upcoming=lambda step: _flat(self._groups(step)),
            staleness=staleness,
            prefetch_steps=prefetch_steps,
            request_size=self.args.per_device_train_batch_size,
            share=_share_over_ranks,
            together=self._together,
            propose=self._proposals(student_top_m),
            timeline=self.timeline,
            remember=self._stream is None,
        )
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self._greedy = self._rollout_engine(0.0, generation_batch_size or step)
        self._eval_scored: dict[int, list[ScoredSample]] = {}
        self._step_loss = torch.zeros(())
        self._step_batch: list[list[ScoredSample]] = []  # its micro-batches, as they were learned
        self._looked: dict[str, Any] | None = None
        self.add_callback(_StepEnd(self))
        if in_json():
            for printer in (PrinterCallback, ProgressCallback):
                self.remove_callback(printer)
            self.add_callback(LogLines())

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.use_cpu and self.args.world_size > 1 and uses_fsdp(self.args):
            # PyTorch shards over CPU processes too, but accelerate passes FSDP over in silence
            # where it sees no GPUs. What it is told here is what it then replaces by FSDP.
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def _check_positions(self, longest: int | None) -> None:
        """Refuse micro-batches that ranks would compute in unlike numbers of forward passes.

        Raises:
            ConfigurationError: ranks share the weights, and a micro-batch may hold sequences of
                either side of the length at which the model changes its positions.
        """
        rope = length_dependent_rope(self.model.config)
        if rope is None or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return
        most = rope.original - 1 if rope.each_length else rope.original
        if longest is not None and longest <= most:
            return
        sizes = {self.args.per_device_train_batch_size}
        if self.eval_dataset is not None:
            sizes.add(self.args.per_device_eval_batch_size)
        # With frequencies of each length's own, one sequence may take two passes.
        alone = not rope.each_length and sizes == {1} and self.max_tokens_per_batch is None
        if not alone:
            remedy = f"pass --max_length {most}"
            if not rope.each_length:
                remedy += (
                    ", or --per_device_train_batch_size 1 and --per_device_eval_batch_size 1 "
                    "without --max_tokens_per_batch"
                )
            raise ConfigurationError(
                f"sharded over ranks, a model that changes its positions at {rope.original} tokens "
                f"must take as many forward passes on each rank: {remedy}"
            )

    def prepare_rollouts(self) -> None:
        """Try how the student writes, where this run will have it write.

        Raises:
            RolloutError: it cannot.
        """
        held_out: Any = self.eval_dataset or []
        writes = self.method.lmbda > 0 or any(e.checker is not None for e in held_out)
        if writes and isinstance(self.rollouts, TransformersRollouts):
            self.rollouts.prepare()

    def _trace(self, steps: tuple[int, int] | None) -> Trace | None:
        if steps is None or not self.is_world_process_zero():
            return None
        return Trace(self._output / "trace.json", steps)

    @property
    def _stream(self) -> ExampleStream | None:
        """The rows to train on, where they are not all in memory."""
        rows: Any = self.train_dataset
        return rows if isinstance(rows, ExampleStream) else None

    def _training_order(self) -> TrainingOrder | StreamOrder:
        if self._stream is not None:
            return StreamOrder(
                self.args.per_device_train_batch_size,
                self.args.gradient_accumulation_steps,
                self.args.max_steps,
            )
        seed = self.args.data_seed
        return TrainingOrder(
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
            seed=self.args.seed if seed is None else seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            drop_last=self.args.dataloader_drop_last,
        )

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
            packed=self.packed,
        )

    # A training step: take the generation batch, count its tokens, then one loss a micro-batch.

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[list[MicroBatch]], torch.Tensor]:
        """The micro-batches of each substep of one optimizer step, written and not yet scored.

        And how many tokens they teach. The loader's iterator is left alone: the order is known for
        all steps, see `TrainingOrder`.
        """
        step = self.state.global_step
        self.timeline.begin_step(step + 1)
        self._step_loss, self._step_batch = torch.zeros((), device=device), []
        groups = self._groups(step)
        if self._stream is not None:
            self._stream.forget(before=self.order.micro_batches(step)[0][0])
        assert len(groups) == num_batches
        last = self.state.max_steps - 1
        if self.method.seq_kd:  # a later epoch asks for what this one has not been answered yet
            last = min(last, self.order.last_of_epoch(step))
        batch = self.pipeline.take(step, last)
        samples = self.pipeline.samples(batch)
        self.window.add_step(samples, step=step, on_policy=batch.on_policy)
        tokens = sum(int(sample.completion_mask.sum()) for sample in samples)
        total = self.accelerator.reduce(torch.tensor(tokens, device=device), "sum")
        lengths, sizes = [len(s.token_ids) for s in samples], [len(group) for group in groups]
        micro_batches: list[MicroBatch] = [
            {"pending": _Pending(batch, indices, float(total))}
            for indices in self._grouped(lengths, sizes, shortest_first=batch.on_policy)
        ]
        return assign_to_substeps(micro_batches, len(groups)), total

    def _grouped(
        self, lengths: Sequence[int], sizes: Sequence[int], *, shortest_first: bool
    ) -> list[list[int]]:
        """Indices of the samples of each micro-batch; equally many micro-batches on every rank."""
        if self.max_tokens_per_batch is None:
            return group_by_sizes(lengths, sizes, shortest_first=shortest_first)
        groups = group_within_budget(
            lengths, self.max_tokens_per_batch, packed=self.packed, shortest_first=shortest_first
        )
        counts = self.accelerator.gather(torch.tensor([len(groups)], device=self.args.device))
        return split_to_count(groups, int(counts.max()))

    def training_step(
        self,
        model: Any,
        inputs: list[MicroBatch],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of a substep's micro-batches, each as soon as its scores are there.

        The Trainer counts on ``gradient_accumulation_steps`` substeps, and adds gradients over
        ranks in the last; where a token budget puts several micro-batches in it, in their last.
        """
        loss = torch.zeros((), device=self.args.device)
        for place, pending in enumerate(inputs):
            last = place + 1 == len(inputs)
            waits = not (last or self._syncs_each_batch)
            # In a step's first forward pass DDP sends buffers, and in its last backward gradients.
            meets = self._is_sharded or not self._step_batch
            meets |= last and self.accelerator.sync_gradients
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                one, inputs[place] = self._learn(
                    model, pending["pending"], num_items_in_batch, meets=meets
                )
            loss += one
        self._step_loss += loss
        if self.accelerator.sync_gradients:
            self.timeline.begin("optimizer")  # until the step's end
        return loss

    def _learn(
        self,
        model: Any,
        pending: _Pending,
        num_items_in_batch: torch.Tensor | int | None,
        *,
        meets: bool,
    ) -> tuple[torch.Tensor, MicroBatch]:
        """The loss of one micro-batch, and its inputs, by which the Trainer counts its work."""
        with self.timeline.during("forward_backward", sequences=len(pending.indices)):
            scored = self._scored(pending, meets=meets)
            self._step_batch.append(scored)
            micro_batch = self._micro_batch(
                scored,
                normalizer=pending.normalizer,
                tail=self.tail,
                sft_weight=self.sft_weight,
            )
            inputs = {name: micro_batch[name] for name in micro_batch if name != "sparse_targets"}
            tokens = sum(len(item.sample.token_ids) for item in scored)
            self.window.add_inputs(inputs["input_ids"].numel(), tokens)
            loss: torch.Tensor = super().training_step(model, micro_batch, num_items_in_batch)
            if self.args.logging_nan_inf_filter:
                loss.isfinite().item()  # the Trainer waits for the device here, so it counts here
        return loss, inputs

    def _scored(self, pending: _Pending, *, meets: bool) -> list[ScoredSample]:
        if self.teacher is None:
            return self.pipeline.scored(pending.batch, pending.indices)
        return self._together(
            lambda: self.pipeline.scored(pending.batch, pending.indices), meets=meets
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the Trainer's, which asks for it last before the optimizer."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._require_finite(model, norm)
        return norm

    def _require_finite(self, model: Any, grad_norm: Any) -> None:
        """Stop or skip a step with a loss or gradient that is not finite, on all ranks alike.

        With --fp16 the gradient is left to the loss scaler, which tries scales that are too large.

        Raises:
            NonFiniteError: names the file that keeps this rank's batch.
        """
        loss, norm = float(self._step_loss), 0.0
        if grad_norm is not None and not self.args.fp16:
            norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not self._sum_over_ranks(torch.tensor(float(not finite))):
            return
        step, rank = self.state.global_step + 1, self.accelerator.process_index
        found = f"step {step}: the loss is {loss} and the norm of the gradient {norm} (rank {rank})"
        if self.args.nonfinite == "skip":
            logger.warning("%s; the step is skipped", found)
            model.zero_grad()  # to None, of which no optimizer learns
            self.window.skip_step()
            return
        file = self._output / f"nonfinite-step{step}-rank{rank}.npz"
        try:
            save_batch(file, self._step_batch)
            kept = f"Its batch is in {file}, for student_trainer.training.nonfinite.load_batch"
        except OSError as error:
            kept = f"Its batch could not be kept in {file}: {error.strerror or error}"
        raise NonFiniteError(
            f"{found}. {kept}; no checkpoint was written after it. Look for rows that are unlike "
            "the others, or lower --learning_rate; --nonfinite skip with --resume_from_checkpoint "
            "auto leaves it out"
        )

    @property
    def _is_sharded(self) -> bool:
        """Whether ranks exchange weights or gradients in each micro-batch."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or self._syncs_each_batch

    @property
    def _syncs_each_batch(self) -> bool:
        """As accelerate's option says: what FSDP needs to keep no unsharded gradients."""
        return bool(self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False))

    def floating_point_ops(self, inputs: list[MicroBatch]) -> int:
        """Of all micro-batches of a substep."""
        return sum(super(DistillationTrainer, self).floating_point_ops(one) for one in inputs)

    def _track_num_input_tokens(self, inputs: list[MicroBatch]) -> None:
        for micro_batch in inputs:
            super()._track_num_input_tokens(micro_batch)

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

    def _groups(self, step: int) -> list[list[Example]]:
        """The examples of each of the step's micro-batches."""
        rows: Any = self.train_dataset
        return [[rows[i] for i in numbers] for numbers in self.order.micro_batches(step)]

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """README.md in the output folder; `push_to_hub` calls it too."""
        if self._card is None:
            super().create_model_card(model_name=model_name, **kwargs)
        elif self.is_world_process_zero():
            text = self._card(model_name or self._output.resolve().name, self.state.log_history)
            (self._output / "README.md").write_text(text, encoding="utf-8")

    # Checkpoints keep what was begun ahead, beside the random state: both are a rank's own.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        ahead = self.pipeline.prefetched(self.state.global_step)
        if ahead:
            save_prefetched(self._ahead_file(output_dir), ahead)
        if self._stream is not None:
            first = self.order.micro_batches(self.state.global_step)[0][0]
            rank = self.accelerator.process_index
            save_state(output_dir, rank, self._stream.state(first))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            if self._stream is not None:
                rank = self.accelerator.process_index
                self._stream.restore(load_state(resume_from_checkpoint, rank))
            file = self._ahead_file(resume_from_checkpoint)
            if file.exists():
                self.pipeline.resume(load_prefetched(file))
            self._looked = read_held_out(self._output)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _ahead_file(self, folder: str) -> Path:
        return Path(folder) / f"ahead-{self.accelerator.process_index}.npz"

    def _micro_batch(
        self,
        scored: Sequence[ScoredSample],
        *,
        normalizer: float,
        tail: Tail = "bucket",
        sft_weight: float = 0.0,
    ) -> MicroBatch:
        """Inputs of the model, padded or packed, and what their rows are compared with."""
        samples = [item.sample for item in scored]
        weights, labels = hard_labels(scored, sft_weight)
        return {
            **model_inputs(samples, self.pad_token_id, packed=self.packed),
            "sparse_targets": SparseTargets(
                positions=predicting_positions(
                    samples, [s.completion_mask for s in samples], packed=self.packed
                ),
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
        names = ("looked_up", "found", "corrupt")
        for name, count in zip(names, self.teacher.take_lookups(), strict=True):
            self.window.add(name, count)

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
        written once. Each rank takes every n-th row; sums are added over ranks. A few samples are
        shown token by token, see `held_out`.
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
            self.pipeline.finish_writing()  # the engine has one version of the weights
            self._greedy.sync(self.state.global_step)
        checked = check_examples(
            self._greedy, self.processing_class, asked, unsafe=self.args.unsafe_sandbox
        )
        own = {e.index: (text, r.passed) for e, (text, r) in zip(asked, checked, strict=True)}
        self._show(measured, scored, own)
        divergence, tokens = self._sum_over_ranks(torch.tensor(sums)).tolist()
        metrics: dict[str, float] = {}
        if tokens:
            metrics[f"{metric_key_prefix}_loss"] = divergence / tokens
            if self.teacher is not None:
                metrics[f"{metric_key_prefix}_divergence"] = divergence / tokens
        results = [result for _, result in checked[:real]]
        for name, value in summarize(gather_object(results)).items():
            metrics[f"{metric_key_prefix}_{name}"] = value
        return EvalLoopOutput(None, None, metrics, len(examples))

    def _show(
        self,
        examples: Sequence[Example],
        scored: Sequence[ScoredSample],
        own: dict[int, tuple[str, bool]],
    ) -> None:
        """Write what `held_out` shows; every rank looks at as many, and the first one writes."""
        shown = [held_out.cut(item) for item in scored[: held_out.COUNT]]
        self.model.eval()
        looks = []
        for item in shown:
            inputs = self._prepare_inputs(self._micro_batch([item], normalizer=1.0))
            inputs["sparse_targets"] = inputs["sparse_targets"].to(self.args.device)
            with self.compute_loss_context_manager():
                looks.append(held_out.look(self.model, inputs, self.processing_class))
        if not shown or not self.is_world_process_zero():
            return
        chosen = examples[: len(shown)]
        content = held_out.write(
            self._output,
            [
                held_out.described(item, example.name, example.prompt, self.processing_class)
                for item, example in zip(shown, chosen, strict=True)
            ],
            looks,
            [own.get(example.index) for example in chosen],
            step=self.state.global_step,
            first=self._looked,
            beta=self.beta,
            temperature=self.method.temperature,
            teacher=self.teacher is not None,
        )
        self._looked = self._looked or content

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
                score = partial(
                    self.teacher.score,
                    [(s.token_ids, s.completion_start) for s in samples],
                    top_k=self.method.top_k,
                    temperature=self.method.temperature,
                )
                scores = self._together(score)
                self.teacher.take_traffic()  # not part of a training step
            self._eval_scored[key] = [
                ScoredSample(sample, score) for sample, score in zip(samples, scores, strict=True)
            ]
        return self._eval_scored[key]

    def _written_greedily(self, bare: list[Example]) -> list[Sample]:
        """The teacher's completions of bare prompts."""
        if self.teacher is None:
            return []
        teacher, sampling = self.teacher, self.method.sampling(0.0, scored=False)
        prompts = [example.prompt_ids for example in bare]
        # Also of a rank that has none: all meet here.
        completions = self._together(lambda: teacher.generate(prompts, sampling) if prompts else [])
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
        return np.array([float(outputs["loss"]), len(batch["sparse_targets"].positions)])


def check_examples(
    rollouts: RolloutEngine, tokenizer: Any, examples: Sequence[Example], *, unsafe: bool = False
) -> list[tuple[str, CheckResult]]:
    """The model's own completions of examples that carry a checker, and the verdicts on them."""
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


@dataclass(frozen=True)
class _Pending:
    """A micro-batch whose scores may still be in flight."""

    batch: PendingBatch
    indices: Sequence[int]
    normalizer: float


class _StepEnd(TrainerCallback):
    """Ends the measurements of a step, before logging and saving; tries rollouts before the first.

    Then the model is on its device and wrapped.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.prepare_rollouts()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.timeline.end_step()
        self.trainer._count_traffic()


def _share_over_ranks(new: dict[bytes, Completion]) -> dict[bytes, Completion]:
    return dict(gather_object(list(new.items())))


def _flat(groups: list[list[Example]]) -> list[Example]:
    return [example for group in groups for example in group]
