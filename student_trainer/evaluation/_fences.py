"""The kernel's fences around model-written programs: Linux on x86_64 and aarch64.

Loaded by `_harness.py` in an interpreter without site-packages. The sandbox relies on what every
process may ask of a kernel: a seccomp filter that allows by list, Landlock, no capabilities,
`no_new_privs` and limits. Namespaces and another user come on top where they are allowed.

The filter is written out here, because it is one flat list, and libseccomp is not on every machine
and has no maintained binding.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

# Numbers of system calls on (x86_64, aarch64); None where an architecture has no such call. They
# read, wait, ask for the time, manage the process's own memory and end it. None of them makes a
# process or thread, a socket, a pipe or a file, or changes anything outside of the process.
PLAIN = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "fadvise64": (221, 223),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "brk": (12, 214), "madvise": (28, 233),
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "rseq": (334, 293), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "pause": (34, None),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "getrlimit": (97, None), "sysinfo": (99, 179), "uname": (63, 160),
    "getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# Allowed with some arguments only.
CHECKED = {
    "open": (2, None), "openat": (257, 56), "ioctl": (16, 29), "fcntl": (72, 25),
    "prlimit64": (302, 261), "tgkill": (234, 131),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_PATH and O_TMPFILE, the same on both.
_CHANGING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o10000000 | 0o20000000
_TCGETS = 0x5401  # the request that isatty() makes
_FCNTLS = (1, 2, 3, 1030)  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

_NAMESPACES = {
    "net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000, "mount": 0x00020000,
    "cgroup": 0x02000000, "pid": 0x20000000,
}  # fmt: skip
_NEW_USER = 0x10000000


class MissingFenceError(Exception):
    """A fence that the kernel refuses; the argument is its name."""


def load_libc() -> Any:
    """Return the C library, through which the interpreter reaches the kernel.

    Raises:
        MissingFenceError: this interpreter was built without ctypes.
    """
    try:
        import ctypes
    except ImportError as error:
        raise MissingFenceError("ctypes (a Python built with libffi)") from error
    return ctypes.CDLL(None, use_errno=True)


def separate(libc: Any) -> list[str]:
    """Leave the namespaces of the machine; return the names of those that could be left.

    The process itself stays in its process namespace; its first child opens the new one.
    """
    left = []
    user = 0 if os.geteuid() == 0 else _NEW_USER
    if libc.unshare(user | sum(_NAMESPACES.values())) == 0:
        left = [*(["user"] if user else []), *_NAMESPACES]
    elif not user or libc.unshare(_NEW_USER) == 0:
        left = ["user"] if user else []
        left += [name for name, flag in _NAMESPACES.items() if libc.unshare(flag) == 0]
    return left


def drop_privileges(libc: Any) -> list[str]:
    """Drop all capabilities and every way to regain them; return the names of what holds.

    Raises:
        MissingFenceError: capabilities remain, or `no_new_privs` is refused.
    """
    import ctypes

    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL
    capset = _number((126, 91))
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    libc.syscall(capset, header, bytes(24))
    found = ctypes.create_string_buffer(24)
    if libc.syscall(capset - 1, header, found) != 0 or any(found.raw):
        raise MissingFenceError("way to drop capabilities")
    if libc.prctl(38, 1, 0, 0, 0) != 0:
        raise MissingFenceError("no_new_privs")
    return ["no capabilities", "no_new_privs"]


def become_unused_user() -> list[int]:
    """Change from root to an unused user id, which owns no file; stay root where that is refused.

    Python may be installed where only root may read (`/root`). It is then imported through open
    descriptors, which are returned.
    """
    if os.geteuid() != 0:
        return []
    # systemd leaves the user ids 60578 to 61183 unused.
    wanted = 60578 + os.getpid() % 600
    folders = {path: os.open(path, os.O_PATH) for path in sys.path if os.path.isdir(path)}  # noqa: PTH112
    kept = []
    with contextlib.suppress(OSError):
        os.setgroups([])
        os.setresgid(wanted, wanted, wanted)
    try:
        os.setresuid(wanted, wanted, 0)
        moved = {}
        for path, folder in folders.items():
            try:
                os.listdir(path)  # noqa: PTH208
            except PermissionError:
                moved[path] = f"/proc/self/fd/{folder}"
                os.listdir(moved[path])  # noqa: PTH208
                kept.append(folder)
        os.setresuid(wanted, wanted, wanted)
    except OSError:  # the namespace lacks the user id, or there is no /proc
        with contextlib.suppress(OSError):
            os.setresuid(0, 0, 0)
        kept, moved = [], {}
    _move_imports(moved)
    for folder in folders.values():
        if folder not in kept:
            os.close(folder)
    return kept


def _move_imports(moved: dict[str, str]) -> None:
    """Make imports read the same folders by other paths."""
    if not moved:
        return

    def new_name(path: str) -> str:
        for old, new in moved.items():
            if path == old or path.startswith(old + "/"):
                return new + path[len(old) :]
        return path

    for module in list(sys.modules.values()):
        if isinstance(paths := getattr(module, "__path__", None), list):
            paths[:] = map(new_name, paths)
    sys.path[:] = map(new_name, sys.path)
    if getattr(sys, "_stdlib_dir", None):  # where frozen packages look for their modules
        sys._stdlib_dir = new_name(sys._stdlib_dir)  # type: ignore[attr-defined]
    sys.path_importer_cache.clear()


def make_fence(libc: Any) -> tuple[Callable[[], None], list[int]]:
    """Return a function that fences in the process that calls it, and descriptors it needs.

    Raises:
        MissingFenceError: the kernel has no Landlock. The returned function raises it where
            Landlock or the filter is refused or does not hold.
    """
    ruleset = _landlock(libc)

    def enclose() -> None:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if libc.syscall(446, ruleset, 0) != 0:  # landlock_restrict_self
            raise MissingFenceError("Landlock")
        os.close(ruleset)
        try:
            os.close(os.open("/", os.O_RDONLY))
        except PermissionError:
            pass
        else:
            raise MissingFenceError("Landlock (it does not hold)")
        install_filter(libc, filter_code(os.uname().machine, os.getpid()))
        if libc.socket(1, 1, 0) >= 0:
            raise MissingFenceError("seccomp (it does not hold)")

    return enclose, [ruleset]


def _number(numbers: tuple[int | None, int | None]) -> int:
    architecture = _ARCHITECTURES.get(os.uname().machine)
    number = numbers[architecture[0]] if architecture else None
    if number is None:
        raise MissingFenceError(f"seccomp (no list of system calls for {os.uname().machine})")
    return number


def _landlock(libc: Any) -> int:
    """Return a ruleset that allows reading Python's standard library and shared libraries.

    Packages beside the standard library are not readable, because data sets come as packages.
    Source: https://docs.kernel.org/userspace-api/landlock.html; its three calls have the same
    numbers on every architecture.
    """
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        raise MissingFenceError("Landlock")
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # all rights on files
    network, scope = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(444, struct.pack("=QQQ", rights, network, scope), size, 0)
    if ruleset < 0:
        raise MissingFenceError("Landlock")
    read_file, read_folder = 4, 8

    def allow(path: str, allowed: int) -> None:
        try:
            end = os.open(path, os.O_PATH)
        except OSError:  # unreadable for this user, so for the program too
            return
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, end), 0)
        os.close(end)

    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64")
    for folder in dict.fromkeys((*sys.path, sys.base_prefix + "/lib", *libraries)):
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError:
            continue
        of_python = folder in sys.path
        allow(folder, read_folder)
        for entry in entries:
            others = ("site-packages", "dist-packages") if of_python else ("python",)
            if not entry.name.startswith(others):
                everything = read_file | (read_folder if entry.is_dir() else 0)
                allow(entry.path, everything)
    allow("/etc/ld.so.cache", read_file)
    return int(ruleset)


# The filter, classic BPF: https://docs.kernel.org/userspace-api/seccomp_filter.html


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(index: int, *, high: bool = False) -> bytes:
    return _step(_LOAD, 16 + 8 * index + 4 * high)


def _equals(index: int, *values: int) -> bytes:
    """Return a test that allows the call if an int argument is one of these."""
    tests = b"".join(_step(_EQUAL, value, 0, 1) + _step(_RETURN, _ALLOW) for value in values)
    return _argument(index) + tests + _step(_RETURN, _REFUSE)


def _has_none(index: int, bits: int) -> bytes:
    test = _step(_ANY_BIT, bits, 1, 0)
    return _argument(index) + test + _step(_RETURN, _ALLOW) + _step(_RETURN, _REFUSE)


def _is_null(index: int) -> bytes:
    low, high = _step(_EQUAL, 0, 0, 3), _step(_EQUAL, 0, 0, 1)
    ends = _step(_RETURN, _ALLOW) + _step(_RETURN, _REFUSE)
    return _argument(index) + low + _argument(index, high=True) + high + ends


def filter_code(machine: str, process: int) -> bytes:
    """Return a filter for one process, where a call that is not on the list fails with EPERM.

    Args:
        machine: as `os.uname` tells it.
        process: the id of the process, which may send signals to itself.

    Raises:
        MissingFenceError: there is no list for such a machine.
    """
    if machine not in _ARCHITECTURES:
        raise MissingFenceError(f"seccomp (no list of system calls for {machine})")
    which, architecture = _ARCHITECTURES[machine]
    conditions = {
        "open": _has_none(1, _CHANGING),
        "openat": _has_none(2, _CHANGING),
        "ioctl": _equals(1, _TCGETS),
        "fcntl": _equals(1, *_FCNTLS),
        "prlimit64": _is_null(2),  # reads limits and sets none
        "tgkill": _equals(0, process),
    }
    # A call through another table (32 bits) has other numbers, so it kills the process.
    code = _step(_LOAD, 4) + _step(_EQUAL, architecture, 1, 0) + _step(_RETURN, _KILL)
    code += _step(_LOAD, 0)
    for numbers in PLAIN.values():
        if (number := numbers[which]) is not None:
            code += _step(_EQUAL, number, 0, 1) + _step(_RETURN, _ALLOW)
    for name, numbers in CHECKED.items():
        if (number := numbers[which]) is not None:
            body = conditions[name]
            code += _step(_EQUAL, number, 0, len(body) // 8) + body
    return code + _step(_RETURN, _REFUSE)


def install_filter(libc: Any, code: bytes) -> None:
    """Install a filter for the rest of the life of this process, which has `no_new_privs`.

    Raises:
        MissingFenceError: the kernel, or the container, refuses.
    """
    import ctypes

    class Code(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    if libc.prctl(22, 2, ctypes.byref(Code(len(code) // 8, code)), 0, 0) != 0:
        raise MissingFenceError("seccomp")


def limit(seconds: float, memory_bytes: int) -> None:
    """Limit this process for good: no file grows, no memory is locked, no core is written."""
    cpu = int(seconds) + 1
    limits = {
        "CPU": cpu, "AS": memory_bytes, "FSIZE": 0, "NOFILE": 64, "NPROC": 0, "CORE": 0,
        "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 64, "NICE": 0, "RTPRIO": 0,
    }  # fmt: skip
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name, None)
        if kind is not None:
            resource.setrlimit(kind, (value, value))
