"""The README.md of a trained model, for people and for the Hugging Face Hub.

It goes wherever the weights go, so it names no address, no key and no folder of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from shared import __version__
from shared.printable import code_span
from shared.protocol import TeacherIdentity
from student_trainer.config.arguments import DivergenceFlags, RunFlags
from student_trainer.config.flags import marked
from student_trainer.config.trainer_flags import PRIVATE

_GKD = "on-policy GKD"
_NOT_ON_POLICY = "so not from the distribution that the loss compares: not strictly on-policy"
_NUMBERS = {
    "train/loss": "training loss",
    "train/divergence": "divergence in training, nats a token",
    "eval/loss": "held-out loss, nats a token",
    "eval/divergence": "held-out divergence, nats a token",
    "eval/pass@1": "held-out pass@1",
    "eval/exact_match": "held-out exact match",
    "train/top1_agreement": "same most probable token",
    "train/runtime": "seconds",
}


@dataclass(frozen=True)
class TrainingRows:
    """The rows that a run draws from.

    Attributes:
        count: of the dataset, or of what is read of a stream.
        each_step: rows of an optimizer step, of all processes together.
        steps_an_epoch: None for a stream, which has no epochs.
    """

    count: int
    each_step: int
    steps_an_epoch: int | None

    def drawn(self, steps: int) -> int:
        """Return the rows that so many steps learn, each as often as it is learned."""
        if self.steps_an_epoch is None:
            return min(steps * self.each_step, self.count)
        epochs, rest = divmod(steps, self.steps_an_epoch)
        whole = min(self.steps_an_epoch * self.each_step, self.count)
        return epochs * whole + min(rest * self.each_step, self.count)


def model_card(
    name: str,
    history: Sequence[Mapping[str, Any]],
    *,
    arguments: Sequence[Any],
    teachers: Mapping[str, TeacherIdentity],
    rows: TrainingRows,
    dtype: str,
) -> str:
    """Return the card as text.

    Args:
        name: of the model.
        history: the entries of the log.
        arguments: dataclasses of flags as they were given, as `config.parse` returns them for `sft`
            or `distill`; the Trainer's own are the last.
        teachers: their identities by name; none for SFT.
        rows: those that were drawn from.
        dtype: of the trained weights, or "checkpoint" for that of the base model.
    """
    flags = {f.name: getattr(part, f.name) for part in arguments for f in fields(part)}
    base, datasets = str(flags["model_name_or_path"]), list(flags["dataset_name"])
    adapters = bool(flags["use_peft"])
    metadata: dict[str, Any] = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-gkd", "knowledge-distillation" if teachers else "sft"],
    }
    if not _is_local(base):
        metadata["base_model"] = base
    published = [name for name in datasets if not _is_local(name)]
    if published:
        metadata["datasets"] = published
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# {name}\n",
        _story(flags, method_of(arguments[-1]), teachers, _learned(history, rows), dtype)
        + f"{_own_completions(arguments[-1])}\n",
        f"## Use\n\n{_use(base, adapters)}",
        f"## Numbers\n\n{_numbers(history)}",
        f"## Flags\n\n{_flags(arguments)}",
        f"sparse-gkd {__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}.\n",
    ]
    return "\n".join(sections)


def method_of(args: RunFlags) -> str:
    """Return the method's name in the literature."""
    if not isinstance(args, DivergenceFlags):
        return "supervised fine-tuning (SFT)"
    off_policy = "SeqKD" if args.seq_kd else "supervised KD"
    if args.lmbda == 0:
        return off_policy
    return _GKD if args.lmbda == 1 else f"a mixture of {_GKD} and {off_policy}"


def sampling_of(args: RunFlags) -> str:
    """Return what the student's completions were sampled with, or "" if by its probabilities."""
    if not isinstance(args, DivergenceFlags) or args.lmbda == 0:
        return ""
    parts = {
        # The loss may compare the two at the temperature that is sampled at.
        "temperature": (args.rollout_temperature, (1.0, args.temperature)),
        "top-p": (args.rollout_top_p, (1.0,)),
        "top-k": (args.rollout_top_k, (0,)),
        "min-p": (args.rollout_min_p, (0.0,)),
    }
    changed = [f"{name} {value:g}" for name, (value, off) in parts.items() if value not in off]
    if not changed:
        return ""
    return f"sampled with {', '.join(changed)}, {_NOT_ON_POLICY}"


def _learned(history: Sequence[Mapping[str, Any]], rows: TrainingRows) -> str:
    """Return how many rows were learned, of how many, with "{}" for the dataset's name."""
    steps = int(history[-1]["step"]) if history else 0
    text = f"{rows.drawn(steps):,} rows "
    how = f"{steps:,} optimizer steps of {rows.each_step:,}"
    if rows.steps_an_epoch is None:
        return f"{text}of {{}}, read as a stream ({how})"
    epochs = steps / rows.steps_an_epoch
    return f"{text}drawn from the {rows.count:,} of {{}} ({how}, {epochs:.3g} epochs)"


