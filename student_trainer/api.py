"""The function `distill`: the command of that name, for models and rows in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.errors import ConfigurationError
from student_trainer.commands.run_training import run_distill
from student_trainer.commands.train import check_before_loading
from student_trainer.config.arguments import LoadedModel, Recipe
from student_trainer.config.keywords import keywords_in_errors
from student_trainer.config.parse import parse_keywords
from student_trainer.model.forward import remove_sparse_loss
from student_trainer.model.load import tokenizer_from

Dataset: TypeAlias = str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]]

# Flags that are parameters here, because those take objects as well as names.
_PARAMETERS = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "eval_dataset_name": "eval_dataset",
}
# Flags that only affect how a model or a tokenizer is loaded.
_LOADING = (
    "model_revision", "torch_dtype", "dtype", "trust_remote_code", "attn_implementation",
    "eos_token", "chat_template", "load_in_4bit",
)  # fmt: skip
_IN_MEMORY = "./rows in memory"  # looks like a path, so a model card takes it for no dataset


@dataclass(frozen=True)
class DistillationResult:
    """The result of a run.

    Attributes:
        output_dir: folder with the trained model, its tokenizer, logs and checkpoints.
        metrics: the last value of everything that was logged: ``train/divergence`` (nats a
            token), ``eval/divergence``, ``train/runtime`` (seconds), …
        history: all that was logged, in the order of the steps.
        model: the trained student, in memory.
        stopped: SIGTERM or Ctrl-C ended the run before its last step: the model is half-trained,
            and ``output_dir`` has a checkpoint to go on from and no model.
    """

    output_dir: Path
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    model: Any
    stopped: bool

    def __repr__(self) -> str:
        steps = self.history[-1].get("step", 0) if self.history else 0
        value = self.metrics.get("train/divergence")
        what = "" if value is None else f", divergence {value:.3g}"
        return (
            f"DistillationResult({str(self.output_dir)!r}, {steps} steps{what}"
            f"{', stopped' if self.stopped else ''})"
        )


def distill(
    model: str | Path | PreTrainedModel,
    teacher_url: str | Sequence[str],
    dataset: Dataset,
    *,
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    eval_dataset: Dataset | None = None,
    **flags: Any,
) -> DistillationResult:
    """Train a student on a served teacher's token distributions.

    It is the same as `student-trainer distill`, with its checks, defaults and files. Several
    processes call it in a script that `torchrun` or `accelerate launch` starts. It leaves their
    process group as it is, and waits until the threads of PyTorch's Gloo are idle, so that such a
    script may end: one that works while the interpreter ends would abort it (PyTorch issue 190489).
    A script with collective operations of its own afterwards has that fault of PyTorch itself.

    Args:
        model: a folder or Hub id; or a model, which is trained in place, with its ``tokenizer``:
            a tokenizer, or the folder or Hub id of one.
        teacher_url: address of a teacher server, such as ``http://localhost:8000``, or several of
            replicas.
        dataset: a file of rows, a folder of them, a glob or a Hub id, or a list of such names; or
            rows: a list of dicts, or a ``datasets.Dataset``. A row has ``messages``, ``prompt``
            with or without ``completion``, ``conversations``, or ``instruction``.
        output_dir: folder for checkpoints, the trained model and logs. One that holds a model or
            checkpoints already is refused, unless ``overwrite_output_dir=True`` or
            ``resume_from_checkpoint="true"`` says what becomes of them.
        eval_dataset: held-out rows, likewise, for ``eval_strategy``.
        flags: every other flag of the command under its own name: ``lmbda=0.5``,
            ``max_steps=100``, ``use_peft=True``, ``lora_target_modules=["q_proj", "v_proj"]``.

    Raises:
        ConfigurationError: an unknown keyword (with the nearest known one), or a value or a
            combination that cannot work, before anything loads.
        DatasetError: rows that cannot be learned from.
        TeacherError: the teacher is unreachable, refuses the key, has another vocabulary, or
            answered what cannot be right.
        NonFiniteError: a loss or a gradient was NaN or infinite.
    """
    given = {
        **flags, "model_name_or_path": model, "dataset_name": dataset, "output_dir": output_dir,
        "eval_dataset_name": eval_dataset,
    }  # fmt: skip
    with keywords_in_errors(_PARAMETERS, given):
        return _distill(model, teacher_url, dataset, output_dir, tokenizer, eval_dataset, flags)


def _distill(
    model: str | Path | PreTrainedModel,
    teacher_url: str | Sequence[str],
    dataset: Dataset,
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    eval_dataset: Dataset | None,
    flags: Mapping[str, Any],
) -> DistillationResult:
    for flag, parameter in _PARAMETERS.items():
        if flag in flags:
            raise ConfigurationError(f"distill(): give {flag} as {parameter}")
    named = isinstance(model, str | Path)
    if named != (tokenizer is None):
        raise ConfigurationError(
            "distill(): a model in memory comes with its tokenizer, a folder or Hub id without"
        )
    for flag in _LOADING:
        if flag in flags and not named:
            raise ConfigurationError(
                f"distill(): {flag} has no effect on a model that is loaded already; drop it"
            )
    name = model
    if not isinstance(model, str | Path):
        name = getattr(model, "name_or_path", "") or type(model).__name__
    *parts, teacher, args = parse_keywords(
        "distill",
        {
            "model_name_or_path": name,
            "teacher_url": [teacher_url] if isinstance(teacher_url, str) else list(teacher_url),
            "dataset_name": _names(dataset) or _IN_MEMORY,
            "eval_dataset_name": None if eval_dataset is None else _one_name(eval_dataset),
            "output_dir": output_dir,
            **flags,
        },
    )
    if args.dry_run:
        raise ConfigurationError("distill(): dry_run is for `student-trainer distill`; drop it")
    recipe = Recipe(*parts)
    if tokenizer is not None:
        recipe.model.loaded = LoadedModel(model, tokenizer_from(tokenizer))
    recipe.dataset.rows = _rows(dataset)
    recipe.data.eval_rows = None if eval_dataset is None else _rows(eval_dataset)
    check_before_loading(recipe, teacher, args)
    trainer = run_distill(recipe, teacher, args)
    assert trainer is not None  # None only after a dry run
    history = trainer.state.log_history
    metrics = {name: value for entry in history for name, value in entry.items()}
    remove_sparse_loss(trainer.model)
    return DistillationResult(Path(output_dir), metrics, history, trainer.model, trainer.stopped)


def _names(dataset: Any) -> list[str]:
    """Return the names that a dataset is given by; none for rows in memory."""
    if isinstance(dataset, str | Path):
        return [str(dataset)]
    named = isinstance(dataset, list | tuple) and bool(dataset)
    if named and all(isinstance(name, str | Path) for name in dataset):
        return [str(name) for name in dataset]
    return []


def _one_name(dataset: Dataset) -> str:
    names = _names(dataset)
    if len(names) > 1:
        raise ConfigurationError(f"distill(): give one eval_dataset, not {len(names)}")
    return names[0] if names else _IN_MEMORY


def _rows(dataset: Any) -> Iterable[Mapping[str, Any]] | None:
    return None if _names(dataset) else dataset
