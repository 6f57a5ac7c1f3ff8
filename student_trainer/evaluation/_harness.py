"""The inside of the sandbox: a small server with two limited processes for each program.

Run by `sandbox.py` as a file of its own, in a fresh interpreter without site-packages. Reads one
JSON request a line from stdin and answers one JSON line on stdout.

The *program* runs in one process, its *tests* in another. Arguments and results cross a pipe as
plain data, so the program holds nothing that decides: no verdict, no secret, no test, no object
that the tests touch. What it patches, forges or finds in memory is its own.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

# Audit events of what reaches out of the interpreter, by their beginnings.
_FORBIDDEN = (
    "socket.", "subprocess.", "shutil.", "ctypes.", "pty.", "fcntl.", "ftplib.", "smtplib.",
    "urllib.", "http.", "webbrowser.", "syslog.", "tempfile.", "resource.", "signal.",
    "gc.get_", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.chflags",
    "os.link", "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.removexattr",
    "os.lockf", "os.putenv", "os.unsetenv", "os.startfile", "os.add_dll_directory",
    "sys._current_frames", "sys._current_exceptions", "sys.settrace", "sys.setprofile",
    "mmap.", "sqlite3.", "code.__new__",
)  # fmt: skip
# Of these no event tells.
_SILENT = (
    "chroot", "memfd_create", "mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "setns",
    "unshare",
)  # fmt: skip
_SILENT_MODULES = ("_multiprocessing", "_posixshmem")  # files in /dev/shm


def serve() -> tuple[int, int] | None:
    """Answer all requests. Returns in the process of each program, with its two pipes' ends.

    All that must not be found goes with this frame: what the program sees above it is nothing.
    """
    enclose = _kernel_fence()
    _take_away_what_tells_nothing()
    while True:
        # Begun before the request is read: so its tests are nowhere in the program's memory.
        calls, call = os.pipe()
        answer, answers = os.pipe()
        program = os.fork()
        if program == 0:
            _begin(enclose, calls, answers)
            return calls, answers
        os.close(calls)
        os.close(answers)
        line = sys.stdin.readline()
        if not line:
            return None
        verdict = _judge(json.loads(line), program, call, answer, enclose)
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


def _judge(
    request: dict[str, Any], program: int, call: int, answer: int, enclose: Callable[[], None]
) -> dict[str, Any]:
    readable, report = os.pipe()
    since = time.monotonic()
    tests = os.fork()
    if tests == 0:
        os.close(readable)
        try:
            _begin(enclose, call, answer, report)
            _run_tests(request, call, answer, report)
        finally:
            os._exit(3)
    for end in (call, answer, report):
        os.close(end)
    said = _heard(readable, since + request["timeout"])
    os.close(readable)
    statuses = _end_all(tests, program)
    seconds = time.monotonic() - since
    late = "timeout", "not finished in time"
    if said is None:
        outcome, detail = late
    elif not said:
        outcome, detail = "crashed", f"the tests' process ended with status {statuses[tests]}"
    else:
        outcome, detail = json.loads(said)
        status = statuses[program]
        if outcome == "crashed":
            detail = f"the process ended with status {status}"
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
                outcome, detail = late
    return {"outcome": outcome, "detail": detail, "seconds": seconds}


def _heard(end: int, deadline: float) -> bytes | None:
    """Everything up to the end of the pipe, or None if that does not come in time."""
    said = b""
    while select.select([end], [], [], max(deadline - time.monotonic(), 0.0))[0]:
        data = os.read(end, 4096)
        if not data:
            return said
        said += data
    return None


def _end_all(*running: int) -> dict[int, int]:
    """Kill those and all they began, what left its session too; wait statuses by process id."""
    statuses = {}
    while running:
        for child in running:
            for kill in (os.killpg, os.kill):  # a group of that number, if it has one
                with contextlib.suppress(ProcessLookupError):
                    kill(child, signal.SIGKILL)
            statuses[child] = os.waitpid(child, 0)[1]  # what it began is ours now
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123
                running = tuple(map(int, file.read().split()))
        except FileNotFoundError:  # no Linux
            running = ()
    return statuses


def _begin(enclose: Callable[[], None], *kept: int) -> None:
    """A session of its own behind the fence, and no open file but those."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    enclose()
    for number in range(3, 256):
        if number not in (*kept, sys.stdout.fileno()):
            with contextlib.suppress(OSError):
                os.close(number)


