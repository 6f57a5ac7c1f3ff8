"""Rows -> token ids and a completion mask.

A row is `messages` (the last turn is the completion when the assistant speaks it), or `prompt` with
or without `completion`, conversational or plain text. Each is rendered once with the student's chat
template; from then on token ids travel, never text.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from shared.errors import DatasetError, RowTooLongError
from shared.logs import in_json
from student_trainer.config import DataArguments

T = TypeVar("T")
U = TypeVar("U")
Source = Literal["dataset", "teacher", "student"]


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        token_ids: [L] uint32, prompt and completion.
        completion_start: position of the first completion token.
        completion_mask: [T] bool, T = L − completion_start; True where the token is learned.
        source: who wrote the completion.
        truncated: the completion was cut by a length limit.
        weight_version: optimizer steps behind the weights that wrote it, when the student did.
    """

    token_ids: NDArray[np.uint32]
    completion_start: int
    completion_mask: NDArray[np.bool_]
    source: Source
    truncated: bool = False
    weight_version: int | None = None

    @property
    def completion_ids(self) -> NDArray[np.uint32]:
        return self.token_ids[self.completion_start :]


@dataclass(frozen=True)
class Example:
    """One row: the prompt, the dataset's own completion if it has one, and its checker.

    Attributes:
        index: position in the dataset; part of the key of everything random about the row.
        name: file and line, or row number, for messages.
        prompt_ids: [P] uint32, what a completion is generated for.
        sample: prompt and completion of the dataset, or None for a bare prompt.
        checker: how to tell whether a completion is right, as `evaluation.checkers` reads it.
        prompt: the prompt as text, for reports.
    """

    index: int
    name: str
    prompt_ids: NDArray[np.uint32]
    sample: Sample | None
    checker: dict[str, Any] | None
    prompt: str


def completed(
    example: Example,
    completion_ids: NDArray[np.uint32],
    source: Source,
    *,
    truncated: bool,
    weight_version: int | None = None,
) -> Sample:
    """The example's prompt with a generated completion, all of which is learned."""
    return Sample(
        token_ids=np.concatenate([example.prompt_ids, completion_ids.astype(np.uint32)]),
        completion_start=len(example.prompt_ids),
        completion_mask=np.ones(len(completion_ids), dtype=bool),
        source=source,
        truncated=truncated,
        weight_version=weight_version,
    )


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> list[int]:
    """Tokens that end a completion; the first is appended where a completion lacks its end.

    That is the tokenizer's EOS, or without one the model's own; the model's others follow, sorted.

    Raises:
        DatasetError: there is none, so no completion could ever end.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    own = configured if isinstance(configured, list) else [configured]
    ids = [tokenizer.eos_token_id, *sorted(int(i) for i in own if i is not None)]
    distinct = list(dict.fromkeys(int(i) for i in ids if i is not None))
    if not distinct:
        raise DatasetError("the tokenizer has no EOS token; set one, completions must end")
    return distinct


def load_rows(name: str, *, config: str | None, split: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) pairs of a JSONL file (.gz too), a folder of them, or a Hub dataset.

    Raises:
        DatasetError: missing or empty, or a line that is not a JSON object (file and line).
    """
    path = Path(name).expanduser()
    if path.is_file():
        rows = list(_read_jsonl(path))
    elif path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
        rows = [row for file in files for row in _read_jsonl(file)]
    elif path.suffix in (".jsonl", ".json", ".gz") or name.startswith((".", "/", "~")):
        raise DatasetError(
            f"{name}: no such file or folder; give a JSONL file, a folder of them, or a Hub id"
        )
    else:
        rows = _load_from_hub(name, config, split)
    if not rows:
        raise DatasetError(f"{name} holds no rows")
    return rows


