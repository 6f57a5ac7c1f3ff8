"""The flags of the rows and of the chat template that renders them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.errors import ConfigurationError
from student_trainer.config.flags import flag


@dataclass
class DatasetArguments:
    """The source of the rows.

    ``rows`` is not a flag: a Python caller may set rows in place of a name.
    """

    dataset_name: list[str] = flag(
        [],
        "Rows: a file, a folder, a glob or a Hub id. A file is Parquet, Arrow, JSONL, JSON, CSV or "
        "TSV, text also compressed; a folder holds such files, or what save_to_disk wrote. "
        "Several names are put together.",
        group="data",
        common=True,
        resume="told",
        private=True,
    )
    dataset_config: str | None = flag(
        None, "Configuration name of a Hub dataset.", group="data", resume="told"
    )
    dataset_split: str = flag(
        "train",
        "Split of a Hub dataset, a saved DatasetDict, or a folder whose files name splits.",
        group="data",
        resume="told",
    )
    rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # one name, as Python callers give it
            self.dataset_name = [self.dataset_name]
        if self.dataset_name == [""]:
            self.dataset_name = []


@dataclass
class DataArguments:
    """The part of each row that is learned, and the held-out rows.

    ``eval_rows`` is not a flag: a Python caller may set rows in place of a name.
    """

    eval_dataset_name: str | None = flag(
        None,
        "Held-out rows, for --eval_strategy.",
        group="evaluation and logs",
        common=True,
        private=True,
    )
    eval_dataset_split: str = flag(
        "test", "As --dataset_split, of the held-out rows.", group="evaluation and logs"
    )
    dataset_weights: list[float] | None = flag(
        None,
        "Relative share of each --dataset_name in an epoch, such as 2 1: rows are repeated until "
        "the shares are right, and none is left out. Default: each row once.",
        group="data",
        resume="same",
    )
    streaming: bool = flag(
        False,
        "Read and tokenize rows while the run goes on, for what does not fit in memory; needs "
        "--max_steps.",
        group="data",
        resume="same",
    )
    shuffle_buffer_size: int | None = flag(
        None,
        "Rows that --streaming holds to draw the next one from. Default: 10000.",
        group="data",
        resume="same",
    )
    dataset_num_proc: int | None = flag(
        None,
        "Processes that tokenize, from 2,000 rows on. Default: as many as CPUs, up to 8.",
        group="data",
    )
    prompt_column: str = flag(
        "prompt",
        "Column of the prompt; a text column of another name (question in GSM8K) is a user turn.",
        group="data",
        resume="told",
    )
    completion_column: str = flag(
        "completion",
        "Column of the completion (answer in GSM8K: then an assistant turn).",
        group="data",
        resume="told",
    )
    max_length: int | None = flag(
        None,
        "Longest prompt + completion, in tokens; completions are cut at it. Default: context.",
        group="data",
        common=True,
        resume="told",
    )
    skip_long_rows: bool = flag(
        False,
        "Leave out rows without room for a completion, and say how many, instead of failing.",
        group="data",
        resume="told",
    )
    assistant_turns: Literal["last", "all"] = flag(
        "last",
        "Which turns of the assistant are learned. all: each after its own history; on-policy each "
        "history is a prompt.",
        group="data",
        resume="same",
    )
    assistant_only_loss: bool = flag(
        False, "Old name of --assistant_turns all.", group="data", resume="told"
    )
    split_special_tokens: bool | None = flag(
        None,
        "How plain text that spells a special token, such as <s>, is read. true: as text. false: "
        "as the token. Default: an error. In messages it is always text.",
        group="data",
        resume="told",
    )
    eval_rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False)

    @property
    def learns_all_turns(self) -> bool:
        return self.assistant_turns == "all" or self.assistant_only_loss


# Options that decide which examples a row becomes.
ROW_OPTIONS = (
    "prompt_column", "completion_column", "assistant_turns", "assistant_only_loss",
    "split_special_tokens",
)  # fmt: skip


@dataclass
class TemplateArguments:
    """The options of the chat template, for prompts and completions alike."""

    chat_template_kwargs: str | None = flag(
        None,
        "JSON object for the chat template, such as '{\"enable_thinking\": false}'. A row's own "
        "column of this name comes first.",
        group="chat template",
        resume="same",
    )
    chat_template_date: str | None = flag(
        None,
        "Date (YYYY-MM-DD) that templates print which print today's. Default: that of the run's "
        "first start, or of --teacher_cache.",
        group="chat template",
    )

    def __post_init__(self) -> None:
        _ = self.kwargs

    @property
    def kwargs(self) -> dict[str, Any]:
        """The value of ``--chat_template_kwargs``, parsed.

        Raises:
            ConfigurationError: it is not a JSON object.
        """
        return json_object("--chat_template_kwargs", self.chat_template_kwargs)


def json_object(name: str, text: str | None) -> dict[str, Any]:
    """Return the value of a flag that is a JSON object; empty for None.

    Raises:
        ConfigurationError: it is not a JSON object.
    """
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{name} {text!r} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f'{name} {text!r} must be a JSON object such as {{"enable_thinking": false}}'
        )
    return values
