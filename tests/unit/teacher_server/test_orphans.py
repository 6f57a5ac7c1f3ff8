"""A process that the server's process started ends with it, and so does what that one started."""

import signal
import subprocess
import sys

import psutil

# As `python -m teacher_server` and the installed command do: the main module imports the cli.
MAIN = """
import multiprocessing
import sys
import time

import teacher_server.cli


def sleep(generations):
    if generations:
        multiprocessing.get_context("spawn").Process(target=sleep, args=(generations - 1,)).start()
    print(generations, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    sleep(2)
"""


def test_children_and_their_children_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert sorted(server.stdout.readline().strip() for _ in range(3)) == ["0", "1", "2"]
            family = psutil.Process(server.pid).children(recursive=True)
            assert sum("spawn_main" in " ".join(one.cmdline()) for one in family) == 2
        finally:
            server.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=20)[1] == []
