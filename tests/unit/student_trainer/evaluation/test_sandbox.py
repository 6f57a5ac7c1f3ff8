"""Hostile programs neither pass nor harm; honest ones pass, fast."""

import ctypes
import os
import shutil
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from student_trainer.evaluation import _fences
from student_trainer.evaluation import sandbox as sandbox_module
from student_trainer.evaluation.sandbox import Program, Sandbox, SandboxResult, run_programs

TIMEOUT = 2.0  # of programs that never end
PATIENCE = 60.0  # of others, which may have to wait for the machine
TEST = "def check(candidate):\n    assert candidate(3) == 4\n"
RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=PATIENCE) as sandbox:
        yield sandbox


def program(code, test=TEST, context=""):
    return Program(code, "f", test, context)


# What each is stopped by; none is stopped by luck.
HOSTILE = {
    "timeout": {
        "infinite loop": 'while True: pass',
        "infinite loop that catches": (
            'while True:\n'
            '    try:\n'
            '        while True: pass\n'
            '    except: pass'
        ),
        "sleep": 'import time\ntime.sleep(60)',
        "huge power": 'x = 9 ** 9 ** 9',
        "patched comparison": (
            'import builtins\n'
            'builtins.len = builtins.abs = lambda *a: 0\n'
            'def f(x): return 0'
        ),
        "ignore the time limit": (
            'import signal\n'
            'signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n'
            'while True: pass'
        ),
        "output flood": "while True: print('x' * 65536)",
        "ignore SIGTERM and sleep": (
            'import signal, time\n'
            'for n in range(1, 32):\n'
            '    try: signal.signal(n, signal.SIG_IGN)\n'
            '    except OSError: pass\n'
            'time.sleep(60)'
        ),
        "message without end": (
            'import __main__, os\n'
            '__main__._tell = lambda end, *_: os.write(end, b"\\xff\\0\\0\\0\\0\\0\\0\\0[")\n'
            'def f(x): return 0'
        ),
        "list without end": (
            'class Endless(list):\n'
            '    def __iter__(self):\n'
            '        while True: yield 0\n'
            'def f(x): return Endless()'
        ),
        "result that unfolds": (
            'def f(x):\n'
            '    a = [0]\n'
            '    for _ in range(40): a = [a, a]\n'
            '    return a'
        ),
        "backtracking": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
        "lock without end": (
            'import threading\n'
            'lock = threading.Lock()\n'
            'lock.acquire()\n'
            'lock.acquire()'
        ),
    },
    "memory": {
        "memory hog": 'x = [0] * (10 ** 10)',
        "memory by doubling": "x = b'x' * (1 << 26)\nwhile True: x += x",
        "result too large": 'def f(x): return [0] * 10 ** 9',
    },
    "forbidden": {
        "fork bomb": 'import os\nwhile True: os.fork()',
        "fork caught": 'import os\ntry:\n    os.fork()\nexcept BaseException:\n    pass',
        "subprocess": "import subprocess\nsubprocess.run(['touch', '{sentinel}'])",
        "os.system": "import os\nos.system('rm -f {sentinel}')",
        "os.exec": "import os\nos.execv('/bin/true', ['true'])",
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
        "kill the parent": 'import os\nos.kill(os.getppid(), 9)',
        "kill the group": 'import os\nos.killpg(0, 9)',
        "ctypes": 'import ctypes\nctypes.CDLL(None).exit(0)',
        "ctypes string at": 'import ctypes\nctypes.string_at(0)',
        "frames of other threads": 'import sys\nsys._current_frames()',
        "walk all objects": 'import gc\nfor thing in gc.get_objects(): str(thing)',
        "trace": 'import sys\nsys.settrace(lambda *a: None)',
        "lift the limits": 'import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))',
        "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "double fork into another session": (
            'import os\n'
            'if os.fork() == 0:\n'
            '    os.setsid()\n'
            '    if os.fork() == 0:\n'
            '        while True: pass'
        ),
        "fork in the function": 'def f(x):\n    import os\n    return 4 if os.fork() else 0',
        "forkpty": 'import os\nos.forkpty()',
        "shared memory": (
            'import _posixshmem, os\n'
            "_posixshmem.shm_open('/sandbox-escaped', os.O_CREAT | os.O_RDWR, 0o600)"
        ),
        "read a file": "raise ValueError(open('{sentinel}').read())",
        "read by a winding path": (
            'import os\n'
            "open(os.__file__ + '/../../../../../../../..{sentinel}').read()"
        ),
        "read the parent's environment": (
            'import os\n'
            "raise ValueError(open(f'/proc/{os.getppid()}/environ').read())"
        ),
        "search the memory": "open('/proc/self/mem', 'rb').seek(0)",
        "mode of an open file": 'import os\nos.fchmod(0, 0)',
        "delete the working directory": 'import os\nos.rmdir(os.getcwd())',
        "temporary file": 'import tempfile\ntempfile.NamedTemporaryFile()',
        "grow an open file": 'import os\nos.ftruncate(0, 1 << 40)',
        "sqlite": "import sqlite3\nsqlite3.connect('{folder}/new')",
        "debugger": 'breakpoint()',
        "server": "import http.server\nhttp.server.HTTPServer(('', 0), None)",
    },
    "crashed": {
        "os._exit": 'import os\nos._exit(0)',
        "exit in the function": 'def f(x):\n    import os\n    os._exit(0)',
        "close every descriptor": 'import os\nos.closerange(0, 64)\ndef f(x): return 0',
        "alarm": 'import signal\nsignal.alarm(1)\nwhile True: pass',
        "abort": 'import os\nos.abort()',
        "kill itself": 'import _signal\n_signal.raise_signal(9)',
        "segmentation fault": 'import faulthandler\nfaulthandler._sigsegv()',
        "recursion without a limit": (
            'import sys\n'
            'sys.setrecursionlimit(10 ** 9)\n'
            'class A:\n'
            '    def __repr__(self): return repr(self)\n'
            'repr(A())'
        ),
        "object smuggled past the harness": (
            'import __main__\n'
            '__main__._encoded = lambda value: value\n'
            'class Any:\n'
            '    def __eq__(self, other): return True\n'
            'def f(x): return Any()'
        ),
    },
    "failed": {
        "multiprocessing": (
            'import multiprocessing\n'
            'multiprocessing.Process(target=print).start()'
        ),
        "spawn without the subprocess module": (
            'import multiprocessing.util as u\n'
            "u.spawnv_passfds(b'/bin/touch', [b'touch', b'{folder}/new'], [])"
        ),
        "sys.exit": 'import sys\nsys.exit(0)',
        "raise SystemExit in the function": 'def f(x):\n    raise SystemExit(0)',
        "equal to everything": (
            'class Any:\n'
            '    def __eq__(self, other): return True\n'
            'def f(x):\n'
            '    return Any()'
        ),
        "int that equals everything": (
            'class Any(int):\n'
            '    def __eq__(self, other): return True\n'
            'def f(x):\n'
            '    return Any()'
        ),
        "patched builtins": 'import builtins\nbuiltins.AssertionError = None\ndef f(x): return 0',
        "no assertions": 'import sys\nsys.flags = None\n__debug__ = False\ndef f(x): return 0',
        "printed success": "print('passed')\nprint('0' * 32)\ndef f(x): return 0",
        "write to every descriptor": (
            'import os\n'
            'for n in range(64):\n'
            "    try: os.write(n, b'passed')\n"
            '    except OSError: pass\n'
            'def f(x): return 0'
        ),
        "deep recursion": 'def f(x):\n    return f(x)',
        "deep nesting": "x = eval('(' * 5000 + ')' * 5000)",
        "threads without end": (
            'import threading\n'
            'def spin():\n'
            '    while True: pass\n'
            'for _ in range(2): threading.Thread(target=spin).start()\n'
            'def f(x): return 0'
        ),
        "syntax error": 'def f(x) return',
        "null bytes": 'x = 1\x00',
        "wrong answer": 'def f(x):\n    return 5',
        "no function": 'x = 1',
        "named pipe": "import os\nos.mkfifo('{folder}/new')",
        "signal by descriptor": (
            'import os, signal\n'
            'signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)'
        ),
        "read the environment": (
            'import os\n'
            'def f(x):\n'
            "    return 4 if 'TEACHER_API_KEY' in os.environ else 0"
        ),
        "atexit": 'import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0',
        "own check": 'def check(candidate):\n    pass\ndef f(x):\n    return 0',
        "AssertionError that is none": (
            'import builtins\n'
            'class Quiet(AssertionError):\n'
            '    def __new__(cls, *a): builtins.quit()\n'
            'builtins.AssertionError = Quiet\n'
            'def f(x): assert x == 4; return 0'
        ),
        "tests in the frames above": (
            'import sys\n'
            'def f(x):\n'
            '    frame = sys._getframe()\n'
            '    while frame:\n'
            '        for scope in (frame.f_locals, frame.f_globals):\n'
            '            for value in scope.values():\n'
            "                if 'assert ' 'candidate' in str(value): return 4\n"
            '        frame = frame.f_back'
        ),
        "words of the harness": (
            'import __main__\n'
            '__main__._run_tests = __main__._ask = __main__.serve = lambda *a: 4\n'
            'def f(x): return 0'
        ),
        "message smuggled past the harness": (
            'import __main__\n'
            '__main__._encoded = lambda value: {"object": ["os.system", "touch {folder}/new"]}\n'
            'def f(x): return 0'
        ),
        "flood of every descriptor": (
            'import os\n'
            'def f(x):\n'
            '    while True:\n'
            '        for n in range(64):\n'
            "            try: os.write(n, b'\\xff' * 65536)\n"
            '            except OSError: pass'
        ),
        "verdict on every descriptor": (
            'import os\n'
            'for n in range(64):\n'
            '    try: os.write(n, b\'["passed", ""]\')\n'
            '    except OSError: pass\n'
            'def f(x): return 0'
        ),
        "finalizers": (
            'import gc, os, sys\n'
            'class A:\n'
            '    def __del__(self):\n'
            '        for n in range(64):\n'
            '            try: os.write(n, b\'["passed", ""]\')\n'
            '            except OSError: pass\n'
            'gc.set_threshold(1)\n'
            'def f(x):\n'
            '    a = A()\n'
            '    a.a = a\n'
            '    return 0'
        ),
        "equality without end": (
            'class Slow(int):\n'
            '    def __eq__(self, other):\n'
            '        while True: pass\n'
            '    __hash__ = None\n'
            'def f(x): return Slow(0)'
        ),
        "generator without end": 'def f(x):\n    while True: yield 4',
        "list of itself": 'def f(x):\n    a = []\n    a.append(a)\n    return a',
        "huge digits": 'def f(x): return str(10 ** 10 ** 5)',
        "standard input": 'def f(x): return int(input())',
        "modules cleared": 'import sys\nsys.modules.clear()\ndef f(x): return 0',
    },
}  # fmt: skip
NAMED = {name: code for group in HOSTILE.values() for name, code in group.items()}
OUTCOMES = {name: outcome for outcome, group in HOSTILE.items() for name in group}


