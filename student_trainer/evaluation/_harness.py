"""The inside of the sandbox: a small server with two limited processes for each program.

Run by `sandbox.py` as a file of its own, in a fresh interpreter without site-packages. The first
line on stdout tells which fences there are; then one JSON line on stdin is a request, and one on
stdout its verdict.

The *server* reads requests and gives verdicts. Its one child, the *zygote*, is told to fork and
sees neither tests nor code; for each request it forks the *program* and its *tests*, which get
theirs by pipes of their own. So the program shares no history with anything but an empty
interpreter. Arguments and results cross a pipe as plain data: the program holds nothing that
decides, no verdict, no secret, no test, no object that the tests touch.
"""

from __future__ import annotations

import _socket
import builtins
import contextlib
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
import _fences  # type: ignore[import-not-found]

del sys.path[0]

# Prefixes of the audit events that reach out of the interpreter.
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
# Functions that reach out of the interpreter and raise no audit event.
_SILENT = (
    "chroot", "memfd_create", "mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "setns",
    "unshare",
)  # fmt: skip
_SILENT_MODULES = ("_multiprocessing", "_posixshmem")  # they make files in /dev/shm


_PROGRAM, _TESTS, _END = b"p", b"t", b"e"  # commands to the zygote


# The server.


def serve(seconds: float, memory_bytes: int, *, unsafe: bool) -> None:
    """Answer all requests, if the fences hold or ``unsafe`` is set."""

    def limit() -> None:
        _fences.limit(seconds, memory_bytes)

    control = _start_zygote(limit, unsafe=unsafe)
    state = control.recv(1 << 16)
    _write_line(json.loads(state or b'{"held": [], "missing": ["any (the zygote ended)"]}'))
    while state:
        calls, call = os.pipe()
        answer, answers = os.pipe()
        requests, request = os.pipe()
        readable, report = os.pipe()
        # Forked before the request comes, so that it need not wait for the fork.
        _send_ends(control, _PROGRAM, calls, answers)
        _send_ends(control, _TESTS, requests, call, answer, report)
        line = sys.stdin.readline()
        if not line:
            return
        _write_line(_judge(line, request, readable, control, seconds))


