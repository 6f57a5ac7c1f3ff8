"""A Trainer whose runs survive SIGTERM, Ctrl-C, a lost teacher and a full disk.

Checkpoints are whole or not there. SIGTERM and Ctrl-C save one and stop, and so does a teacher that
is lost, on all ranks alike. `DurableTrainer` overrides these methods of transformers' Trainer:

=============================== ==============================================================
method                          why
=============================== ==============================================================
train                           SIGTERM, Ctrl-C and a lost teacher end it with a checkpoint
_get_output_dir,                a checkpoint is written beside, then renamed
_save_checkpoint,
_push_from_checkpoint
=============================== ==============================================================
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from shared.errors import CheckpointError, ProtocolError, RolloutServerError, TeacherError
from student_trainer.reporting.names import grouped, grouped_name
from student_trainer.runtime.compat import without_key_warnings
from student_trainer.runtime.random_state import RandomState
from student_trainer.runtime.ranks import Ranks
from student_trainer.runtime.signals import stop_event
from student_trainer.training.checkpoints import (
    keep_latest,
    publish,
    remove_unfinished,
    unfinished,
    writing,
)
from student_trainer.training.inputs import keep_inputs
from student_trainer.training.weights import check_sums, keep_sums, load_whole, sum_weights

_PATIENCE = 5.0  # seconds that a stop leaves the teacher; torchrun leaves its processes 30

logger = logging.getLogger(__name__)


class DurableTrainer(Trainer):
    """A Trainer that saves whole checkpoints, and one more when its run is ended early.

    Args:
        inputs: what the run is trained with, for its checkpoints; see `training.inputs`.
        trainer_arguments: those of transformers' Trainer.

    Attributes:
        stopped: whether SIGTERM or Ctrl-C ended the run before the last step.
        begun: step that training went on from; 0 for a run from the start.
        ranks: the processes of the run.
    """

    def __init__(
        self, model: Any, *, inputs: Mapping[str, Any] | None = None, **trainer_arguments: Any
    ) -> None:
        self._inputs = inputs
        super().__init__(model, **trainer_arguments)
        self.ranks = Ranks(self.accelerator)
        self.stopped = False
        self.begun = 0
        self._saved_step = -1  # of the last checkpoint
        self._writing_checkpoint = False
        self._random_state: RandomState | None = None  # at the end of the last step
        self._resumed_from: Path | None = None
        # Before those that upload the model when it is trained.
        self.callback_handler.callbacks.insert(0, _LoadedWeights(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train as the Trainer does; told to end, save a checkpoint, set `stopped` and return.

        SIGTERM and SIGINT (Ctrl-C) tell it; a second one ends the process at once.

        Raises:
            CheckpointError: ``resume_from_checkpoint`` does not load, or not all of its weights;
                code in it is never run.
        """
        self._resumed_from = (
            None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        )
        self._remove_unfinished()
        stops = stop_event(_PATIENCE, self.wait_no_longer, self._say_it_stops)
        with without_key_warnings() if self._is_whole else nullcontext(), stops as told:
            self.add_callback(_AfterStep(self, told))
            try:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                self._remove_unfinished()
                return result
            except RolloutServerError:
                # Completions that were being written by older weights are lost, and with them what
                # a checkpoint of this step needs; the last one is there.
                with suppress(RolloutServerError):
                    self._save_what_was_learned()
                step = self.state.global_step
                saved = self._random_state is None or self._saved_step == step
                self.stopped = told.is_set() and saved and step > 0
                if not self.stopped:
                    raise
                self._remove_unfinished()
                return None
            except (TeacherError, ProtocolError):
                self._save_what_was_learned()
                self._remove_unfinished()
                self.stopped = told.is_set() and self.state.global_step > 0
                if not self.stopped:
                    raise
                return None
            except (UnpicklingError, SafetensorError) as error:
                raise CheckpointError(
                    f"{resume_from_checkpoint} does not load, and nothing in it was run: it is "
                    "damaged, or holds more than tensors and numbers. Go on from another one by "
                    "--resume_from_checkpoint FOLDER, or delete it"
                ) from error

    def wait_no_longer(self) -> None:
        """End a wait for a server, if there is one: for a signal's handler.

        Raises:
            TeacherUnreachableError: this process waited for the teacher.
        """
        self.ranks.wait_no_longer()

    def _get_output_dir(self, trial: Any) -> str:
        return str(unfinished(self._output) if self._writing_checkpoint else self._output)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint: all ranks write it in `unfinished`, and the main process renames it.

        Raises:
            CheckpointError: the disk takes no more.
        """
        output, step = self._output, self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with writing(f"the checkpoint after step {step}", output):
            self._writing_checkpoint = True
            super()._save_checkpoint(model, trial)
            self._writing_checkpoint = False
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(output / name)
                if self.args.should_save:  # the file says where it was written
                    self.state.save_to_json(str(unfinished(output) / name / "trainer_state.json"))
            sums = sum_weights(self.model, trainable=True)
            if self.args.should_save:
                keep_sums(sums, unfinished(output) / name)
            if not self.args.save_only_model:
                self.save_beside(unfinished(output) / name)
            if self.args.should_save and self._inputs is not None:
                keep_inputs(self._inputs, unfinished(output) / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(output, name)
        self._saved_step = step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep_latest(output, self.args.save_total_limit, newest=name, best=best)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(output / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: `_save_checkpoint` uploads the folder once it has its name."""

    def save_beside(self, folder: Path) -> None:
        """Write more into a checkpoint, on every rank: here nothing."""

    def check_weights(self, checkpoint: Path) -> None:
        """Make sure that the model has the weights of a checkpoint that was loaded.

        Raises:
            CheckpointError: it has not.
        """
        if self._is_whole:
            load_whole(self.model, checkpoint)
        check_sums(self.model, checkpoint)

    @property
    def _is_whole(self) -> bool:
        """Return whether each rank has the whole model, and its class reads the checkpoints."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(self.model, PreTrainedModel) and not sharded

    @property
    def _output(self) -> Path:
        return Path(self.args.output_dir or "")

    def _remove_unfinished(self) -> None:
        if self.args.should_save:
            remove_unfinished(self._output)

    def _say_it_stops(self) -> None:
        if self.is_world_process_zero():
            logger.warning(
                "told to end: after step %d, or before it if the teacher does not answer, a "
                "checkpoint is saved; the same signal again ends at once, without one",
                self.state.global_step + 1,
            )

    def _save_what_was_learned(self) -> None:
        """Save a checkpoint of the end of the last step, without the step that was under way.

        A run that goes on from it ends as one that was never interrupted.
        """
        step = self.state.global_step
        if self._random_state is None or self._saved_step == step:  # nothing new
            return
        self._random_state.restore()
        self._save_checkpoint(self.model, None)
        self.accelerator.wait_for_everyone()
        logger.warning(
            "Saved %s/%s-%d: the same command with --resume_from_checkpoint auto goes on",
            self._output, PREFIX_CHECKPOINT_DIR, step,
        )  # fmt: skip


class _LoadedWeights(TrainerCallback):
    """A callback that checks what the Trainer loads: where it resumes, and the best model."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begun = state.global_step
        if self.trainer._resumed_from is not None:
            self.trainer.check_weights(self.trainer._resumed_from)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and not self.trainer.stopped:
            self.trainer.check_weights(Path(best))


class _AfterStep(TrainerCallback):
    """A callback that keeps the random state and ends all ranks after the same step.

    The run is saved and stopped after the step in which any rank was told to end. At its end it
    deletes what the Trainer would delete next, since the Trainer's own deletion can be cut short.
    """

    def __init__(self, trainer: DurableTrainer, told: threading.Event) -> None:
        self.trainer = trainer
        self.told = told

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._random_state = RandomState.now()
        if self.trainer.ranks.any(self.told.is_set()):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            self.trainer.stopped = state.global_step < state.max_steps

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        nothing_learned = self.trainer._random_state is None  # resumed at the run's end
        if self.trainer.stopped or nothing_learned:  # in the middle of the epoch
            control.should_save = control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        best = state.best_model_checkpoint
        ended = grouped_name("train_loss") in grouped(logs or {})  # the mean over the whole run
        if ended and args.should_save and best is not None and args.save_total_limit == 1:
            keep_latest(self.trainer._output, 1, newest=Path(best).name, best=best)
