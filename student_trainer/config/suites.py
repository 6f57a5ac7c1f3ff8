"""The suites that `evaluate` knows by name, and the forms of rows that a file may hold."""

# Forms of rows; "auto" is found out from the first row's fields.
FORMS = ("auto", "humaneval", "gsm8k", "rows")

# Name, configuration and split of the suites that are on the Hub.
HUB: dict[str, tuple[str, str | None, str]] = {
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
