"""Hostile programs neither pass nor harm; honest ones pass, fast."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from student_trainer.evaluation import sandbox as sandbox_module
from student_trainer.evaluation.sandbox import Program, Sandbox, run_programs

TEST = "def check(candidate):\n    assert candidate(3) == 4\n"
RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=1.0) as sandbox:
        yield sandbox


def program(code, test=TEST, context=""):
    return Program(code, "f", test, context)


HOSTILE = {
    "infinite loop": "while True: pass",
    "infinite loop that catches": (
        "while True:\n    try:\n        while True: pass\n    except: pass"
    ),
    "sleep": "import time\ntime.sleep(60)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork caught": "import os\ntry:\n    os.fork()\nexcept BaseException:\n    pass",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "subprocess": "import subprocess\nsubprocess.run(['touch', '{sentinel}'])",
    "os.system": "import os\nos.system('rm -f {sentinel}')",
    "os.exec": "import os\nos.execv('/bin/true', ['true'])",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {{}})",
    "memory hog": "x = [0] * (10 ** 10)",
    "memory by doubling": "x = b'x'\nwhile True: x += x",
    "huge power": "x = 9 ** 9 ** 9",
    "delete a file": "import os\nos.remove('{sentinel}')",
    "delete by pathlib": "import pathlib\npathlib.Path('{sentinel}').unlink()",
    "delete a tree": "import shutil\nshutil.rmtree('{folder}')",
    "rename": "import os\nos.rename('{sentinel}', '{sentinel}2')",
    "write a file": "open('{folder}/new', 'w').write('x')",
    "append to a file": "open('{sentinel}', 'a').write('x')",
    "write by os.open": "import os\nos.open('{folder}/new', os.O_CREAT | os.O_WRONLY)",
    "make a folder": "import os\nos.mkdir('{folder}/new')",
    "symlink": "import os\nos.symlink('/etc', '{folder}/new')",
    "chmod": "import os\nos.chmod('{sentinel}', 0)",
    "socket": "import socket\nsocket.socket().connect(('127.0.0.1', 80))",
    "urlopen": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
    "name look-up": "import socket\nsocket.getaddrinfo('localhost', 80)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill the group": "import os\nos.killpg(0, 9)",
    "ctypes": "import ctypes\nctypes.CDLL(None).exit(0)",
    "ctypes string at": "import ctypes\nctypes.string_at(0)",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "exit in the function": "def f(x):\n    import os\n    os._exit(0)",
    "raise SystemExit in the function": "def f(x):\n    raise SystemExit(0)",
    "equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef f(x):\n    return Any()"
    ),
    "int that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef f(x):\n    return Any()"
    ),
    "patched builtins": "import builtins\nbuiltins.AssertionError = None\ndef f(x): return 0",
    "patched comparison": (
        "import builtins\nbuiltins.len = builtins.abs = lambda *a: 0\ndef f(x): return 0"
    ),
    "own check": "def check(candidate):\n    pass\ndef f(x):\n    return 0",
    "no assertions": "import sys\nsys.flags = None\n__debug__ = False\ndef f(x): return 0",
    "printed success": "print('passed')\nprint('0' * 32)\ndef f(x): return 0",
    "write to every descriptor": (
        "import os\nfor n in range(64):\n    try: os.write(n, b'passed')\n"
        "    except OSError: pass\n"
        "def f(x): return 0"
    ),
    "close every descriptor": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "read the frames above": (
        "try:\n    raise ValueError\nexcept ValueError as error:\n"
        "    frame = error.__traceback__.tb_frame\n    while frame:\n"
        "        frame.f_locals.get('outcome', []).append('returned')\n"
        "        frame = frame.f_back\n"
        "raise SystemExit"
    ),
    "forge the outcome and answer wrongly": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    if 'outcome' in frame.f_locals: frame.f_locals['outcome'].append('returned')\n"
        "    frame = frame.f_back\ndef f(x): return 0"
    ),
    "frames of other threads": "import sys\nsys._current_frames()",
    "walk all objects": "import gc\nfor thing in gc.get_objects(): str(thing)",
    "trace": "import sys\nsys.settrace(lambda *a: None)",
    "ignore the time limit": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    ),
    "lift the limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "deep recursion": "def f(x):\n    return f(x)",
    "deep nesting": "x = eval('(' * 5000 + ')' * 5000)",
    "threads without end": (
        "import threading\ndef spin():\n    while True: pass\n"
        "for _ in range(8): threading.Thread(target=spin).start()\ndef f(x): return 0"
    ),
    "output flood": "while True: print('x' * 65536)",
    "syntax error": "def f(x) return",
    "null bytes": "x = 1\x00",
    "wrong answer": "def f(x):\n    return 5",
    "no function": "x = 1",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_neither_pass_nor_harm(sandbox, tmp_path: Path, name):
    sentinel = tmp_path / "sentinel"
    sentinel.write_text("here")
    mode = sentinel.stat().st_mode
    code = HOSTILE[name].replace("{sentinel}", str(sentinel)).replace("{folder}", str(tmp_path))
    since = time.monotonic()
    result = sandbox.run(program(code.replace("{{", "{").replace("}}", "}")))
    assert not result.passed, result
    assert time.monotonic() - since < 4.0
    assert sentinel.read_text() == "here"
    assert sentinel.stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["sentinel"]
    assert sandbox.run(program(RIGHT)).passed  # and the sandbox goes on


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("infinite loop", "timeout"),
        ("memory hog", "memory"),
        ("socket", "forbidden"),
        ("write a file", "forbidden"),
        ("wrong answer", "failed"),
        ("os._exit", "crashed"),
    ],
)
def test_the_outcome_says_what_happened(sandbox, tmp_path, name, outcome):
    code = HOSTILE[name].replace("{folder}", str(tmp_path))
    assert sandbox.run(program(code)).outcome == outcome


def test_nothing_is_left_running():
    with Sandbox(timeout=0.5) as sandbox:
        sandbox.run(program(HOSTILE["threads without end"]))
        server = sandbox._process.pid
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        assert children == []
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_honest_programs_pass(sandbox):
    assert sandbox.run(program("import math, re, collections\n" + RIGHT)).passed


def test_the_test_may_use_helpers_of_the_context(sandbox):
    context = "def twice(x):\n    return 2 * x\n\ndef f(x):\n    '''To do.'''\n"
    test = "def check(candidate):\n    assert candidate(2) + 1 == twice(2)\n"
    assert sandbox.run(program(RIGHT, test, context)).passed


def test_results_come_back_in_order():
    programs = [program(f"def f(x):\n    return {4 if i % 3 else 5}\n") for i in range(30)]
    results = run_programs(programs, workers=3)
    assert [result.passed for result in results] == [bool(i % 3) for i in range(30)]


def test_no_programs_give_no_results():
    assert run_programs([]) == []


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/usr/bin/python3").exists(),
    reason="only root can become another user; needs a Python that others may run",
)
def test_programs_run_for_users_other_than_root():
    harness = sandbox_module._HARNESS.read_text()
    request = {"code": RIGHT, "entry_point": "f", "test": TEST, "context": "", "timeout": 5.0,
               "memory_bytes": 512 << 20}  # fmt: skip
    fork = request | {"code": "import os\nos.fork()\n" + RIGHT}
    lines = "".join(json.dumps(one) + "\n" for one in (request, fork))
    done = subprocess.run(
        ["setpriv", "--reuid=12345", "--clear-groups", "/usr/bin/python3", "-I", "-S", "-c",
         harness],
        input=lines, capture_output=True, text=True, cwd="/", check=True,
    )  # fmt: skip
    outcomes = [json.loads(line)["outcome"] for line in done.stdout.splitlines()]
    assert outcomes == ["passed", "forbidden"]


def test_a_machine_on_which_nothing_runs_is_no_model_that_solves_nothing():
    with pytest.raises(RuntimeError, match="the sandbox cannot run programs here"):
        Sandbox(memory_bytes=1 << 20)
