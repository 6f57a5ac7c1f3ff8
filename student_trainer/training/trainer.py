"""The step: prompts in, gradient out.

`DistillationTrainer` is transformers' Trainer, made durable (`DurableTrainer`). SFT runs through it
too, as forward KL to the data's one-hot distribution. What it overrides of the Trainer:

=============================== ==============================================================
method                          why
=============================== ==============================================================
get_batch_samples               a step's rows come from `StepRows`, its completions from
                                `Pipeline`, and its tokens are counted once these are written
training_step                   a micro-batch waits for its own scores, and a substep may hold
                                several
compute_loss                    the loss is computed in the forward pass, over the step's tokens
_get_grad_norm                  is the last call before the optimizer, so a step that is not
                                finite is stopped here
evaluation_loop                 see `HeldOutEvaluation`
log                             adds what `WindowMetrics` counted, and groups the names
create_model_card               our own card
train                           a resumed run goes on with what its checkpoint keeps
=============================== ==============================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object, send_to_device
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from shared.logs import in_json
from shared.protocol import Completion
from shared.rope import length_dependent_rope
from student_trainer.config.arguments import uses_fsdp
from student_trainer.data.generations import Generations
from student_trainer.data.micro_batches import (
    assign_to_substeps,
    group_by_sizes,
    group_within_budget,
    split_to_count,
)
from student_trainer.data.sample import Example
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.model.packing import decide_packing
from student_trainer.pipeline.pipeline import PendingBatch, Pipeline
from student_trainer.pipeline.prefetched import load_prefetched, save_prefetched
from student_trainer.pipeline.targets import ScoredSample
from student_trainer.reporting.names import GROUPS, grouped
from student_trainer.rollouts import (
    RolloutServers,
    TransformersRollouts,
    VllmEngine,
)
from student_trainer.runtime.compat import names_kept
from student_trainer.runtime.log_lines import LogLines
from student_trainer.runtime.timeline import Timeline, Trace
from student_trainer.teacher.base import Teacher
from student_trainer.teacher.named import Teachers, as_teachers
from student_trainer.training.durable import DurableTrainer
from student_trainer.training.evaluation import HeldOutEvaluation
from student_trainer.training.metrics import WindowMetrics
from student_trainer.training.micro_batch import MicroBatch, MicroBatchBuilder
from student_trainer.training.nonfinite import NonFiniteGuard
from student_trainer.training.plan import TrainingPlan
from student_trainer.training.positions import check_positions
from student_trainer.training.run_lines import RunLines
from student_trainer.training.step_rows import StepRows
from student_trainer.training.student_writes import greedy_rollouts, proposals, training_rollouts


class DistillationTrainer(DurableTrainer):
    """A trainer that distils a served teacher (or, without one, the data) into ``model``.

    Args:
        model: causal language model, or a peft model around one.
        plan: what is learned, and how.
        teacher: connected client, or several by name; None for SFT.
        engine: writes the student's completions in its place.
        train_dataset, eval_dataset: lists of `Example`; to train on also an `ExampleStream`.
        Everything else: as transformers' Trainer.
    """

    def __init__(
        self,
        model: Any,
        plan: TrainingPlan,
        *,
        teacher: Teacher | Teachers | None,
        engine: VllmEngine | RolloutServers | None = None,
        **trainer_arguments: Any,
    ) -> None:
        install_sparse_loss(model)
        if length_dependent_rope(model.config) is not None:
            # Each rank has the frequencies of its own sequences; DDP would send the first rank's.
            trainer_arguments["args"].ddp_broadcast_buffers = False
        args = trainer_arguments["args"]
        if plan.num_generations > 1:
            rows = trainer_arguments["train_dataset"]
            trainer_arguments["train_dataset"] = Generations(rows, plan.num_generations)
        if args.use_cpu and args.world_size > 1 and uses_fsdp(args):
            # PyTorch shards over CPU processes too, but accelerate passes FSDP over in silence
            # where it sees no GPUs. It replaces MULTI_GPU by FSDP.
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().__init__(model, inputs=plan.inputs, data_collator=list, **trainer_arguments)
        self.loss_is_scaled_for_ga = True  # compute_loss normalises over the whole optimizer step
        self.plan = plan
        self.teachers = as_teachers(teacher)
        self.engine = engine
        with self.accelerator.autocast():  # flash attention takes half precision only
            packed = decide_packing(model, plan.packing, plan.longest)
        self._check_positions()
        tokenizer: Any = self.processing_class
        pad = tokenizer.pad_token_id
        self.builder = MicroBatchBuilder(
            plan, int(pad if pad is not None else plan.method.stop_ids[0]), packed
        )
        names = () if self.teachers is None else self.teachers.names
        self.window = WindowMetrics(names)
        self.timeline = Timeline(self.window.add_seconds, self._trace())
        self.guard = NonFiniteGuard(self._output, self.ranks)
        self.rows = StepRows(self.train_dataset, self.args)
        batch_size, pad_token_id = self.args.per_device_train_batch_size, self.builder.pad_token_id
        self.rollouts = training_rollouts(self.model, plan, engine, pad_token_id=pad_token_id)
        self.pipeline = Pipeline(
            plan.method,
            self.teachers,
            self.rollouts,
            upcoming=self.rows.of,
            staleness=plan.staleness,
            prefetch_steps=plan.prefetch_steps,
            request_size=batch_size,
            share=_share_over_ranks,
            together=self.ranks.together,
            propose=proposals(self.model, plan, self.builder, batch_size),
            timeline=self.timeline,
            waited=self.window.add_wait,
            remember=self.rows.stream is None,
        )
        self.held_out = HeldOutEvaluation(
            plan=plan,
            builder=self.builder,
            teachers=self.teachers,
            rollouts=greedy_rollouts(
                self.model,
                plan,
                engine,
                pad_token_id=pad_token_id,
                batch_size=batch_size * self.args.gradient_accumulation_steps,
            ),
            tokenizer=tokenizer,
            ranks=self.ranks,
            on_device=partial(send_to_device, device=self.args.device),
            autocast=self.compute_loss_context_manager,
            folder=self._output,
            unsafe_sandbox=self.args.unsafe_sandbox,
        )
        self.add_callback(_StepEnd(self))
        for printer in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(printer)
        self.lines = RunLines(bar=not self.args.disable_tqdm)
        self.add_callback(LogLines() if in_json() else self.lines)

    # A training step: take the generation batch, count its tokens, then one loss a micro-batch.

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Return one step's micro-batches, by substep, and its number of learned tokens.

        Completions are written; scores may be missing. The loader's iterator is left alone: the
        order is known for all steps, see `StepRows`.
        """
        step = self.state.global_step
        if step >= self.state.max_steps:  # resumed at its end: the Trainer would learn one more
            self.control.should_training_stop = True
            return [], torch.zeros((), device=device)
        self.timeline.begin_step(step + 1)
        self.guard.begin_step()
        groups = self.rows.micro_batches(step)
        self.rows.forget_before(step)
        assert len(groups) == num_batches
        last = self.state.max_steps - 1
        if self.plan.method.seq_kd:
            # The next epoch reuses completions that are not written yet, so none of it starts.
            last = min(last, self.rows.last_of_epoch(step))
        batch = self.pipeline.take(step, last)
        samples = self.pipeline.samples(batch)
        self.window.add_step(samples, step=step, on_policy=batch.on_policy)
        tokens = sum(int(sample.completion_mask.sum()) for sample in samples)
        total = self.accelerator.reduce(torch.tensor(tokens, device=device), "sum")
        lengths, sizes = [len(s.token_ids) for s in samples], [len(group) for group in groups]
        pending = [
            _Pending(batch, indices, float(total))
            for indices in self._grouped(lengths, sizes, shortest_first=batch.on_policy)
        ]
        substeps = assign_to_substeps(pending, len(groups))
        return [{"pending": substep} for substep in substeps], total

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of a substep's micro-batches, each once its scores are there.

        The Trainer counts on ``gradient_accumulation_steps`` substeps. Gradients are added over
        ranks only in the last micro-batch of the last substep.
        """
        loss = torch.zeros((), device=self.args.device)
        learned: list[MicroBatch] = []
        for place, pending in enumerate(inputs["pending"]):
            last = place + 1 == len(inputs["pending"])
            waits = not (last or self._syncs_each_batch)
            # DDP sends buffers in a step's first forward pass and gradients in its last backward
            # pass, so all ranks must reach both.
            meets = self._is_sharded or not self.guard.began
            meets |= last and self.accelerator.sync_gradients
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                one, micro_batch = self._learn(model, pending, num_items_in_batch, meets=meets)
            loss += one
            learned.append(micro_batch)
        inputs.update(_flat(learned))  # by which the Trainer counts tokens and work
        self.guard.add_loss(loss)
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
        """Return the loss of one micro-batch, and its inputs."""
        with self.timeline.during("forward_backward", sequences=len(pending.indices)):
            scored = self._scored(pending, meets=meets)
            self.guard.add_batch(scored)
            micro_batch = self.builder.training(scored, pending.normalizer)
            inputs = {name: micro_batch[name] for name in micro_batch if name != "sparse_targets"}
            tokens = sum(len(item.sample.token_ids) for item in scored)
            self.window.add_inputs(inputs["input_ids"].numel(), tokens)
            loss: torch.Tensor = super().training_step(model, micro_batch, num_items_in_batch)
            if self.args.logging_nan_inf_filter:
                loss.isfinite().item()  # the Trainer waits for the device here, so it counts here
        return loss, inputs

    def _scored(self, pending: _Pending, *, meets: bool) -> list[ScoredSample]:
        if self.teachers is None:
            return self.pipeline.scored(pending.batch, pending.indices)
        return self.ranks.together(
            lambda: self.pipeline.scored(pending.batch, pending.indices), meets=meets
        )

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Call the model, whose forward pass computes the loss (`model.forward`), and scale it.

        The loss is the sum of the divergences / learned tokens of the whole step over all ranks,
        times the number of ranks, because the distributed wrappers average gradients over them.
        """
        targets: SparseTargets = inputs["sparse_targets"]
        targets = replace(targets.to(inputs["input_ids"].device), in_place=self._adds_in_place)
        inputs = {**inputs, "sparse_targets": targets}
        outputs = model(**inputs)
        self.window.add_statistics(outputs["statistics"], targets.taught)
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # With --fp16 the loss scaler looks at the gradient, and tries scales that are too large.
        looked_at = None if self.args.fp16 else norm
        step, skip = self.state.global_step + 1, self.args.nonfinite == "skip"
        if not self.guard.check(step, looked_at, skip=skip):
            model.zero_grad()  # to None, of which no optimizer learns
            self.window.skip_step()
        return norm

    def _grouped(
        self, lengths: Sequence[int], sizes: Sequence[int], *, shortest_first: bool
    ) -> list[list[int]]:
        """Return the samples of each micro-batch; equally many micro-batches on every rank."""
        budget = self.plan.max_tokens_per_batch
        if budget is None:
            return group_by_sizes(lengths, sizes, shortest_first=shortest_first)
        packed = self.builder.packed
        groups = group_within_budget(lengths, budget, packed=packed, shortest_first=shortest_first)
        counts = self.accelerator.gather(torch.tensor([len(groups)], device=self.args.device))
        return split_to_count(groups, int(counts.max()))

    @property
    def _is_sharded(self) -> bool:
        """Return whether ranks exchange weights or gradients in each micro-batch."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or self._syncs_each_batch

    @property
    def _syncs_each_batch(self) -> bool:
        """Return whether FSDP adds gradients in each micro-batch, to keep none unsharded."""
        accelerator: Any = self.args.accelerator_config
        return bool((accelerator.gradient_accumulation_kwargs or {}).get("sync_each_batch"))

    @property
    def _adds_in_place(self) -> bool:
        """Return whether nothing but the optimizer sees gradients, and the loss is not scaled."""
        alone = self.accelerator.distributed_type == DistributedType.NO and self.args.n_gpu <= 1
        unscaled = self.accelerator.scaler is None and not self.args.fp16
        return alone and unscaled and not self.args.torch_compile

    # What the Trainer counts, logs and writes.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what the window counted where a loss is logged."""
        if "loss" in logs:
            window = self.window.drain(self.ranks.sum, with_teacher=self.teachers is not None)
            logs = {**logs, **window}
            if self.engine is not None and self.engine.drift is not None:
                logs["rollout_drift"] = self.engine.drift
            if isinstance(self.engine, RolloutServers) and self.engine.sent_bytes is not None:
                logs["rollout_bytes"] = self.engine.sent_bytes
        named = grouped(logs)
        with names_kept(GROUPS):
            super().log(named, start_time)
        if "epoch" in named:
            logs["epoch"] = named["epoch"]  # the Trainer saves it with its results

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `HeldOutEvaluation` does."""
        examples: list[Example] = list(dataloader.dataset)
        found = self.held_out.run(
            self.model,
            examples,
            dataset=id(dataloader.dataset),
            batch_size=self.args.per_device_eval_batch_size,
            step=self.state.global_step,
            # The engine has one version of the weights.
            before_rollouts=self.pipeline.finish_writing,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(None, None, metrics, len(examples))

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write README.md into the output folder; `push_to_hub` calls it too."""
        if self.plan.card is None:
            super().create_model_card(model_name=model_name, **kwargs)
        elif self.is_world_process_zero():
            text = self.plan.card(model_name or self._output.resolve().name, self.state.log_history)
            (self._output / "README.md").write_text(text, encoding="utf-8")

    # Checkpoints keep what was begun ahead, beside the random state: both are a rank's own.

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train as `DurableTrainer` does; go on with what a checkpoint keeps."""
        if resume_from_checkpoint is not None:
            self.rows.restore(resume_from_checkpoint, self.ranks.rank)
            file = self._ahead_file(resume_from_checkpoint)
            if file.exists():
                self.pipeline.resume(load_prefetched(file))
            self.held_out.resume()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.lines.close()

    def wait_no_longer(self) -> None:
        """End a wait for the teacher or for rollout servers, as `DurableTrainer` says."""
        if isinstance(self.engine, RolloutServers):
            self.engine.wait_no_longer()
        super().wait_no_longer()

    def save_beside(self, folder: Path) -> None:
        """Write the batches that were begun ahead, and the position in a stream."""
        ahead = self.pipeline.prefetched(self.state.global_step)
        if ahead:
            save_prefetched(self._ahead_file(folder), ahead)
        self.rows.save(folder, self.ranks.rank, self.state.global_step)

    def _ahead_file(self, folder: str | Path) -> Path:
        return Path(folder) / f"ahead-{self.ranks.rank}.npz"

    # Parts that are made once.

    def prepare_rollouts(self) -> None:
        """Find the way the student generates, if it will write completions in this run.

        Raises:
            RolloutError: it cannot.
        """
        held_out: Any = self.eval_dataset or []
        writes = self.plan.method.lmbda > 0 or any(e.checker is not None for e in held_out)
        if writes and isinstance(self.rollouts, TransformersRollouts):
            self.rollouts.prepare()

    def _check_positions(self) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return
        sizes = {self.args.per_device_train_batch_size}
        if self.eval_dataset is not None:
            sizes.add(self.args.per_device_eval_batch_size)
        check_positions(
            self.model.config,
            longest=self.plan.longest,
            batch_sizes=sizes,
            regrouped=self.plan.max_tokens_per_batch is not None,
        )

    def _trace(self) -> Trace | None:
        if self.plan.trace_steps is None or not self.is_world_process_zero():
            return None
        return Trace(self._output / "trace.json", self.plan.trace_steps)

    def count_traffic(self) -> None:
        """Add to the window what the teacher sent since the last step."""
        if self.teachers is None:
            return
        for name, (received, scored) in self.teachers.take_traffic().items():
            self.window.add_traffic(name, received, scored)
        names = ("looked_up", "found", "corrupt")
        for name, count in zip(names, self.teachers.take_lookups(), strict=True):
            self.window.add(name, count)


@dataclass(frozen=True)
class _Pending:
    """A micro-batch whose scores may still be in flight."""

    batch: PendingBatch
    indices: Sequence[int]
    normalizer: float


class _StepEnd(TrainerCallback):
    """A callback that ends the measurements of a step before it is logged and saved.

    Before the first step it tries rollouts: the model is then on its device and wrapped.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.prepare_rollouts()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.timeline.end_step()
        self.trainer.count_traffic()
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True  # the last window, however short


def _share_over_ranks(new: dict[bytes, Completion]) -> dict[bytes, Completion]:
    return dict(gather_object(list(new.items())))


def _flat(micro_batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    """Return the ids of all micro-batches in one tensor [sum of B·L], and their masks likewise."""
    names = ("input_ids", "attention_mask")  # packed inputs have no mask
    return {
        name: torch.cat([one[name].flatten() for one in micro_batches])
        for name in names
        if micro_batches and name in micro_batches[0]
    } or {"input_ids": torch.zeros(0)}
