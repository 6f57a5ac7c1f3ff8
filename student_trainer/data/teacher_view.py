"""The name of a row's teacher, and the prompt that only this teacher sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError, DatasetError
from shared.nearest import nearest
from student_trainer.data.conversation import Conversation, PlainText, json_value
from student_trainer.data.messages import Message

PROMPT, MESSAGES = "teacher_prompt", "teacher_messages"


@dataclass(frozen=True)
class TeacherView:
    """The rules by which a row has a teacher, and that teacher a prompt of its own.

    Attributes:
        names: of the teachers, the first one first; empty for one without a name.
        column: the column that names a row's teacher.
        template: Jinja source that makes the teacher's prompt from the row's columns, or None.
        template_kwargs: options of the chat template for the teacher's prompt alone.
    """

    names: tuple[str, ...] = ()
    column: str = "teacher"
    template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def name_of(self, where: str, row: Mapping[str, Any]) -> str | None:
        """Return the name of a row's teacher; None for the first.

        Raises:
            DatasetError: no teacher of the run is called so.
        """
        name = row.get(self.column) if self.names else None
        if name is None or name == "":
            return None
        if name not in self.names:
            near = nearest(str(name), self.names)
            hint = f"; did you mean {near}?" if near else ""
            raise DatasetError(
                f"{where}: {self.column} {name!r:.100}: no --teacher_url has this name, only "
                f"{', '.join(self.names)}{hint}"
            )
        return str(name)

    def messages_of(
        self, where: str, row: Mapping[str, Any], parsed: Conversation | PlainText
    ) -> str | list[Message] | None:
        """Return the prompt that only the teacher sees: plain text, messages, or None.

        A text in a conversation takes the place of its last user turn.

        Raises:
            DatasetError: the row has several such prompts, or one that does not fit its own.
        """
        text, messages = row.get(PROMPT), json_value(where, MESSAGES, row.get(MESSAGES))
        if self.template is not None:
            if text is not None or messages is not None:
                column = PROMPT if messages is None else MESSAGES
                raise DatasetError(
                    f"{where}: {column} and --teacher_prompt_template both say what the teacher "
                    "sees; drop one"
                )
            text = self._rendered(where, row)
            if not text:
                raise DatasetError(
                    f"{where}: --teacher_prompt_template prints nothing for this row; the row's "
                    f"columns are {', '.join(map(str, row))}"
                )
        if text is not None and messages is not None:
            raise DatasetError(f"{where}: {PROMPT} and {MESSAGES} both say what the teacher sees")
        given = PROMPT if messages is None else MESSAGES
        continues = isinstance(parsed, Conversation) and parsed.prompt[-1]["role"] == "assistant"
        if continues and (text is not None or messages is not None):
            raise DatasetError(
                f"{where}: the prompt ends with the beginning of an answer, which {given} cannot "
                "repeat; put that beginning into the completion"
            )
        if messages is not None:
            if not isinstance(messages, list) or not messages or isinstance(parsed, PlainText):
                raise DatasetError(
                    f"{where}: {MESSAGES} must be a list of messages, in a row of messages"
                )
            return list(messages)
        if text is None:
            return None
        if not isinstance(text, str) or not text:
            raise DatasetError(f"{where}: {PROMPT} must be a text that is not empty, got {text!r}")
        if isinstance(parsed, PlainText):
            return text
        if parsed.prompt[-1]["role"] != "user":
            raise DatasetError(
                f"{where}: the {PROMPT} takes the place of the last user turn, and the prompt ends "
                f"with a turn of {parsed.prompt[-1]['role']}; give {MESSAGES} instead"
            )
        return [*parsed.prompt[:-1], {**parsed.prompt[-1], "content": text}]

    @cached_property
    def _compiled(self) -> Any:
        return _compile(str(self.template))

    def _rendered(self, where: str, row: Mapping[str, Any]) -> str:
        try:
            return str(self._compiled.render(row))
        except Exception as error:  # a template may divide by zero, or format what is not there
            columns = ", ".join(map(str, row))
            raise DatasetError(
                f"{where}: --teacher_prompt_template: {str(error) or type(error).__name__}; the "
                f"row's columns are {columns}"
            ) from error


def read_template(path: Path) -> str:
    """Return the source of a Jinja template.

    Raises:
        ConfigurationError: the file cannot be read, or is no template.
    """
    from jinja2 import TemplateSyntaxError

    try:
        source = path.read_text(encoding="utf-8")
        _compile(source)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--teacher_prompt_template {path}: {error}") from error
    except TemplateSyntaxError as error:
        raise ConfigurationError(
            f"--teacher_prompt_template {path}, line {error.lineno}: {error.message}"
        ) from error
    return source.rstrip("\n")


def _compile(source: str) -> Any:
    """Return a template that may read the row, and reach nothing else."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)