def named_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) pairs of rows in memory: a list of dicts, or a ``datasets.Dataset``.

    Raises:
        DatasetError: there are none, or one is no mapping (names it).
    """
    named = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DatasetError(
                f"{name} row {number}: expected a dict such as {{'prompt': …, 'completion': …}}, "
                f"got {type(row).__name__}"
            )
        named.append((f"{name} row {number}", dict(row)))
    if not named:
        raise DatasetError(f"{name} holds no rows")
    return named


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DatasetError(f"{where}: not valid JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DatasetError(f"{where}: expected a JSON object, got {line.strip()[:40]}")
                yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {error}") from error


def _load_from_hub(name: str, config: str | None, split: str) -> list[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise DatasetError(
            f"{name} is neither a file nor a folder, and the Hub gives no such dataset: {error}"
        ) from error
    return [(f"{name}[{split}] row {i}", dict(row)) for i, row in enumerate(dataset)]


def tokenize_rows(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    options: DataArguments,
    *,
    max_length: int,
    remedy: str = "Shorten it",
    description: str = "Tokenizing",
    progress: bool = True,
) -> list[Example]:
    """Examples of all rows, less those that are too long if ``options`` say so.

    Args:
        max_length: longest prompt and completion, in tokens.
        remedy: what the message about a row that is too long advises.

    Raises:
        DatasetError: names the first row that cannot be rendered or leaves nothing to learn.
    """
    hidden = not progress or in_json()
    bar = tqdm(rows, desc=description, disable=hidden, leave=False)
    numbered = ((index, where, row) for index, (where, row) in enumerate(bar))
    return keep_short(
        numbered,
        lambda item: _tokenize(*item, tokenizer, stop_ids, options, max_length),
        skip=options.skip_long_rows,
        remedy=remedy,
    )


def keep_short(items: Iterable[T], make: Callable[[T], U], *, skip: bool, remedy: str) -> list[U]:
    """``make`` of each item, less those it finds too long where ``skip`` allows that.

    Raises:
        DatasetError: what ``make`` raises, or nothing is left.
    """
    kept, last = [], None
    for item in items:
        try:
            kept.append(make(item))
        except RowTooLongError as error:
            if not skip:
                raise RowTooLongError(f"{error}. {remedy}") from error
            last = error
    if last is not None and not kept:
        raise DatasetError(f"every row is too long. The last one: {last}")
    return kept


def _tokenize(
    index: int,
    where: str,
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    options: DataArguments,
    max_length: int,
) -> Example:
    prompt, completion = _split_row(where, row, options)
    if isinstance(prompt, str):
        text = prompt
        prompt_ids = _ids(tokenizer, prompt, add_special_tokens=True)
        sample = None
        if completion is not None:
            ids = [*_ids(tokenizer, completion), stop_ids[0]]
            sample = _sample(prompt_ids, ids, max_length)
    else:
        _require_template(where, tokenizer)
        text = _render(where, tokenizer, prompt, add_generation_prompt=True)
        prompt_ids = _ids(tokenizer, text)
        sample = None
        if completion is not None:
            messages = [*prompt, completion]
            if options.assistant_only_loss:
                sample = _all_assistant_turns(where, tokenizer, messages, max_length)
            else:
                ids = _completion_ids(where, tokenizer, messages, text, stop_ids)
                sample = _sample(prompt_ids, ids, max_length)
    if not prompt_ids:
        raise DatasetError(f"{where}: the prompt is empty; a completion needs a token before it")
    if len(prompt_ids) >= max_length:
        raise RowTooLongError(
            f"{where}: the prompt has {len(prompt_ids)} tokens; the limit of {max_length} leaves "
            "none for a completion"
        )
    checker = row.get("checker")
    if checker is not None and not isinstance(checker, dict):
        raise DatasetError(f"{where}: checker must be an object, got {type(checker).__name__}")
    return Example(index, where, np.asarray(prompt_ids, dtype=np.uint32), sample, checker, text)


def _split_row(
    where: str, row: dict[str, Any], options: DataArguments
) -> tuple[str | list[dict[str, Any]], Any]:
    """Prompt and completion, as text both, or as messages and one message."""
    if isinstance(row.get("messages"), list):
        messages = _check_messages(where, "messages", row["messages"])
        if messages[-1]["role"] == "assistant":
            if len(messages) == 1:
                raise DatasetError(f"{where}: messages hold no turn before the assistant's")
            return messages[:-1], messages[-1]
        return messages, None
    prompt = row.get(options.prompt_column)
    completion = row.get(options.completion_column)
    if prompt is None:
        raise DatasetError(
            f"{where}: neither messages nor {options.prompt_column!r}; the row has "
            f"{sorted(row)}. Name the columns with --prompt_column and --completion_column"
        )
    if isinstance(prompt, list):
        messages = _check_messages(where, options.prompt_column, prompt)
        if isinstance(completion, str):
            return messages, {"role": "assistant", "content": completion}
        if completion is None:
            return messages, None
        turns = _check_messages(where, options.completion_column, completion)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DatasetError(f"{where}: {options.completion_column} must be one assistant turn")
        return messages, turns[0]
    if not isinstance(prompt, str) or not (completion is None or isinstance(completion, str)):
        raise DatasetError(f"{where}: prompt and completion must both be text, or both messages")
    if completion == "":
        raise DatasetError(f"{where}: the completion is empty; there is nothing to learn")
    if options.prompt_column != "prompt":  # a mapped column of a chat dataset: one user turn
        messages = [{"role": "user", "content": prompt}]
        turn = None if completion is None else {"role": "assistant", "content": completion}
        return messages, turn
    return prompt, completion


def _check_messages(where: str, column: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: {column} must be a list of at least one message")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DatasetError(f"{where}: {column}[{number}] must be an object with role, content")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DatasetError(f"{where}: {column}[{number}] has no content")
    return value


def _require_template(where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DatasetError(
            f"{where}: the row is a conversation but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give prompt and completion as plain text"
        )


def _render(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    **options: Any,
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        raise DatasetError(f"{where}: the chat template refuses the messages: {error}") from error
    return str(text)


def _completion_ids(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    prompt_text: str,
    stop_ids: Sequence[int],
) -> list[int]:
    """The last turn's tokens, up to and with its end token."""
    text = _render(where, tokenizer, messages)
    if not text.startswith(prompt_text):
        raise DatasetError(
            f"{where}: rendered with its completion, the conversation does not begin with the "
            "prompt (the template rewrites earlier turns), so the completion cannot be told from "
            "it. Give the row as prompt and completion in plain text, or use a template with "
            "{% generation %} markers and --assistant_only_loss"
        )
    if not str(messages[-1].get("content") or "").strip() and not messages[-1].get("tool_calls"):
        raise DatasetError(f"{where}: the completion is empty; there is nothing to learn")
    completion = text[len(prompt_text) :]
    ids = _ids(tokenizer, completion)
    ends = [i for i, token in enumerate(ids) if token in set(stop_ids)]
    if ends:
        return ids[: ends[0] + 1]  # templates print a newline after the end of the turn
    for token in tokenizer.all_special_tokens:
        if completion.rstrip().endswith(token):
            raise DatasetError(
                f"{where}: the chat template ends the assistant's turn with {token!r}, which ends "
                f"no completion here (EOS is {tokenizer.eos_token!r}): generated completions would "
                f"run to their limit. Pass --eos_token '{token}'"
            )
    return [*ids, stop_ids[0]]


