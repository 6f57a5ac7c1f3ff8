"""The inside of the sandbox: a small server that forks one limited child for each program.

Run by `sandbox.py` as a file of its own, in a fresh interpreter without site-packages. Reads one
JSON request a line from stdin and answers one JSON line on stdout. Everything lives in the locals
of `serve`: the program shares the child's interpreter, and must find nothing of ours by name.
"""


def serve() -> None:
    import _thread
    import builtins
    import json
    import os
    import resource
    import secrets
    import select
    import signal
    import sys
    import time
    from typing import Any

    def leave_the_network() -> None:
        """A network namespace without interfaces, where the kernel lets us have one."""
        import ctypes

        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET
                libc.unshare(0x50000000)  # with CLONE_NEWUSER, for those who are not root
        except (OSError, AttributeError):
            pass  # the audit hook still refuses sockets
        for name in [n for n in sys.modules if n.split(".")[0] in ("ctypes", "_ctypes")]:
            del sys.modules[name]

    def limit(seconds: float, memory_bytes: int) -> None:
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

    def forbid(report: int) -> None:
        """Whatever reaches out of the interpreter ends the program on the spot."""
        prefixes = (
            "socket.", "subprocess.", "shutil.", "ctypes.", "pty.", "fcntl.", "ftplib.", "smtplib.",
            "urllib.", "http.", "webbrowser.", "syslog.", "tempfile.", "resource.", "signal.",
            "gc.get_", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "os.kill",
            "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.chflags",
            "os.link", "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.removexattr",
            "os.lockf", "os.putenv", "os.unsetenv", "os.startfile", "os.add_dll_directory",
            "sys._current_frames", "sys._current_exceptions", "sys.settrace", "sys.setprofile",
            "mmap.", "sqlite3.", "code.__new__",
        )  # fmt: skip
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        leave, write, encode = os._exit, os.write, str.encode

        def hook(event, arguments, starts=str.startswith, integer=int.__and__):  # type: ignore[no-untyped-def]
            if starts(event, prefixes) or (
                event == "open" and arguments[2] and integer(arguments[2], writing)
            ):
                write(report, encode("forbidden " + event))
                leave(1)

        sys.addaudithook(hook)

    def guarded(function, plain):  # type: ignore[no-untyped-def]
        """Results must be plain data, so that no object of the program answers for itself."""

        def check(value, depth=0):  # type: ignore[no-untyped-def]
            kind = type(value)
            if kind in plain:
                return
            if depth < 50 and kind in (list, tuple, set, frozenset):
                for item in value:
                    check(item, depth + 1)
            elif depth < 50 and kind is dict:
                for key, item in value.items():
                    check(key, depth + 1)
                    check(item, depth + 1)
            else:
                raise TypeError("the result holds an object of type " + kind.__name__)

        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            result = function(*arguments, **options)
            check(result)
            return result

        return call

    def run(request, outcome, begin, done):  # type: ignore[no-untyped-def]
        """In a thread of its own: nothing above this frame, and nothing to steal in it."""
        begin.acquire()
        try:
            own = dict(builtins.__dict__)
            program = {"__name__": "program"}
            exec(compile(request["code"], "<program>", "exec"), program)
            builtins.__dict__.clear()
            builtins.__dict__.update(own)  # what the program patched
            test: dict[str, Any] = {"__name__": "test"}
            try:
                exec(compile(request["context"], "<context>", "exec"), test)
            except SyntaxError:
                test = {"__name__": "test"}
            exec(compile(request["test"], "<test>", "exec"), test)
            plain = (int, float, complex, bool, str, bytes, type(None))
            candidate = guarded(program[request["entry_point"]], plain)
            test[request["entry_point"]] = candidate  # HumanEval/33 calls it by name
            test["check"](candidate)
        except MemoryError:
            outcome.append("memory MemoryError")
        except BaseException as error:
            outcome.append("failed " + type(error).__name__ + ": " + str(error)[:300])
        else:
            outcome.append("returned")
        finally:
            done.release()

    def child(request, report, nonce):  # type: ignore[no-untyped-def]
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
        leave, write = os._exit, os.write
        outcome: list[str] = []
        begin, done = _thread.allocate_lock(), _thread.allocate_lock()
        begin.acquire()
        done.acquire()
        # Before the limits: but for root, no thread could be started under them.
        _thread.start_new_thread(run, (request, outcome, begin, done))
        limit(request["timeout"], request["memory_bytes"])
        forbid(report)
        begin.release()
        done.acquire()
        # Only one clean end counts: a forged entry stands beside the real one.
        write(report, nonce if outcome == ["returned"] else outcome[0].encode(errors="replace"))
        leave(0)

    def judge(request):  # type: ignore[no-untyped-def]
        nonce = secrets.token_hex(16).encode()
        readable, report = os.pipe()
        since = time.monotonic()
        process = os.fork()
        if process == 0:
            os.close(readable)
            try:
                child(request, report, nonce)
            finally:
                os._exit(3)
        os.close(report)
        said, timed_out = b"", False
        while True:
            left = since + request["timeout"] - time.monotonic()
            ready = select.select([readable], [], [], max(left, 0.0))[0]
            if not ready:
                timed_out = True
                break
            data = os.read(readable, 4096)
            if not data or len(said) > 4096:
                break
            said += data
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(process, signal.SIGKILL)  # before it called setsid
        status = os.waitpid(process, 0)[1]
        os.close(readable)
        seconds = time.monotonic() - since
        text = said.decode(errors="replace")
        if said == nonce:
            outcome, detail = "passed", ""
        elif timed_out or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            outcome, detail = "timeout", "not finished in time"
        elif text.split(" ")[0] in ("failed", "memory", "forbidden"):
            outcome, _, detail = text.partition(" ")
        else:
            outcome, detail = "crashed", "the process ended with status " + str(status)
        return {"outcome": outcome, "detail": detail, "seconds": seconds}

    leave_the_network()
    sys.setrecursionlimit(3000)
    _thread.stack_size(64 << 20)
    for line in sys.stdin:
        answer = json.dumps(judge(json.loads(line)))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


serve()
