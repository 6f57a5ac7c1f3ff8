"""Work in the background does not outlive the process badly."""

import os
import subprocess
import sys

import pytest

from student_trainer.runtime import threads

COMPUTES = """
import threading, time, torch
from student_trainer.runtime.threads import in_thread, end_process

def work():
    until = time.monotonic() + 1
    while time.monotonic() < until:
        torch.randn(100_000).sort()
"""
OURS = "in_thread(work, name='work'); time.sleep(0.2)"
OF_A_LIBRARY = "threading.Thread(target=work, daemon=True).start(); time.sleep(0.2)"
ENDS = """
import atexit
atexit.register(print, "last words")
print("a line, and no end of it", end=" ")
end_process(3)
"""


def run(program, **environment):
    # Gloo's threads abort a process as these do, only now and then.
    return subprocess.run(
        [sys.executable, "-c", COMPUTES + program],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip


def test_a_process_ends_well_while_a_thread_computes():
    ended = run(OURS)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("thread", [OURS, OF_A_LIBRARY, ""])
def test_a_rank_ends_with_its_exit_code_whatever_threads_do(thread):
    ended = run(thread + ENDS, LOCAL_RANK="0")
    assert ended.stderr == ""
    assert (ended.returncode, ended.stdout) == (3, "a line, and no end of it last words\n")


def test_gloos_threads_are_waited_for_until_they_sleep(monkeypatch):
    states = iter([["R", "S"], ["S", "S"], ["D", "S"], *[["S", "S"]] * 5, ["never looked at"]])
    monkeypatch.setattr(threads, "_gloo_states", lambda: next(states))
    threads.wait_for_gloo()
    assert next(states) == ["never looked at"]


def test_gloos_threads_are_known_by_their_name():
    assert run_gloo("print(threads._gloo_states(), end=' '); threads.wait_for_gloo()") == (
        "[] ['S', 'S'] idle"
    )


def run_gloo(program):
    """Return what a process prints that has a Gloo group of its own."""
    code = (
        "import tempfile, time, torch, torch.distributed as dist\n"
        "from student_trainer.runtime import threads\n"
        "threads.wait_for_gloo()\n"
        "print(threads._gloo_states(), end=' ')\n"
        "file = tempfile.mkdtemp() + '/store'\n"
        "dist.init_process_group('gloo', init_method='file://' + file, rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(1))\n"
        "time.sleep(0.5)\n"
        f"{program}\n"
        "print('idle')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()