@dataclass(frozen=True)
class Ran:
    """Return how a hostile program ended, and the folder that it was to harm."""

    result: SandboxResult
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All of them, several at a time."""
    folders = [tmp_path_factory.mktemp("folder") for _ in NAMED]
    programs = {}
    for folder, (name, code) in zip(folders, NAMED.items(), strict=True):
        sentinel = folder / "sentinel"
        sentinel.write_text("here")
        sentinel.chmod(0o640)
        code = code.replace("{sentinel}", str(sentinel)).replace("{folder}", str(folder))
        programs[name] = program(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_API_KEY", "secret")
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("sandboxes")))
        before = set(psutil.Process().children(recursive=True))
        results = {}
        for timeout in (TIMEOUT, PATIENCE):
            names = [n for n in NAMED if (OUTCOMES[n] == "timeout") == (timeout == TIMEOUT)]
            found = run_programs([programs[n] for n in names], timeout=timeout, workers=4)
            results |= zip(names, found, strict=True)
        assert set(psutil.Process().children(recursive=True)) <= before
        assert os.listdir(tempfile.gettempdir()) == []  # noqa: PTH208
    return {name: Ran(results[name], folder) for name, folder in zip(NAMED, folders, strict=True)}


@pytest.mark.parametrize("name", NAMED)
def test_hostile_programs_neither_pass_nor_harm(ran, name):
    result, folder = ran[name].result, ran[name].folder
    assert result.outcome == OUTCOMES[name], result
    assert result.outcome != "timeout" or TIMEOUT <= result.seconds < 10 * TIMEOUT
    assert [path.name for path in folder.iterdir()] == ["sentinel"]
    assert (folder / "sentinel").read_text() == "here"
    assert stat.S_IMODE((folder / "sentinel").stat().st_mode) == 0o640
    assert "secret" not in result.detail


def landlock() -> bool:
    """Return whether this kernel fences files."""
    return ctypes.CDLL(None).syscall(444, None, 0, 1) >= 6


REACHING = (
    "delete a file", "write a file", "read a file", "search the memory", "named pipe", "socket",
    "read the parent's environment", "kill the parent", "signal by descriptor", "shared memory",
    "symlink", "sqlite", "subprocess", "spawn without the subprocess module",
)  # fmt: skip


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock with signals")
def test_the_kernel_alone_holds_where_the_interpreter_does_not(tmp_path, monkeypatch):
    """Each of them, followed by a right answer, without the audit hook."""
    harness = sandbox_module._HARNESS.read_text()
    for line in ("    sys.addaudithook(hook)\n", "    _remove_silent_functions()\n"):
        assert harness.count(line) == 1
        harness = harness.replace(line, "")
    shutil.copy(_fences.__file__, tmp_path / "_fences.py")
    monkeypatch.setattr(sandbox_module, "_HARNESS", tmp_path / "harness.py")
    sandbox_module._HARNESS.write_text(harness)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "sentinel").write_text("here")
    for name in REACHING:
        code = NAMED[name].replace("{sentinel}", str(folder / "sentinel"))
        with Sandbox(timeout=TIMEOUT) as sandbox:
            result = sandbox.run(program(code.replace("{folder}", str(folder)) + "\n" + RIGHT))
            assert sandbox.run(program(RIGHT)).passed
        assert result.outcome in ("failed", "memory"), (name, result)
        assert [path.name for path in folder.iterdir()] == ["sentinel"]
        assert (folder / "sentinel").read_text() == "here"


def test_what_left_its_session_is_found_and_killed(tmp_path, monkeypatch):
    """Only where no fence holds: then a program can fork."""
    harness = sandbox_module._HARNESS.read_text().replace("    sys.addaudithook(hook)\n", "")
    for fence, none in (
        ("_fences.make_fence(libc)", "no_fence, []"),
        ("_fences.become_unused_user()", "[]"),  # root is not bound by the limit of processes
    ):
        assert harness.count(fence) == 1
        harness = harness.replace(fence, none)
    shutil.copy(_fences.__file__, tmp_path / "_fences.py")
    monkeypatch.setattr(sandbox_module, "_HARNESS", tmp_path / "harness.py")
    sandbox_module._HARNESS.write_text(harness)
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    code += "        time.sleep(60)\n    os._exit(0)\nos.wait()\n" + RIGHT
    if os.geteuid() != 0:
        pytest.skip("only root gets round the limit of processes")
    with Sandbox() as sandbox:
        server = psutil.Process(sandbox._process.pid)
        assert sandbox.run(program(code)).passed
        assert len(server.children(recursive=True)) <= 3  # what waits for the next program
    assert not server.is_running()


def test_nothing_is_left_running_by_a_sandbox_that_is_closed_meanwhile():
    sandbox = Sandbox(timeout=60)
    server = psutil.Process(sandbox._process.pid)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(sandbox.run, program(NAMED["ignore SIGTERM and sleep"]))
        while len(server.children(recursive=True)) < 3:
            time.sleep(0.01)
        children = server.children(recursive=True)
        server.kill()
        assert isinstance(running.exception(), RuntimeError)
    sandbox.close()
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_a_program_cannot_patch_the_modules_of_the_tests(sandbox):
    test = "import math\ndef check(f):\n    assert math.fabs(f(3) - 4) < 1e-6\n"
    patched = "import math\nmath.fabs = lambda x: 0.0\ndef f(x): return 0"
    assert not sandbox.run(program(patched, test)).passed
    assert sandbox.run(program(RIGHT, test)).passed


@pytest.mark.parametrize(
    ("code", "assertions"),
    [
        ("from collections import Counter\ndef f(x): return Counter(x)", "f('aa') == {'a': 2}"),
        ("import time\ndef f(x): return time.struct_time(x)", "f(range(9)) == tuple(range(9))"),
        ("def f(x): return {x, 1j}, [None, True, b'x', frozenset([x])]",
         "f(2) == ({2, 1j}, [None, True, b'x', frozenset([2])])"),
        ("def f(x, *, y): return x * y", "f(2, y=1 << 70) == 1 << 71"),
        ("import math\ndef f(x): return [math.inf, -0.0]", "str(f(1)) == '[inf, -0.0]'"),
        ("def f(x): return x if x < 2 else x * f(x - 1)", "f(900) > f(800)"),
        ("import hashlib\ndef f(x): return hashlib.md5(x).hexdigest()", "len(f(b'x')) == 32"),
    ],
)  # fmt: skip
def test_results_reach_the_tests_as_what_they_equal(sandbox, code, assertions):
    result = sandbox.run(program(code, f"def check(f):\n    assert {assertions}\n"))
    assert result.passed, result


def test_what_is_changed_in_place_is_changed_for_the_tests(sandbox):
    code = "def f(a, b, c):\n    a.sort()\n    b['x'] = 1\n    c.add(3)\n"
    test = "def check(f):\n    a, b, c = [2, 1], {}, {1}\n    assert f(a, b, c) is None\n"
    test += "    assert (a, b, c) == ([1, 2], {'x': 1}, {1, 3})\n"
    result = sandbox.run(program(code, test))
    assert result.passed, result


def test_the_tests_may_expect_an_error(sandbox):
    test = "def check(f):\n    try:\n        f(-1)\n    except ValueError as error:\n"
    test += "        assert str(error) == 'below'\n    else:\n        assert False\n"
    assert sandbox.run(program("def f(x):\n    raise ValueError('below')", test)).passed
    assert not sandbox.run(program("def f(x):\n    raise TypeError('below')", test)).passed
    assert not sandbox.run(program(RIGHT, test)).passed


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


def test_a_machine_on_which_nothing_runs_is_no_model_that_solves_nothing():
    with pytest.raises(RuntimeError, match="the sandbox cannot run programs here"):
        Sandbox(memory_bytes=1 << 20)
