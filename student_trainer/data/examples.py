"""The tokenizer of a dataset row: prompt and completion ids, and which of them are learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from shared import __version__
from shared.errors import DatasetError, RowTooLongError
from shared.identity import tokenizer_identity
from student_trainer.config.arguments import ROW_OPTIONS, DataArguments
from student_trainer.data.conversation import Conversation, PlainText, json_value, read_row
from student_trainer.data.encode import Encoder
from student_trainer.data.messages import Message
from student_trainer.data.sample import Example, Sample
from student_trainer.data.teacher_view import TeacherView
from student_trainer.data.template import ChatTemplate, TemplateOptions
from student_trainer.data.turn import Turn, first_turn, token_after

# The low bits of an example's index are its row's number, the bits above its turn's number.
_ROW_BITS = 32


def row_of(example: Example) -> int:
    """Return the number of the dataset row that an example was made from."""
    return example.index & ((1 << _ROW_BITS) - 1)


@dataclass(frozen=True)
class _TokenizedTurn:
    """The token ids of a prompt and of the completion after it.

    Attributes:
        text: the prompt as text, for reports.
        completion_ids: with the end token; None for a bare prompt.
        notes: as in `Example`.
    """

    text: str
    prompt_ids: list[int]
    completion_ids: list[int] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowTokenizer:
    """A callable that turns a dataset row into examples, in any process and order.

    Attributes:
        stop_ids: tokens that end a completion; the first is appended to completions without one.
        text_end: the one of them that is appended to plain text; None for the first.
        max_length: longest prompt and completion together, in tokens.
        template: options of the chat template.
        one_sequence: learn several assistant turns as spans of one sequence where the template
            prints earlier turns unchanged; for methods that generate nothing.
        view: which teacher a row has, and what only that one sees; None where there is no teacher,
            and columns about one are like any others.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    options: DataArguments
    max_length: int
    template: TemplateOptions = field(default_factory=TemplateOptions)
    one_sequence: bool = False
    text_end: int | None = None
    view: TeacherView | None = None

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.stop_ids)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template under the options.

        Raises:
            ConfigurationError: the template does not read one of the options.
        """
        return ChatTemplate(self.encoder, self.template)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 (hex) of everything but the row that its examples depend on."""
        identity = tokenizer_identity(self.tokenizer)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        told = [
            __version__,
            identity.fingerprint,
            identity.special_token_ids,
            identity.chat_template,
            None if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest(),
            [self.stop_ids, self.text_end],
            self.max_length,
            [getattr(self.options, name) for name in ROW_OPTIONS],
            dict(self.template.kwargs),
            str(self.template.today) if self.chat.prints_date else None,
            self.one_sequence,
            None if self.view is None else asdict(self.view),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def __call__(self, index: int, where: str, row: dict[str, Any]) -> list[Example]:
        """Return the examples of a row, each with its teacher: one, or one for each assistant turn.

        Args:
            index: number of the row in the dataset.
            where: file and line, or row number, for messages.

        Raises:
            DatasetError: the row cannot be rendered, or leaves nothing to learn.
            RowTooLongError: it leaves no room for a completion.
        """
        checker = json_value(where, "checker", row.get("checker") or None)
        if checker is not None and not isinstance(checker, dict):
            raise DatasetError(f"{where}: checker must be an object, got {type(checker).__name__}")
        parsed = read_row(where, row, self.options)
        examples = self._examples(index, where, parsed, checker)
        if self.view is None:
            return examples
        teacher, prompt = self.view.name_of(where, row), self.view.messages_of(where, row, parsed)
        if teacher is None and prompt is None:
            return examples
        options = self.view.template_kwargs
        ids = None if prompt is None else self._teacher_prompt(where, prompt, parsed, options)
        if ids is not None and (len(examples) > 1 or _is_joined(examples[0])):
            raise DatasetError(
                f"{where}: what only the teacher sees is one prompt, and this row teaches several "
                "turns; learn its last turn alone (--assistant_turns last)"
            )
        return [replace(e, teacher=teacher, teacher_prompt_ids=ids) for e in examples]

    def _teacher_prompt(
        self,
        where: str,
        prompt: str | list[Message],
        parsed: Conversation | PlainText,
        options: Mapping[str, Any],
    ) -> NDArray[np.uint32]:
        """Return the ids [P'] of the prompt that only the teacher sees.

        Raises:
            DatasetError: it has no tokens, or cannot be rendered.
        """
        if isinstance(prompt, str):
            turn = self._tokenize_text(f"{where}: teacher_prompt", PlainText(prompt, None))
        else:
            turn = self._tokenize_messages_of_teacher(where, prompt, parsed, options)
        if not turn.prompt_ids:
            raise DatasetError(
                f"{where}: the prompt that only the teacher sees has no tokens; a completion needs "
                "a token before it"
            )
        return np.asarray(turn.prompt_ids, dtype=np.uint32)

    def _tokenize_messages_of_teacher(
        self,
        where: str,
        prompt: list[Message],
        parsed: Conversation | PlainText,
        options: Mapping[str, Any],
    ) -> _TokenizedTurn:
        assert isinstance(parsed, Conversation)
        given = read_row(where, {"messages": prompt}, self.options)
        if not isinstance(given, Conversation) or given.completion is not None:
            raise DatasetError(
                f"{where}: teacher_messages end with a turn of the assistant, which would be the "
                "completion; end them before it"
            )
        kwargs = {**parsed.template_kwargs, **options}
        seen = replace(given, tools=given.tools or parsed.tools, template_kwargs=kwargs)
        return self._tokenize_conversation(where, seen)

    def _examples(
        self,
        index: int,
        where: str,
        parsed: Conversation | PlainText,
        checker: dict[str, Any] | None,
    ) -> list[Example]:
        if isinstance(parsed, PlainText):
            return [self._example(index, where, self._tokenize_text(where, parsed), checker)]
        conversations = [parsed]
        if self.options.learns_all_turns:
            conversations = _assistant_turns(where, parsed)
        parts = [self._tokenize_conversation(where, conversation) for conversation in conversations]
        if len(parts) == 1:
            return [self._example(index, where, parts[0], checker)]
        if self.one_sequence:
            sample = self._join_turns(where, parts)
            if sample is not None:
                last = parts[-1]
                prompt_ids = np.asarray(last.prompt_ids, dtype=np.uint32)
                return [Example(index, where, prompt_ids, sample, checker, last.text, last.notes)]
        examples = []
        for number, part in enumerate(parts):
            name = f"{where} turn {number + 1}"
            own = checker if number == len(parts) - 1 else None
            try:
                examples.append(self._example(index + (number << _ROW_BITS), name, part, own))
            except RowTooLongError:
                if not examples or not self.options.skip_long_rows:
                    raise
        return examples

    def _example(
        self, index: int, where: str, part: _TokenizedTurn, checker: dict[str, Any] | None
    ) -> Example:
        prompt_ids = np.asarray(part.prompt_ids, dtype=np.uint32)
        if not len(prompt_ids):
            raise DatasetError(
                f"{where}: the prompt is empty; a completion needs a token before it"
            )
        if len(prompt_ids) >= self.max_length:
            raise RowTooLongError(
                f"{where}: the prompt has {len(prompt_ids)} tokens; the limit of "
                f"{self.max_length} leaves none for a completion"
            )
        sample = None
        if part.completion_ids is not None:
            room = self.max_length - len(prompt_ids)
            ids = np.asarray(part.completion_ids[:room], dtype=np.uint32)
            sample = Sample(
                token_ids=np.concatenate([prompt_ids, ids]),
                completion_start=len(prompt_ids),
                completion_mask=np.ones(len(ids), dtype=bool),
                source="dataset",
                truncated=len(part.completion_ids) > room,
            )
        return Example(index, where, prompt_ids, sample, checker, part.text, part.notes)

    def _tokenize_text(self, where: str, row: PlainText) -> _TokenizedTurn:
        """Return the ids of plain text; the completion gets its end token."""
        prompt, completion, ends = row.prompt, row.completion, False
        stops = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids]
        reads = self.options.split_special_tokens
        if completion is not None and not reads:
            stop = next((stop for stop in stops if completion.endswith(stop)), "")
            completion, ends = completion.removesuffix(stop), bool(stop)
        if reads is None:
            begun = prompt.removeprefix(str(self.tokenizer.bos_token or ""))
            for name, text in (("prompt", begun), ("completion", completion or "")):
                found = self.encoder.find_control_token(text)
                if found is not None:
                    raise DatasetError(
                        f"{where}: the {name} holds {found!r}, which this tokenizer reads as a "
                        "control token; pass --split_special_tokens true to read it as text, or "
                        "false if it is meant as the token"
                    )
        if reads:
            prompt, completion = self.encoder.protect(prompt), self.encoder.protect(completion)
        prompt_ids = self.encoder.encode_prompt(prompt)
        if completion is None:
            return _TokenizedTurn(row.prompt, prompt_ids, None)
        try:
            ids = self.encoder.encode_after(prompt, prompt_ids, completion)
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}") from error
        early = next((i for i in ids if i in self.stop_ids), None)
        if early is not None:
            raise DatasetError(
                f"{where}: {self.tokenizer.convert_ids_to_tokens(early)!r} ends a completion, and "
                "stands in the middle of this one; pass --split_special_tokens true to read it as "
                "text"
            )
        if ends:
            end = self.stop_ids[stops.index(stop)]
        else:
            end = self.stop_ids[0] if self.text_end is None else self.text_end
        return _TokenizedTurn(row.prompt, prompt_ids, [*ids, end])

    def _tokenize_conversation(self, where: str, conversation: Conversation) -> _TokenizedTurn:
        try:
            turn = first_turn(self.chat, where, conversation)
            prompt_ids = self.encoder.encode(turn.prompt)
            completion_ids = None
            if turn.completion is not None:
                ids = self.encoder.encode_after(turn.prompt, prompt_ids, turn.completion)
                completion_ids = self._with_end_token(where, conversation, turn, ids)
        except DatasetError as error:
            text = self.encoder.restore(str(error))
            raise DatasetError(text if text.startswith(where) else f"{where}: {text}") from error
        return _TokenizedTurn(
            self.encoder.restore(turn.prompt), prompt_ids, completion_ids, turn.notes
        )

    def _with_end_token(
        self, where: str, conversation: Conversation, turn: Turn, ids: list[int]
    ) -> list[int]:
        """Return a completion's ids up to its end token, which is appended where it is missing."""
        ends = [number for number, token in enumerate(ids) if token in self.stop_ids]
        if ends:
            return ids[: ends[0] + 1]  # templates print a newline after the end token
        following = token_after(self.chat, where, conversation, turn)
        if following in self.stop_ids:
            return [*ids, following]  # in GLM's template the next turn's first token ends a turn
        completion = str(turn.completion).rstrip()
        for token in self.tokenizer.all_special_tokens:
            if completion.endswith(token):
                raise DatasetError(
                    f"{where}: the chat template ends the assistant's turn with {token!r}, which "
                    f"ends no completion here (EOS is {self.tokenizer.eos_token!r}): generated "
                    f"completions would run to their limit. Pass --eos_token '{token}'"
                )
        return [*ids, self.stop_ids[0]]

    def _join_turns(self, where: str, parts: Sequence[_TokenizedTurn]) -> Sample | None:
        """Return one sequence that holds all turns; None where a turn is not a prefix of the last.

        Raises:
            RowTooLongError: the first turn begins beyond the length limit.
        """
        last = parts[-1]
        whole = [*last.prompt_ids, *(last.completion_ids or ())]
        mask = np.zeros(len(whole), dtype=bool)
        for part in parts:
            ids = [*part.prompt_ids, *(part.completion_ids or ())]
            if whole[: len(ids)] != ids:
                return None
            mask[len(part.prompt_ids) : len(ids)] = True
        start = len(parts[0].prompt_ids)
        if start >= self.max_length:
            raise RowTooLongError(
                f"{where}: the first assistant turn begins at token {start}, beyond the limit of "
                f"{self.max_length}"
            )
        cut = min(len(whole), self.max_length)
        return Sample(
            np.asarray(whole[:cut], dtype=np.uint32),
            start,
            mask[start:cut],
            "dataset",
            truncated=cut < len(whole),
        )


def _is_joined(example: Example) -> bool:
    """Return whether a sequence was made for several turns, of which the limit may leave one."""
    return example.sample is not None and example.sample.completion_start != len(example.prompt_ids)


def _assistant_turns(where: str, row: Conversation) -> list[Conversation]:
    """Return a conversation for each learned assistant turn that follows another turn.

    As in OpenAI's format, a turn of ``weight`` 0 is not learned.
    """
    turns = [*row.prompt, *([] if row.completion is None else [row.completion])]
    continues = row.completion is not None and row.prompt[-1]["role"] == "assistant"
    made = []
    for number, message in enumerate(turns):
        if message["role"] != "assistant" or number == 0 or message.get("weight") == 0:
            continue
        if continues and number == len(turns) - 2:
            continue  # it is the beginning of the last turn
        made.append(Conversation(turns[:number], message, row.tools, row.template_kwargs))
    if not made and any(message["role"] == "assistant" for message in turns):
        raise DatasetError(f"{where}: no assistant turn that is learned follows another turn")
    return made or [row]