def _write_line(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _judge(
    line: str, request: int, readable: int, control: _socket.socket, timeout: float
) -> dict[str, Any]:
    since = time.monotonic()
    with contextlib.suppress(BrokenPipeError):
        _send(request, line.encode())
    os.close(request)
    said = _read_to_end(readable, since + timeout)
    os.close(readable)
    control.send(_END)
    program, tests = struct.unpack("=ii", control.recv(8))
    seconds = time.monotonic() - since
    late = "timeout", "not finished in time"
    if said is None:
        outcome, detail = late
    elif not said:
        outcome, detail = "crashed", f"the tests' process ended with status {tests}"
    else:
        outcome, detail = json.loads(said)
        if outcome == "crashed":
            detail = f"the process ended with status {program}"
            if os.WIFSIGNALED(program) and os.WTERMSIG(program) == signal.SIGXCPU:
                outcome, detail = late
    # Control characters and lone surrogates are replaced, because terminals and files get the text.
    detail = "".join(c if c.isprintable() else " " for c in detail)
    return {"outcome": outcome, "detail": detail, "seconds": seconds}


def _read_to_end(end: int, deadline: float) -> bytes | None:
    """Return everything up to the end of the pipe, or None if that does not come in time."""
    said = b""
    while select.select([end], [], [], max(deadline - time.monotonic(), 0.0))[0]:
        data = os.read(end, 4096)
        if not data:
            return said
        said += data
    return None


def _send_ends(control: _socket.socket, kind: bytes, *ends: int) -> None:
    """Tell the zygote to fork a process that holds these descriptors, and close them here."""
    rights = struct.pack(f"={len(ends)}i", *ends)
    control.sendmsg([kind], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    for end in ends:
        os.close(end)


# The zygote.


def _start_zygote(limit: Callable[[], None], *, unsafe: bool) -> _socket.socket:
    """Fork the zygote, in new namespaces where that is allowed; return its control socket."""
    held, missing = [], []
    libc = None
    try:
        if sys.platform != "linux":
            raise _fences.MissingFenceError(
                f"any ({sys.platform} has no fences that this sandbox knows)"
            )
        libc = _fences.load_libc()
        held = _fences.separate(libc)
    except _fences.MissingFenceError as error:
        missing.append(str(error))
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            ours.close()
            for number in (0, 1):  # stdin and stdout are the server's
                _redirect_to_null(number)
            _run_zygote(theirs, libc, limit, held, missing, unsafe=unsafe)
        finally:
            os._exit(0)
    theirs.close()
    return ours


def _run_zygote(
    control: _socket.socket,
    libc: Any,
    limit: Callable[[], None],
    held: list[str],
    missing: list[str],
    *,
    unsafe: bool,
) -> None:
    """Fork programs and tests, and end them, as the server commands, until it is gone."""

    def no_fence() -> None:
        pass

    enclose: Callable[[], None] = no_fence
    kept: list[int] = []
    if libc is not None:
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        try:
            enclose, kept = _fences.make_fence(libc)
        except _fences.MissingFenceError as error:
            missing.append(str(error))
        root = os.geteuid() == 0
        kept += _fences.become_unused_user()
        held += ["user id"] if root and os.geteuid() != 0 else []
        try:
            held += _fences.drop_privileges(libc)
        except _fences.MissingFenceError as error:
            missing.append(str(error))
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, which a new user id clears
        if not missing and (fault := _probe_fence(enclose)):
            missing.append(fault)
        if not missing:
            held += ["Landlock", "seccomp"]
    control.send(json.dumps({"held": held, "missing": missing}).encode())
    if missing and not unsafe:
        return
    _remove_silent_functions()
    for name in [n for n in sys.modules if n.split(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    running: list[int] = []
    while True:
        kind, rights, _, _ = control.recvmsg(1, _socket.CMSG_LEN(64))
        if not kind:
            return
        if kind == _END:
            control.send(struct.pack("=ii", *_end_all(running)))
            running = []
            continue
        ends = struct.unpack(f"={len(rights[0][2]) // 4}i", rights[0][2])
        child = os.fork()
        if child == 0:
            try:
                _begin(limit, *ends, *kept)
                try:
                    enclose()
                except _fences.MissingFenceError:
                    if not unsafe:
                        raise
                (_answer_calls if kind == _PROGRAM else _run_tests)(*ends)
            finally:
                os._exit(3 if kind == _TESTS else 0)
        running.append(child)
        for end in ends:
            os.close(end)


def _probe_fence(enclose: Callable[[], None]) -> str:
    """Try the fence in a child; return what is missing of it, "" when it holds."""
    readable, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            enclose()
            os.write(report, b"held")
        except _fences.MissingFenceError as error:
            os.write(report, str(error).encode())
        finally:
            os._exit(0)
    os.close(report)
    said = os.read(readable, 4096).decode()
    os.close(readable)
    os.waitpid(child, 0)
    return "" if said == "held" else said or "seccomp (a process behind it cannot run)"


def _end_all(running: list[int]) -> list[int]:
    """Kill these processes and all their descendants; return their wait statuses."""
    statuses = []
    for child in running:
        for kill in (os.killpg, os.kill):  # its process group, if it has one
            with contextlib.suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)
        statuses.append(os.waitpid(child, 0)[1])  # its children are this process's now
    # Without the fence, which lets no process begin, there may be orphans.
    with contextlib.suppress(ChildProcessError):
        while True:
            for orphan in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(orphan, signal.SIGKILL)
            os.waitpid(-1, 0)
    return statuses


def _children() -> list[int]:
    if os.getpid() == 1:  # in a process namespace -1 means all processes but this one
        return [-1]
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123
            return list(map(int, file.read().split()))
    except OSError:  # no Linux
        return []


def _redirect_to_null(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, number)
    os.close(nothing)


def _begin(limit: Callable[[], None], *kept: int) -> None:
    """Begin a session of its own within the limits, with only these files open."""
    os.setsid()
    for number in (0, 1, 2):
        _redirect_to_null(number)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    limit()
    since = 3
    for number in sorted((*kept, sys.stdout.fileno())):
        os.closerange(since, number)
        since = number + 1
    os.closerange(since, 1024)


# The audit hook, which names what a program tried before the kernel refuses it.


def _remove_silent_functions() -> None:
    for module in (os, sys.modules["posix"], signal, sys.modules["_signal"]):
        for name in _SILENT:
            vars(module).pop(name, None)
    vars(sys).pop("monitoring", None)  # would run in the frames of other code
    import _posixsubprocess

    subprocesses: Any = _posixsubprocess
    subprocesses.fork_exec = lambda *_: sys.audit("os.posix_spawn")


def _forbid(report: Callable[[str], object]) -> None:
    """Install an audit hook that ends the process when it reaches out of the interpreter.

    Args:
        report: is called with the name of the event.
    """
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    readable = tuple(path.rstrip("/") + "/" for path in sys.path)
    # Bound here, because the program could patch them by name.
    prefixes, modules, leave, plus = _FORBIDDEN, _SILENT_MODULES, os._exit, str.__add__
    starts, has, both = str.startswith, str.__contains__, int.__and__
    kind, text, number = type, str, int

    def outside(path: Any) -> bool:
        """Return whether a path is neither a standard library file nor an open descriptor."""
        if kind(path) is number:
            return False
        if kind(path) is not text:
            return True
        # The compiler looks for "<string>" to show the line of a syntax error.
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
    # Bound here, because the program could patch them.
    write: Any = os.write,
    pack: Any = _LENGTH.pack,
    size: Any = len,
) -> None:
    data = memoryview(pack(size(body)) + body)
    while data:
        data = data[write(end, data) :]


def _receive(end: int) -> Any:
    """Return the next message, or None when the other side is gone.

    Raises:
        ValueError: the bytes are no message.
    """
    head = _read(end, 8)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    if size > 1 << 32:  # would be waited for without end
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
    """Return plain data as JSON; a subclass as the plain data that it equals, a Counter as a dict.

    Raises:
        TypeError: the value is no plain data.
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
    """Return the data of `_encoded` in exactly its plain types, without any code of the program."""
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
    """Run the program, then its function as often as the tests call it."""
    request = _receive(calls)
    if request is None:
        return

    def tell(event: str, send: Any = _send, encode: Any = str.encode) -> None:
        send(answers, encode('["forbidden", "' + event + '", ""]'))

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
    """An end of the program before the tests'; the arguments are outcome and detail.

    It is also kept in `_ends`, because a test's bare `except` would swallow it.
    """

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(outcome, detail)
        _ends.append((outcome, detail))


_ends: list[tuple[str, str]] = []


def _run_tests(requests: int, call: int, answer: int, report: int) -> None:
    request = _receive(requests)
    if request is None:
        return
    _forbid(lambda event: os.write(report, json.dumps(["failed", f"the tests: {event}"]).encode()))
    names = ("code", "entry_point")
    try:
        _ask(call, answer, {name: request[name] for name in names})
        test: dict[str, Any] = {"__name__": "test"}
        try:
            exec(compile(request["context"], "<context>", "exec"), test)
        except SyntaxError:  # a prompt that ends within a function
            test = {"__name__": "test"}
        exec(compile(request["test"], "<test>", "exec"), test)

        def candidate(*arguments: Any, **options: Any) -> Any:
            message = [_encoded(arguments), _encoded(options)]
            result, after = _ask(call, answer, message)
            changed = [a if isinstance(a, list | dict | set) else None for a in arguments]
            if list(map(type, changed)) != list(map(type, after)):
                raise _Ended("failed", _NO_MESSAGE)
            for mine, theirs in zip(changed, after, strict=True):
                if isinstance(mine, list):
                    mine[:] = theirs
                elif mine is not None:
                    mine.clear()
                    mine.update(theirs)
            return result

        test[request["entry_point"]] = candidate  # HumanEval/33 calls it by name
        test["check"](candidate)
    except _Ended:
        verdict = _ends[0]
    except MemoryError:
        verdict = "memory", "MemoryError"
    except BaseException as error:
        verdict = "failed", f"{type(error).__name__}: {str(error)[:300]}"
    else:
        verdict = _ends[0] if _ends else ("passed", "")
    os.write(report, json.dumps(verdict).encode())
    os._exit(0)


_NO_MESSAGE = "the process answered with something that is no message"


def _ask(call: int, answer: int, message: object) -> list[Any]:
    """Send the program a message and return its answer; raise what its function raised."""
    if _ends:  # a test has swallowed `_Ended`
        raise _Ended(*_ends[0])
    try:
        _send(call, json.dumps(message).encode())
        said = _receive(answer)
        kind, first, second = (None, "", "") if said is None else said
        if kind == "returned":
            return [_decoded(first), _decoded(second)]
    except BrokenPipeError:
        kind, first, second = None, "", ""
    except MemoryError:
        raise _Ended("memory", "MemoryError") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _Ended("failed", _NO_MESSAGE) from None
    if kind is None:
        raise _Ended("crashed", "the process ended")
    if not isinstance(first, str) or not isinstance(second, str):
        raise _Ended("failed", _NO_MESSAGE)
    if kind == "forbidden":
        raise _Ended("forbidden", first)
    if first == "MemoryError":
        raise _Ended("memory", "MemoryError")
    error: Exception = RuntimeError(f"{first}: {second}")
    known = getattr(builtins, first, None)
    if isinstance(known, type) and issubclass(known, Exception):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError takes five arguments
            error = known(second)
    raise error


if __name__ == "__main__":
    sys.setrecursionlimit(3000)
    serve(float(sys.argv[1]), int(sys.argv[2]), unsafe=sys.argv[3:] == ["unsafe"])
