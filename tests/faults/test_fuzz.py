"""The readers of bytes from the network, under a coverage-guided fuzzer."""

import re
import subprocess
import sys

import pytest

RUNS = 20_000


def test_no_bytes_break_what_reads_them():
    """A small budget of new inputs; `tests/faults/fuzz_wire.py` says how to spend a large one."""
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 alone")
    command = [sys.executable, "-m", "tests.faults.fuzz_wire", f"-runs={RUNS}"]
    # By a shell: the peak memory that the fuzzer bounds is, for a child, that of these tests too.
    command = ["sh", "-c", '"$@"; exit $?', "fuzzer", *command]
    fuzzer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert fuzzer.returncode == 0, fuzzer.stdout + fuzzer.stderr
    assert f"Done {RUNS} runs" in fuzzer.stderr
    growth = [float(ratio) for ratio in re.findall(r"memory ([\d.]+)", fuzzer.stdout)]
    assert growth[-1] < 1.2
