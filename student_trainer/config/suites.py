"""The suites that `evaluate` knows by name, and the forms of rows that a file may hold."""

from __future__ import annotations

from student_trainer.config.arguments import DatasetArguments

# Forms of rows; "auto" is found out from the first row's fields.
FORMS = ("auto", "humaneval", "gsm8k", "rows")

# Name, configuration and split of the suites that are on the Hub.
HUB: dict[str, tuple[str, str | None, str]] = {
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}


def where_from(dataset: DatasetArguments, suite: str) -> tuple[str, str | None, str, str]:
    """Return name, configuration, split and form of the rows, which ``--suite`` may name alone."""
    config, split = dataset.dataset_config, dataset.dataset_split
    if dataset.dataset_name:
        return dataset.dataset_name[0], config, split, suite
    if suite in HUB:
        return *HUB[suite], suite
    return suite, config, split, "auto"
