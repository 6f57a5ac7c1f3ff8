"""Work in the background does not outlive the process badly."""

import subprocess
import sys

WORK = """
import time, torch
from student_trainer.threads import in_thread

def work():
    until = time.monotonic() + 1
    while time.monotonic() < until:
        torch.randn(100_000).sort()

in_thread(work, name="work")
time.sleep(0.2)
"""


def test_a_process_ends_well_while_a_thread_computes():
    ended = subprocess.run(
        [sys.executable, "-c", WORK], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")
