"""The table of commands: what each does, its flags, and which function runs it.

A new command stands here and nowhere else. Functions are named as text, because they stand in
packages above this one, and because the list of commands does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from student_trainer.config.arguments import (
    AdapterArguments,
    DataArguments,
    DatasetArguments,
    DistillFlags,
    EvaluateArguments,
    GenerationArguments,
    MergeArguments,
    ModelArguments,
    SFTFlags,
    TeacherArguments,
    TemplateArguments,
)


@dataclass(frozen=True)
class Command:
    """A command of `student-trainer`.

    Attributes:
        help: one line for the list of commands.
        function: "module:function", which takes the arguments after the command's name.
        arguments: the dataclasses of its flags, in the order in which `config.parse` returns them.
        parser: "module:function" that makes the parser of a command without such dataclasses.
        example: a command line to copy, which ends its help.
    """

    help: str
    function: str
    arguments: tuple[type[Any], ...] = ()
    parser: str = ""
    example: str = ""

    def load(self) -> Callable[[Sequence[str]], object]:
        """Import the function and return it."""
        return imported(self.function)


def imported(path: str) -> Callable[..., Any]:
    """Import the function that "module:function" names, and return it."""
    module, name = path.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


_HERE = "student_trainer.commands"
_RECIPE = (
    ModelArguments,
    AdapterArguments,
    DatasetArguments,
    DataArguments,
    GenerationArguments,
    TemplateArguments,
)
_DISTILL = (*_RECIPE, TeacherArguments, DistillFlags)
COMMANDS = {
    "sft": Command(
        "fine-tune on the dataset's completions (the student, or the teacher before serving it)",
        f"{_HERE}.train:sft",
        (*_RECIPE, SFTFlags),
        example="student-trainer sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\\n"
        "  --dataset_name data.jsonl --max_steps 100 --output_dir out",
    ),
    "distill": Command(
        "learn from a served teacher: Supervised KD, SeqKD, on-policy GKD, or a mixture",
        f"{_HERE}.train:distill",
        _DISTILL,
        example="student-trainer distill --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\\n"
        "  --teacher_url http://localhost:8000 --dataset_name data.jsonl --lmbda 1 \\\n"
        "  --max_steps 100 --output_dir out",
    ),
    "precompute": Command(
        "ask the teacher all that `distill` will, and keep it in --teacher_cache",
        f"{_HERE}.precompute:precompute",
        _DISTILL,
        example="student-trainer precompute --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\\n"
        "  --teacher_url http://localhost:8000 --dataset_name data.jsonl --lmbda 0 \\\n"
        "  --teacher_cache cache --output_dir out",
    ),
    "evaluate": Command(
        "generate, check the completions, and score them",
        f"{_HERE}.evaluate:evaluate",
        (
            ModelArguments,
            DatasetArguments,
            GenerationArguments,
            TemplateArguments,
            TeacherArguments,
            EvaluateArguments,
        ),
        example="student-trainer evaluate --model_name_or_path out --suite gsm8k \\\n"
        "  --max_new_tokens 512 --output_dir scores",
    ),
    "merge": Command(
        "LoRA adapters into their base model, for serving or distilling further",
        f"{_HERE}.merge:merge",
        (MergeArguments,),
        example="student-trainer merge --model_name_or_path out --output_dir merged",
    ),
    "study": Command(
        "a file of such commands over several seeds: run once each, then compared",
        "student_trainer.study.command:study",
        parser="student_trainer.study.command:make_parser",
    ),
    "report": Command(
        "a page of what runs left in their folders: curves, seconds, scores, samples",
        "student_trainer.reporting.command:report",
        parser="student_trainer.reporting.command:make_parser",
    ),
    "doctor": Command(
        "what of this machine, and of a teacher, works: versions, GPUs, disk, key",
        f"{_HERE}.doctor:doctor",
        parser=f"{_HERE}.doctor:make_parser",
    ),
    "completion": Command(
        "a script that lets bash, zsh or fish complete commands and flags",
        f"{_HERE}.shell_completion:completion",
        parser=f"{_HERE}.shell_completion:make_parser",
    ),
}
# The dataclasses of flags by command, without the commands that have a parser of their own.
ARGUMENTS = {name: command.arguments for name, command in COMMANDS.items() if command.arguments}