def _story(
    flags: Mapping[str, Any],
    method: str,
    teachers: Mapping[str, TeacherIdentity],
    learned: str,
    dtype: str,
) -> str:
    method = method.replace(_GKD, f"{_GKD} ([arXiv 2306.13649](https://arxiv.org/abs/2306.13649))")
    base = _public(flags["model_name_or_path"])
    named = " and ".join(f"`{_public(name)}`" for name in flags["dataset_name"])
    trained = "All weights of"
    if flags["use_peft"]:
        alpha = flags["lora_alpha"] or 2 * flags["lora_r"]
        trained = f"LoRA adapters (rank {flags['lora_r']}, alpha {alpha}) for"
    within = "" if dtype == "checkpoint" else f" in {dtype}"
    text = f"{trained} `{base}`, trained{within} by {method} on {learned.format(named)}."
    if not teachers:
        return text
    beta = flags["beta"]
    divergence = {0.0: "forward KL", 1.0: "reverse KL"}.get(
        beta, f"generalized JSD with beta {beta:g}"
    )
    k = flags["top_k_logprobs"]
    seen = f"its {k} most probable tokens and an exact tail"
    if flags["teacher_protocol"] == "vllm":
        seen = f"its {k} most probable tokens and the rest to one as its tail"
    if flags["tail"] == "renormalize":
        seen = f"its {k} most probable tokens, without a tail"
    if flags["teacher_support"] == "sampled":
        seen = f"{k} draws from its distribution"
    return (
        f"{text}\n\n{_taught_by(teachers)}, of which the student saw "
        f"{seen} at each position. The loss is the {divergence} at temperature "
        f"{flags['temperature']:g}."
    )


def _own_completions(args: RunFlags) -> str:
    """Return sentences on how the student's completions were sampled, where that was changed."""
    sampling, text = sampling_of(args), ""
    if sampling:
        text += f" The student's completions were {sampling}."
    if isinstance(args, DivergenceFlags) and args.num_generations > 1:
        text += f" It wrote {args.num_generations} completions of each prompt in a step."
    return text


def _taught_by(teachers: Mapping[str, TeacherIdentity]) -> str:
    described = [
        (f"{code_span(name)}: " if name else "")
        + f"{code_span(_public(teacher.model))} ({code_span(teacher.dtype)}, "
        f"{code_span(f'{teacher.backend} {teacher.version}')}; fingerprint "
        f"{code_span(teacher.fingerprint[:16])})"
        for name, teacher in teachers.items()
    ]
    if len(described) == 1:
        return f"The teacher was {described[0]}"
    return f"The teachers, each of its own rows, were {'; '.join(described)}"


def _use(base: str, adapters: bool) -> str:
    if not adapters:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n```\n'
        )
    return (
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n```\n\n'
        f"The adapters are for `{_public(base)}`.\n"
    )


def _numbers(history: Sequence[Mapping[str, Any]]) -> str:
    found: dict[str, Any] = {}
    for entry in history:
        found |= {name: entry[name] for name in _NUMBERS if name in entry}
    steps = {"optimizer steps": history[-1]["step"]} if history else {}
    return _table(steps | {_NUMBERS[n]: f"{found[n]:.4g}" for n in _NUMBERS if n in found})


def _flags(arguments: Sequence[Any]) -> str:
    changed = _changed_flags(arguments)
    if not changed:
        return "All are the defaults of this version.\n"
    return f"Given for this run; all others are the defaults of this version:\n\n{_table(changed)}"


def _changed_flags(arguments: Sequence[Any]) -> dict[str, Any]:
    """Return the flags that are not at their default and not private."""
    shown: dict[str, Any] = {}
    private = {*PRIVATE, *marked([type(part) for part in arguments], "private", True)}
    for part in arguments:
        for flag in fields(part):
            value = getattr(part, flag.name)
            value = value.value if isinstance(value, Enum) else value
            usual = value in (None, "", []) or value == _default(flag)
            plain = isinstance(value, str | int | float | list)
            name, needed = flag.metadata.get("needs") or ("", None)
            works = not name or getattr(part, name) == needed
            if flag.init and flag.name not in private and plain and works and not usual:
                shown[f"`--{flag.name}`"] = f"`{_public(value)}`"
    return shown


def _default(flag: Field[Any]) -> Any:
    if flag.default_factory is not MISSING:
        return flag.default_factory()
    return flag.default.value if isinstance(flag.default, Enum) else flag.default


def _is_local(name: str) -> bool:
    """Return whether a name is a path here and not a name on the Hub."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return True
    with suppress(OSError):  # the name is too long for a file
        return Path(name).exists()
    return False


def _public(value: Any) -> str:
    """Return a value as text; for a path on this machine only its last part."""
    text = str(value)
    return Path(text).name if isinstance(value, str) and _is_local(text) else text


def _table(rows: Mapping[str, Any]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| | |\n| --- | --- |\n{lines}"
