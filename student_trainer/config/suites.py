"""The suites that `evaluate` knows by name, and the forms of rows that a file may hold."""

# What a file can hold; "auto" tells from the first row's fields.
FORMS = ("auto", "humaneval", "gsm8k", "rows")

# Name, configuration and split on the Hub of what is published there.
HUB: dict[str, tuple[str, str | None, str]] = {
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
