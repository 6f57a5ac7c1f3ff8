"""The table of commands: what each does, and which function runs it.

A new command stands here, and its flags in `config.parse.ARGUMENTS`, or its own parser in
`shell_completion.commands`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A command of `student-trainer`.

    Attributes:
        help: one line for the list of commands.
        function: "module:function", imported when the command is run, so that the list of commands
            does not wait for torch. It takes the arguments after the command's name.
    """

    help: str
    function: str

    def load(self) -> Callable[[Sequence[str]], object]:
        """Import the function and return it."""
        module, name = self.function.split(":")
        function: Callable[[Sequence[str]], object] = getattr(import_module(module), name)
        return function


_HERE = "student_trainer.commands"
COMMANDS = {
    "sft": Command(
        "fine-tune on the dataset's completions (the student, or the teacher before serving it)",
        f"{_HERE}.train:sft",
    ),
    "distill": Command(
        "learn from a served teacher: Supervised KD, SeqKD, on-policy GKD, or a mixture",
        f"{_HERE}.train:distill",
    ),
    "precompute": Command(
        "ask the teacher all that `distill` will, and keep it in --teacher_cache",
        f"{_HERE}.precompute:precompute",
    ),
    "evaluate": Command(
        "generate, check the completions, and score them", f"{_HERE}.evaluate:evaluate"
    ),
    "merge": Command(
        "LoRA adapters into their base model, for serving or distilling further",
        f"{_HERE}.merge:merge",
    ),
    "study": Command(
        "a file of such commands over several seeds: run once each, then compared",
        "student_trainer.study.command:study",
    ),
    "report": Command(
        "a page of what runs left in their folders: curves, seconds, scores, samples",
        "student_trainer.reporting.command:report",
    ),
    "doctor": Command(
        "what of this machine, and of a teacher, works: versions, GPUs, disk, key",
        f"{_HERE}.doctor:doctor",
    ),
    "completion": Command(
        "a script that lets bash, zsh or fish complete commands and flags",
        f"{_HERE}.shell_completion:completion",
    ),
}
