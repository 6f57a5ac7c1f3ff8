"""`--help`: the flags that matter, in groups; `--help_all` lists those of transformers too."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

Groups = Mapping[str, tuple[str, ...]]

EXIT_CODES = """\
exit codes: 0 done (also when SIGTERM ends training: a checkpoint is saved), 1 the run failed
(teacher lost, disk full, not finite), 2 wrong flags, key or data, 130 Ctrl-C, 143 SIGTERM."""

_COMMAND = ("config", "help", "help_all")
_TRAINING: Groups = {
    "model": (
        "model_name_or_path", "model_revision", "torch_dtype", "trust_remote_code", "eos_token",
        "attn_implementation",
    ),
    "data": (
        "dataset_name", "dataset_config", "dataset_split", "dataset_weights", "streaming",
        "shuffle_buffer_size", "dataset_num_proc", "prompt_column", "completion_column",
        "max_length", "skip_long_rows", "assistant_turns", "assistant_only_loss",
        "split_special_tokens",
    ),
    "chat template": ("chat_template", "chat_template_kwargs", "chat_template_date"),
    "teacher": (
        "teacher_url", "teacher_protocol", "teacher_api_key_file", "top_k_logprobs",
        "teacher_logprob_dtype", "teacher_timeout", "teacher_unreachable",
        "teacher_repeat_tolerance", "accept_teacher_change", "teacher_cache",
        "teacher_cache_max_gb",
    ),
    "method and divergence": (
        "lmbda", "seq_kd", "beta", "temperature", "sft_weight", "request_student_top_m",
        "teacher_support", "tail",
    ),
    "rollouts and generation": (
        "max_new_tokens", "generation_batch_size", "rollout_temperature", "seq_kd_temperature",
        "rollout_engine", "vllm_gpu_memory_utilization", "rollout_staleness",
    ),
    "training": (
        "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs",
        "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
        "nonfinite", "save_steps", "save_total_limit", "resume_from_checkpoint",
    ),
    "memory and speed": (
        "bf16", "gradient_checkpointing", "max_tokens_per_batch", "packing", "loss_kernel",
        "teacher_prefetch_steps",
    ),
    "LoRA": (
        "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit",
    ),
    "evaluation and logs": (
        "eval_dataset_name", "eval_dataset_split", "eval_strategy", "eval_steps", "logging_steps",
        "report_to", "trace_steps", "unsafe_sandbox",
    ),
    "the command itself": ("dry_run", *_COMMAND),
}  # fmt: skip
_EVALUATE: Groups = {
    "model": _TRAINING["model"],
    "chat template": _TRAINING["chat template"],
    "data": ("suite", "raw_prompt", "dataset_name", "dataset_config", "dataset_split", "limit"),
    "generation": (
        "n", "temperature", "seed", "max_new_tokens", "generation_batch_size", "rollout_engine",
        "vllm_gpu_memory_utilization",
    ),
    "checks and results": ("check_timeout", "unsafe_sandbox", "output_dir"),
    "teacher, for the divergence on references": ("beta", *_TRAINING["teacher"]),
    "the command itself": _COMMAND,
}  # fmt: skip
# Of each command whose flags are dataclasses.
GROUPS: dict[str, Groups] = {
    "sft": _TRAINING,
    "distill": _TRAINING,
    "precompute": _TRAINING,
    "evaluate": _EVALUATE,
    "merge": {
        "model": ("model_name_or_path", "output_dir", "torch_dtype", "trust_remote_code"),
        "the command itself": _COMMAND,
    },
}

_INDENT = 30


def add_help(parser: argparse.ArgumentParser) -> None:
    """Give a parser that was made without help ``--help`` and, if it has groups, ``--help_all``."""
    groups = GROUPS.get(parser.prog.split()[-1] if parser.prog else "")
    if groups is None:
        text, what = parser.format_help, "Show this, and stop."
    else:
        text, what = lambda: short_help(parser, groups), "Show the flags that matter, and stop."
    parser.add_argument("-h", "--help", action=_Show, text=text, help=what)
    if groups is not None:
        more = "Show all flags, of transformers' Trainer too, with all that is to say of each."
        parser.add_argument("--help_all", action=_Show, text=parser.format_help, help=more)
    parser.epilog = EXIT_CODES


class _Show(argparse.Action):
    """Writes a text to standard output, and ends."""

    def __init__(
        self, option_strings: list[str], dest: str, *, text: Callable[[], str], help: str
    ) -> None:
        super().__init__(option_strings, dest=dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(self._text())
        parser.exit()


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The optional arguments by name; of those that come with a ``--no_`` twin the plain one."""
    flags: dict[str, argparse.Action] = {}
    for action in parser._actions:  # argparse has no public name for them
        if action.option_strings:
            flags.setdefault(action.dest, action)
    return flags


def short_help(parser: argparse.ArgumentParser, groups: Groups) -> str:
    """The flags of the groups, each with the beginning of its help."""
    flags = flags_of(parser)
    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"usage: {parser.prog} [flags]", ""]
    lines += [*textwrap.wrap(" ".join((parser.description or "").split()), width), ""]
    for title, names in groups.items():
        found = [flags[name] for name in names if name in flags]
        if found:
            lines += [f"{title}:", *(line for flag in found for line in _lines(flag, width)), ""]
    lines += [
        "A switch may be given true or false, too. --help_all lists every flag. --log_format json",
        "makes each line that is logged a JSON object.",
        "",
    ]
    return "\n".join([*lines, EXIT_CODES, ""])


def _lines(action: argparse.Action, width: int) -> list[str]:
    name = max(action.option_strings[:2], key=lambda flag: ("_" in flag, flag.startswith("--")))
    head = f"  {name} {_value(action)}".rstrip()
    help = (action.help or "").replace("%%", "%")
    sentence = re.split(r"(?<=\w)[.;]\s", " ".join(help.split()), maxsplit=1)[0].rstrip(".")
    default = action.default.value if isinstance(action.default, Enum) else action.default
    if not (default in (None, "", argparse.SUPPRESS) or default is False):
        sentence += f" (default: {default})"
    text = textwrap.wrap(sentence, max(20, width - _INDENT))
    if len(head) < _INDENT - 1:
        text[0] = head.ljust(_INDENT) + text[0]
    else:
        text.insert(0, head)
    return [text[0], *(" " * _INDENT + line for line in text[1:])]


def _value(action: argparse.Action) -> str:
    if action.nargs in (0, "?"):  # says enough without
        return ""
    if action.metavar is not None:
        return str(action.metavar)
    if action.choices is not None:
        choices = "|".join(str(choice) for choice in action.choices)
        return choices if len(choices) < 40 else "NAME"
    kind = {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]
    return f"{kind} ..." if action.nargs == "+" else kind
