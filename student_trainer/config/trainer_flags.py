"""The flags of transformers' `TrainingArguments`, known without importing transformers.

`trainer_flags.json` holds them as the pinned version has them. With another version installed they
are read from that once, which takes the seconds that its import takes, and kept in the user's cache
folder. After an upgrade of the pinned version:

    python -m student_trainer.config.trainer_flags
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, field, make_dataclass, replace
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.compat import parser_actions
from student_trainer.config.flags import Flag, Kind

FILE = Path(__file__).with_name("trainer_flags.json")
# Groups of the flags that are used most; `--help_all` lists the others after them.
GROUPS = {
    "learning_rate": "training", "lr_scheduler_type": "training", "warmup_steps": "training",
    "num_train_epochs": "training", "max_steps": "training",
    "per_device_train_batch_size": "training", "gradient_accumulation_steps": "training",
    "seed": "training", "save_steps": "training", "save_total_limit": "training",
    "resume_from_checkpoint": "training", "bf16": "memory and speed",
    "gradient_checkpointing": "memory and speed", "eval_strategy": "evaluation and logs",
    "eval_steps": "evaluation and logs", "logging_steps": "evaluation and logs",
    "report_to": "evaluation and logs",
}  # fmt: skip
# Those that `--help` lists, in words that say what they do here.
COMMON = {
    "learning_rate": "The highest learning rate of the schedule.",
    "num_train_epochs": "Times that each row is learned.",
    "max_steps": "Optimizer steps in all, or -1 for those of --num_train_epochs.",
    "per_device_train_batch_size": "Rows in a micro-batch of each process.",
    "gradient_accumulation_steps": "Micro-batches before an optimizer step.",
    "resume_from_checkpoint": "A checkpoint's folder, true for the last one in --output_dir, or "
    "auto for the last one if there is any.",
    "bf16": "Compute in bfloat16.",
    "gradient_checkpointing": "Recompute activations in the backward pass instead of keeping them.",
    "eval_strategy": "When held-out rows are measured.",
}  # fmt: skip
# Flags whose change is logged or refused when a run is resumed, see `config.flags.Resume`.
TOLD = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "max_steps", "num_train_epochs", "bf16",
    "fp16",
)  # fmt: skip
SAME = ("seed", "dataloader_drop_last")
# A model card leaves these out: addresses, keys, and settings of this machine or of logs alone.
PRIVATE = (
    "logging_dir", "hub_token", "hub_model_id", "hub_strategy", "hub_private_repo",
    "hub_always_push", "hub_revision", "push_to_hub", "resume_from_checkpoint", "run_name",
    "report_to", "dataloader_pin_memory", "project", "trackio_space_id", "use_cpu", "local_rank",
    "ddp_timeout", "ddp_backend", "deepspeed", "fsdp_config", "logging_steps", "logging_strategy",
    "save_steps", "save_strategy", "save_total_limit", "log_level", "log_level_replica",
)  # fmt: skip


@cache
def trainer_flags() -> dict[str, Flag]:
    """Return the flags of the installed transformers, by name; of the pinned one where none is."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:  # without the extra `trainer`, which the command asks for
        installed = json.loads(FILE.read_text())["transformers"]
    kept = _user_cache() / f"trainer_flags-{installed}.json"
    found = _load(FILE, installed) or _load(kept, installed)
    if found is None:
        found = _read()
        with suppress(OSError):  # without a cache folder they are read again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            save(kept, found)
    return _with_ours(found)


def read_from_transformers() -> dict[str, Flag]:
    """Read the flags from `TrainingArguments` itself."""
    return _with_ours(_read())


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-gkd"


def _load(file: Path, wanted: str) -> dict[str, Flag] | None:
    """Return the flags in a file, None if it is not there, damaged, or of another version."""
    try:
        saved = json.loads(file.read_text())
        if saved["transformers"] != wanted:
            return None
        tuples = ("choices", "aliases")
        return {
            entry["name"]: Flag(**(entry | {name: tuple(entry[name]) for name in tuples}))
            for entry in saved["flags"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _with_ours(flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """Return the flags with their groups, and our words for the common ones."""
    return {
        name: replace(
            flag,
            help=COMMON.get(name, flag.help),
            group=GROUPS.get(name),
            common=name in COMMON,
        )
        for name, flag in flags.items()
    }


def save(file: Path, found: Mapping[str, Flag]) -> None:
    """Write the flags of the installed transformers into a file."""
    flags = [asdict(flag) for flag in found.values()]
    for entry in flags:
        for name in ("group", "common", "needs", "extends"):
            del entry[name]
    saved = {"transformers": version("transformers"), "flags": flags}
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(saved, indent=1) + "\n")
    beside.replace(file)  # whole at each moment, as several commands may start at once


def _read() -> dict[str, Flag]:
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments, add_help=False)
    flags: dict[str, Flag] = {}
    for action in parser_actions(parser):
        if action.dest not in flags:  # a second action is the --no_ twin of a switch
            flags[action.dest] = _flag_of(action)
    return flags


def _flag_of(action: argparse.Action) -> Flag:
    switch = action.nargs == "?"
    types: dict[str, Kind] = {"string_to_bool": "bool", "int": "int", "float": "float"}
    own = {f"--{action.dest}", f"--{action.dest.replace('_', '-')}"}
    kind = types.get(getattr(action.type, "__name__", ""), "str")
    if kind == "bool" and isinstance(action.default, str):
        kind = "str"  # a switch that also takes text
    return Flag(
        name=action.dest,
        kind=kind,
        default=_plain(action.default),
        help=" ".join((action.help or "").split()),
        choices=tuple(str(_plain(choice)) for choice in action.choices or ()),
        # The field holds several values, though transformers' parser takes one.
        several=action.nargs == "+" or action.dest == "report_to",
        switch=switch and kind == "str",
        aliases=tuple(name for name in action.option_strings if name not in own),
    )


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


if TYPE_CHECKING:

    class TrainerFlags:
        """The fields of `TrainingArguments` as plain values, unchecked and without its setup."""

        def __getattr__(self, name: str) -> Any: ...

else:

    def _field(flag: Flag) -> Any:
        default = flag.default
        if isinstance(default, list | dict):
            return field(default_factory=lambda: default, metadata={"flag": flag})
        return field(default=default, metadata={"flag": flag})

    TrainerFlags = make_dataclass(
        "TrainerFlags", [(name, Any, _field(flag)) for name, flag in trainer_flags().items()]
    )


if __name__ == "__main__":
    save(FILE, _read())
