"""Two recipes in which the teacher sees more than the student: a solution, and a system prompt."""

from shared.idle_threads import sleep_when_idle

sleep_when_idle()  # in both processes, which share the cores
