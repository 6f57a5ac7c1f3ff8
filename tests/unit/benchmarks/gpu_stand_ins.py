"""Parts of `benchmarks.gpu` that end as parts can end."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_parts import NotHereError


def counts(device, *, rows):
    for number in range(rows):
        yield {"number": number, "device": device}


def fails(device):
    yield {"number": 0}
    raise ValueError("a reason\nand more")


def lacks(device):
    raise NotHereError("No module named 'this'")
    yield


def crashes(device):
    yield {"number": 0}
    os._exit(9)


def hangs(device, *, file):
    """Start a process that hangs too, and leave its number in a file."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(file).write_text(str(child.pid))
    yield {"number": 0}
    time.sleep(60)
