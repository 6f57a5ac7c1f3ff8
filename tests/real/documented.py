"""The table of docs/how-to/chat-templates.md: one conversation under all published templates.

`python -m tests.real.documented` writes it anew; a test compares.
"""

import html
from pathlib import Path

from shared.errors import DatasetError
from student_trainer.data.conversation import Conversation
from student_trainer.data.examples import RowTokenizer
from tests.support.templates import TEMPLATES, WEATHER, assistant, call, row_tokenizer, user

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "chat-templates.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

TURNS = [
    {"role": "system", "content": "Be brief."},
    user("Weather in Köln?"),
    assistant(None, reasoning_content="I must ask.", tool_calls=[call(city="Köln", days=1)]),
    {"role": "tool", "tool_call_id": "call00001", "content": "grey"},
    assistant("Grey.", reasoning_content="It says grey."),
    user("And 2+2?"),
    assistant("4.", reasoning_content="Two and two."),
]


def without(turns, *, thoughts=False, tools=False):
    """The conversation without thoughts, or without the call of a tool and its answer."""
    if tools:
        turns = [t for t in turns if t["role"] != "tool" and "tool_calls" not in t]
    dropped = "reasoning_content" if thoughts else ""
    return [{key: value for key, value in turn.items() if key != dropped} for turn in turns]


def table() -> str:
    """Rows of Markdown: template, what it refuses, the prompt's end, what is learned, sequences."""
    lines = [
        "| template | refused | the prompt ends with | learned | `all` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in TEMPLATES:
        tokenize = row_tokenizer(name, assistant_turns="all", one_sequence=True)
        thinking = [("", None)]
        if "enable_thinking" in tokenize.chat.source:
            thinking.append((", not thinking", {"enable_thinking": False}))
        for mode, kwargs in thinking:
            tokenize = row_tokenizer(name, kwargs=kwargs, assistant_turns="all", one_sequence=True)
            lines.append(_row(name + mode, tokenize))
    return "\n".join(lines) + "\n"


def _row(name: str, tokenize: RowTokenizer) -> str:
    for what, turns, tools in (
        ("", TURNS, [WEATHER]),
        ("tools", without(TURNS, tools=True), None),
        ("thoughts", without(TURNS, thoughts=True), [WEATHER]),
        ("tools, thoughts", without(TURNS, thoughts=True, tools=True), None),
    ):
        refused = what
        try:
            part = tokenize._tokenize_conversation(
                "row", Conversation(turns[:-1], turns[-1], tools)
            )
            examples = tokenize(0, "row", {"messages": turns, "tools": tools})
        except DatasetError:
            continue
        break
    decode = tokenize.tokenizer.decode
    shown = f"…{decode(part.prompt_ids)[-44:]}"
    cells = [name, refused, _code(shown), _code(decode(part.completion_ids))]
    count = "1 sequence" if len(examples) == 1 else f"{len(examples)} sequences"
    return "| " + " | ".join([*cells, count]) + " |"


def _code(text: str) -> str:
    escaped = html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "⏎")
    return f"<code>{escaped}</code>"


def main() -> None:
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
