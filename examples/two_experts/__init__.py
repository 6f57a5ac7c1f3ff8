"""Two expert teachers, of programs and of word problems, and a student that learns from both."""

from shared.idle_threads import sleep_when_idle

sleep_when_idle()  # in both processes, which share the cores
