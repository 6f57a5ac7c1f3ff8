"""A published coder, a student made of half of its layers, and how distilling heals it."""

from shared.idle_threads import sleep_when_idle

sleep_when_idle()  # in both processes, which share the cores
