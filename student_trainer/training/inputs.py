"""The record of what a run was trained with, kept in its folder and in each checkpoint.

A resumed run must have the same data, template and divergence, or its result would be of neither
run: a change of these is refused. A change of what may change, such as the number of steps, is
logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from shared import __version__
from shared.errors import ConfigurationError
from shared.identity import tokenizer_identity
from shared.protocol import TeacherIdentity
from student_trainer.config.flags import Resume, marked
from student_trainer.config.trainer_flags import SAME, TOLD
from student_trainer.data.sample import Example
from student_trainer.data.template import ChatTemplate
from student_trainer.reporting.runs import INPUTS_FILE

logger = logging.getLogger(__name__)

FILE = INPUTS_FILE
_UNNAMED = "rows that name no teacher learn from"


def _resumed_as(kinds: Sequence[type[Any]], mark: Resume) -> list[str]:
    """Return the flags that are marked so, see `config.flags.Resume`, sorted."""
    theirs = {"same": SAME, "told": TOLD, "free": ()}[mark]
    return sorted({*marked(kinds, "resume", mark), *theirs})


def training_inputs(
    flags: Sequence[Any],
    examples: Sequence[Example] | None,
    template: ChatTemplate,
    *,
    rows_a_step: int,
    teachers: Mapping[str, TeacherIdentity],
    teacher_template: str | None = None,
) -> dict[str, Any]:
    """Return what a run is trained with, as JSON.

    Args:
        flags: the dataclasses of all flags.
        examples: of the training rows; None for a stream, whose rows are not known beforehand.
        rows_a_step: that all processes learn together in an optimizer step.
        teachers: those that are learned from, by name, the first one first; none for SFT. Their
            weights may change where the flags accept that.
        teacher_template: the source of --teacher_prompt_template, whose file may have changed.
    """
    values = {name: value for kind in flags for name, value in vars(kind).items()}
    kinds = [type(kind) for kind in flags]
    tokenizer = tokenizer_identity(template.encoder.tokenizer)
    same = {
        "the training rows as tokens": None if examples is None else _fingerprint(examples),
        "the tokenizer": tokenizer.fingerprint,
        "the chat template": _hash(template.source),
        "the text of --teacher_prompt_template": _hash(teacher_template),
        "the date in prompts": str(template.options.today) if template.prints_date else None,
        "rows a step": rows_a_step,
        **{
            f"--{name}": _plain(values[name])
            for name in _resumed_as(kinds, "same")
            if name in values
        },
    }
    first = next(iter(teachers), "")
    if first and (examples is None or any(example.teacher is None for example in examples)):
        same[_UNNAMED] = first
    told = {
        f"--{name}": _plain(values[name]) for name in _resumed_as(kinds, "told") if name in values
    }
    accepted = values.get("accept_teacher_change", False)
    weights = told if accepted else same
    for name, teacher in teachers.items():
        whose = f"the teacher {name}" if name else "the teacher"
        weights[f"{whose}'s weights"] = teacher.fingerprint
        if _UNNAMED in same and name == first:
            weights["the teacher's weights"] = teacher.fingerprint  # of whatever name it had
        for field in ("model", "dtype", "backend", "version"):
            told[f"{whose}'s {field}"] = getattr(teacher, field)
    return {"version": __version__, "same": same, "told": told}


def _hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.prompt_ids)}\0".encode())
        digest.update(example.prompt_ids.tobytes())
        if example.sample is not None:
            digest.update(example.sample.token_ids.tobytes())
            digest.update(example.sample.completion_mask.tobytes())
        if example.teacher is not None:
            digest.update(f"\0{example.teacher}\0".encode())
        if example.teacher_prompt_ids is not None:
            digest.update(example.teacher_prompt_ids.tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)


def keep_inputs(inputs: Mapping[str, Any], folder: Path) -> None:
    """Write `training_inputs` into a folder."""
    (folder / FILE).write_text(json.dumps(inputs, indent=2) + "\n")


def check_resumed(checkpoint: Path, inputs: Mapping[str, Any]) -> None:
    """Check that a run may go on from a checkpoint, and log the changes that are allowed.

    Raises:
        ConfigurationError: names all inputs that must not change and did, with both values.
    """
    file = checkpoint / FILE
    try:
        then = json.loads(file.read_text())
        known = {**then["same"], **then["told"]}
        changes = {part: _changes(known, inputs[part]) for part in ("same", "told")}
    except FileNotFoundError:
        logger.warning("%s does not say what it was trained with; it is not compared", checkpoint)
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"--resume_from_checkpoint: {file} cannot be read: {error}; give another checkpoint"
        ) from error
    if changes["same"]:
        more = f" (changed too, but no matter: {'; '.join(changes['told'])})"
        other_teacher = all(change.startswith("the teacher") for change in changes["same"])
        accept = ", accept the teacher with --accept_teacher_change" if other_teacher else ""
        raise ConfigurationError(
            f"--resume_from_checkpoint {checkpoint}: it was trained with something else: "
            f"{'; '.join(changes['same'])}{more if changes['told'] else ''}. Go on with what it "
            f"was trained with{accept}, or train anew in another --output_dir"
        )
    if changes["told"]:
        logger.warning("Going on from %s with changes: %s", checkpoint, "; ".join(changes["told"]))


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs; what only one of the versions knows is not compared."""
    return [
        f"{name} {_short(then[name])} -> {_short(now[name])}"
        for name in now
        if name in then and then[name] != now[name]
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