# Fences. The kernel's hold whatever the interpreter is talked into; where it has none, there are
# the limits and the audit hook.


def _kernel_fence() -> Callable[[], None]:
    """What a process calls to see no file but Python's own, to signal nobody, and to die with us.

    And, for this process at once: no network, and orphans of its descendants become its children.
    """
    if sys.platform != "linux":
        return lambda: None
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET
        libc.unshare(0x50000000)  # with CLONE_NEWUSER, for those who are not root
    ruleset = _landlock(libc)
    for name in [n for n in sys.modules if n.split(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]

    def enclose() -> None:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if ruleset >= 0:
            libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
            libc.syscall(446, ruleset, 0)  # landlock_restrict_self

    return enclose


def _landlock(libc: Any) -> int:
    """A ruleset that allows to read Python and shared libraries; −1 where the kernel has none.

    Source: https://docs.kernel.org/userspace-api/landlock.html; its three calls have the same
    numbers on every architecture.
    """
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return -1
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # of files, all there are
    network, scope = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(444, struct.pack("=QQQ", rights, network, scope), size, 0)
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
    for path in (*sys.path, sys.base_prefix + "/lib", *libraries):
        if os.path.exists(path):  # noqa: PTH110
            folder = os.open(path, os.O_PATH)
            allowed = 4 | (8 if os.path.isdir(path) else 0)  # noqa: PTH112, READ_FILE, READ_DIR
            libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, folder), 0)
            os.close(folder)
    return ruleset


def _take_away_what_tells_nothing() -> None:
    for module in (os, sys.modules["posix"], signal, sys.modules["_signal"]):
        for name in _SILENT:
            vars(module).pop(name, None)
    vars(sys).pop("monitoring", None)  # would run in frames of others
    import _posixsubprocess

    subprocesses: Any = _posixsubprocess
    subprocesses.fork_exec = lambda *_: sys.audit("os.posix_spawn")


def _limit(seconds: float, memory_bytes: int) -> None:
    cpu = int(seconds) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _forbid(report: Callable[[str], object]) -> None:
    """Whatever reaches out of the interpreter ends the process on the spot.

    Args:
        report: sends the name of what it was.
    """
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    readable = tuple(path.rstrip("/") + "/" for path in sys.path)
    # Nothing that the program could patch by name.
    prefixes, modules, leave, plus = _FORBIDDEN, _SILENT_MODULES, os._exit, str.__add__
    starts, has, both = str.startswith, str.__contains__, int.__and__
    kind, text, number = type, str, int

    def outside(path: Any) -> bool:
        """Not a file of the standard library, nor one that is open already."""
        if kind(path) is number:
            return False
        if kind(path) is not text:
            return True
        # "<string>" is looked for by the compiler, for the line of a syntax error.
        return not starts(path, (*readable, "<")) or has(path, "/../")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if starts(event, prefixes):
            found = event
        elif event == "open" and arguments[2] and both(arguments[2], writing):
            found = "open for writing"
        elif event == "open" and outside(arguments[0]):
            found = "open of a file outside the standard library"
        elif event == "import" and arguments[0] in modules:
            found = plus("import ", arguments[0])
        else:
            return
        report(found)
        leave(1)

    sys.addaudithook(hook)


# The pipe between the two processes: 8 bytes of length, then JSON.

_LENGTH = struct.Struct("=Q")


def _send(
    end: int,
    body: bytes,
    # Bound here, out of the program's reach.
    write: Any = os.write,
    pack: Any = _LENGTH.pack,
    size: Any = len,
) -> None:
    data = memoryview(pack(size(body)) + body)
    while data:
        data = data[write(end, data) :]


def _receive(end: int) -> Any:
    """The next message, or None when the other side is gone.

    Raises:
        ValueError: that was none.
    """
    head = _read(end, 8)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    if size > 1 << 32:  # would be waited for
        raise ValueError("this is no message")
    data = _read(end, size)
    return None if data is None else json.loads(data)