def _all_assistant_turns(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    max_length: int,
) -> Sample:
    template = str(tokenizer.chat_template)
    if "generation" not in template or "endgeneration" not in template:
        raise DatasetError(
            f"{where}: --assistant_only_loss needs a chat template that marks what the assistant "
            "wrote with {% generation %} … {% endgeneration %}; this one does not"
        )
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.asarray(rendered["input_ids"], dtype=np.uint32)
    mask = np.asarray(rendered["assistant_masks"], dtype=bool)
    learned = np.flatnonzero(mask)
    if not len(learned) or learned[0] == 0:
        raise DatasetError(f"{where}: no assistant token follows another token; nothing to learn")
    start, end = int(learned[0]), int(learned[-1]) + 1
    if start >= max_length:
        raise RowTooLongError(
            f"{where}: the first assistant turn begins at token {start}, beyond the limit of "
            f"{max_length}"
        )
    cut = min(end, max_length)
    return Sample(ids[:cut], start, mask[start:cut], "dataset", truncated=cut < end)


def _sample(prompt_ids: list[int], ids: list[int], max_length: int) -> Sample | None:
    if not prompt_ids or len(prompt_ids) >= max_length:
        return None  # the caller names the row
    room = max_length - len(prompt_ids)
    return Sample(
        token_ids=np.asarray([*prompt_ids, *ids[:room]], dtype=np.uint32),
        completion_start=len(prompt_ids),
        completion_mask=np.ones(min(len(ids), room), dtype=bool),
        source="dataset",
        truncated=len(ids) > room,
    )


def _ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
