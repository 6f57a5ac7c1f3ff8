"""The embedded experiment: a HumanEval in miniature, with its tokenizer, models and data."""

from shared.idle_threads import sleep_when_idle

sleep_when_idle()  # in both processes, which share the cores
