"""The results that an output folder holds already, and the refusal to overwrite them untold."""

from __future__ import annotations

import re
from pathlib import Path

from shared.errors import ConfigurationError
from shared.model_names import existing
from student_trainer.config.arguments import EvaluateArguments, ModelArguments, TrainingFlags

RESULTS = "results.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(
    r"(model|adapter_model|pytorch_model)\b.*\.(safetensors|bin)(\.index\.json)?", re.DOTALL
)
_CONFIGURATIONS = ("config.json", "adapter_config.json")


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, the earliest first."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in _content(folder)}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path])


def model_files_in(folder: Path) -> list[Path]:
    """Return the weights of a folder with their configuration; none where there are no weights."""
    weights = [path for path in _content(folder) if _WEIGHTS.fullmatch(path.name)]
    configurations = [folder / name for name in _CONFIGURATIONS]
    return weights + [path for path in configurations if weights and path.exists()]


def check_nothing_is_overwritten(flags: TrainingFlags, model: ModelArguments) -> None:
    """Refuse an ``--output_dir`` of an earlier run, unless this one goes on or may overwrite it.

    Raises:
        ConfigurationError: names the folder, what is in it, and the remedies.
    """
    folder = Path(flags.output_dir or "")
    resumed = str(flags.resume_from_checkpoint or "false")
    anew = resumed.lower() == "false"
    if flags.overwrite_output_dir:
        if resumed.lower() not in ("false", "auto"):
            raise ConfigurationError(
                f"--overwrite_output_dir begins anew, and --resume_from_checkpoint {resumed} goes "
                "on: drop one of them"
            )
        _check_is_not_the_model(folder, model)
        return
    checkpoints, has_model = checkpoints_in(folder), bool(model_files_in(folder))
    if not (checkpoints or has_model):
        return
    if checkpoints and not anew and _is_of(resumed, folder):
        return
    held = ["a trained model"] if has_model else []
    if checkpoints:
        held.append(f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''}")
    last = f", the last of step {checkpoints[-1].name.split('-')[1]}" if checkpoints else ""
    without = "" if anew or checkpoints else ", and no checkpoint to go on from"
    go_on = ", or go on with --resume_from_checkpoint true" if checkpoints else ""
    raise ConfigurationError(
        f"--output_dir {folder} holds {' and '.join(held)} of an earlier run{last}{without}: give "
        f"another folder{go_on}, or replace what is there with --overwrite_output_dir true"
    )


def check_no_scores_are_overwritten(args: EvaluateArguments) -> None:
    """Refuse an ``--output_dir`` with the scores of an earlier evaluation.

    Raises:
        ConfigurationError: names the folder and the remedies.
    """
    if not args.overwrite_output_dir and existing(Path(args.output_dir) / RESULTS):
        raise ConfigurationError(
            f"--output_dir {args.output_dir} holds {RESULTS} of an earlier evaluation: give "
            "another folder, or replace what is there with --overwrite_output_dir true"
        )


def _check_is_not_the_model(folder: Path, model: ModelArguments) -> None:
    """Refuse to delete the weights that the run begins from."""
    start = None if model.loaded is not None else existing(model.model_name_or_path)
    if start is not None and folder.resolve() in (start.resolve(), *start.resolve().parents):
        raise ConfigurationError(
            f"--overwrite_output_dir would delete --model_name_or_path {start}, which is in "
            f"--output_dir {folder}: give another --output_dir"
        )


def _is_of(resumed: str, folder: Path) -> bool:
    """Return whether what ``--resume_from_checkpoint`` names is a checkpoint of the folder."""
    if resumed.lower() in ("true", "auto"):
        return True
    checkpoint = existing(resumed)
    return checkpoint is None or checkpoint.resolve().parent == folder.resolve()


def _content(folder: Path) -> list[Path]:
    found = existing(folder)
    return sorted(found.iterdir()) if found is not None and found.is_dir() else []