def _read(end: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part = os.read(end, min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return data


def _encoded(value: Any, depth: int = 0) -> Any:
    """Plain data as JSON; anything else as the plain data that it equals: a Counter is a dict.

    Raises:
        TypeError: there is no such data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
    for kind in (float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if depth < 50:
        if isinstance(value, list):
            return [_encoded(item, depth + 1) for item in value]
        for holder in (tuple, set, frozenset):
            if isinstance(value, holder):
                return {holder.__name__: [_encoded(item, depth + 1) for item in value]}
        if isinstance(value, dict):
            pairs = value.items()
            return {"dict": [[_encoded(k, depth + 1), _encoded(v, depth + 1)] for k, v in pairs]}
    raise TypeError(f"{type(value).__name__} is not plain data")


def _decoded(value: Any) -> Any:
    """What was `_encoded`: data of exactly these types, none of which answers for itself."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, body),) = value.items()
    if kind == "int":
        return int(body, 16)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind in ("complex", "range"):
        return {"complex": complex, "range": range}[kind](*body)
    makers: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}
    return makers[kind](map(_decoded, body))


# The program's side.


def _answer_calls(calls: int, answers: int) -> None:
    """Run the program, then its function as often as the tests ask."""
    request = _receive(calls)
    if request is None:
        return
    _limit(request["timeout"], request["memory_bytes"])

    def tell(event: str, send: Any = _send, encode: Any = str.encode) -> None:
        send(answers, encode('["forbidden", "' + event + '"]'))

    _forbid(tell)
    try:
        program: dict[str, Any] = {"__name__": "program"}
        exec(compile(request["code"], "<program>", "exec"), program)
        function = program[request["entry_point"]]
    except BaseException as error:
        _tell(answers, "raised", type(error).__name__, str(error)[:300])
        return
    _tell(answers, "returned", None, [])
    while (call := _receive(calls)) is not None:
        arguments, options = map(_decoded, call)
        try:
            result = function(*arguments, **options)
            changeable = [a if isinstance(a, list | dict | set) else None for a in arguments]
            said = ("returned", _encoded(result), _encoded(changeable))
        except BaseException as error:
            said = ("raised", type(error).__name__, str(error)[:300])
        _tell(answers, *said)


def _tell(end: int, *message: object) -> None:
    _send(end, json.dumps(message).encode())


# The tests' side.


class _Ended(BaseException):
    """The program is no more; the arguments are outcome and detail. No test catches it."""


def _run_tests(request: dict[str, Any], call: int, answer: int, report: int) -> None:
    _limit(request["timeout"], request["memory_bytes"])
    _forbid(lambda event: os.write(report, json.dumps(["failed", f"the tests: {event}"]).encode()))
    names = ("code", "entry_point", "timeout", "memory_bytes")
    try:
        _ask(call, answer, {name: request[name] for name in names})
        test: dict[str, Any] = {"__name__": "test"}
        try:
            exec(compile(request["context"], "<context>", "exec"), test)
        except SyntaxError:  # a prompt that ends within a function
            test = {"__name__": "test"}
        exec(compile(request["test"], "<test>", "exec"), test)

        def candidate(*arguments: Any, **options: Any) -> Any:
            asked = [_encoded(arguments), _encoded(options)]
            result, after = map(_decoded, _ask(call, answer, asked))
            for mine, theirs in zip(arguments, after, strict=True):
                if isinstance(mine, list):
                    mine[:] = theirs
                elif isinstance(mine, dict | set):
                    mine.clear()
                    mine.update(theirs)
            return result

        test[request["entry_point"]] = candidate  # HumanEval/33 calls it by name
        test["check"](candidate)
    except _Ended as end:
        verdict = end.args
    except MemoryError:
        verdict = "memory", "MemoryError"
    except BaseException as error:
        verdict = "failed", f"{type(error).__name__}: {str(error)[:300]}"
    else:
        verdict = "passed", ""
    os.write(report, json.dumps(verdict).encode())
    os._exit(0)


def _ask(call: int, answer: int, message: object) -> Any:
    """What the program answers; what its function raised is raised here."""
    try:
        _send(call, json.dumps(message).encode())
        said = _receive(answer)
    except BrokenPipeError:
        said = None
    if said is None:
        raise _Ended("crashed", "the process ended")
    kind, *values = said
    if kind == "returned":
        return values
    if kind == "forbidden":
        raise _Ended("forbidden", values[0])
    name, text = values
    if name == "MemoryError":
        raise _Ended("memory", "MemoryError")
    error: Exception = RuntimeError(f"{name}: {text}")
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, Exception):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError wants five arguments
            error = known(text)
    raise error


sys.setrecursionlimit(3000)
ends = serve()
if ends is not None:
    try:
        _answer_calls(*ends)
    finally:
        os._exit(0)
