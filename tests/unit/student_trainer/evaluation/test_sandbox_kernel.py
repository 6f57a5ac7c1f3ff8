"""The kernel's fences without the audit hook: as root, as a plain user, and in a container."""

import ctypes
import os
import platform
import shutil
import stat
import tempfile
from pathlib import Path

import psutil
import pytest

from shared.errors import ConfigurationError
from student_trainer.evaluation import _fences
from student_trainer.evaluation import sandbox as sandbox_module
from student_trainer.evaluation.sandbox import Program, Sandbox, check_sandbox, run_programs
from tests.support.fences import LANDLOCK, PRCTL, UNSHARE, write_refusal

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or ctypes.CDLL(None).syscall(444, None, 0, 1) < 1,
    reason="the numbers of system calls are x86_64's; needs Landlock",
)
TEST = "def check(candidate):\n    assert candidate(3) == 4\n"
RIGHT = "def f(x):\n    return x + 1\n"
SYSTEM_PYTHON = "/usr/bin/python3"

# System calls with arguments that do no harm where they get through. Through is every end but
# EPERM: the kernel has then looked at the arguments.
CALLS = {
    "fork": "57", "clone": "56, 17, 0, 0, 0, 0", "clone3": "435, buf, 88",
    "execve": "59, b'/none', 0, 0", "execveat": "322, -100, b'/none', 0, 0, 0",
    "unshare": "272, 0x10000000", "setns": "308, 0, 0", "io_uring": "425, 1, buf",
    "userfaultfd": "323, 1", "bpf": "321, 0, buf, 120", "perf_event_open": "298, buf, 0, -1, -1, 0",
    "keyctl": "250, 0, -3, 1", "add_key": "248, b'user', b'left-here', b'x', 1, -3",
    "request_key": "249, b'user', b'left-here', 0, 0", "shmget": "29, 0x5eed, 4096, 0o1666",
    "semget": "64, 0x5eed, 1, 0o1666", "msgget": "68, 0x5eed, 0o1666",
    "mq_open": "240, b'left-here', 0o102, 0o600, 0", "mq_unlink": "241, b'none'",
    "memfd_create": "319, b'x', 0", "memfd_secret": "447, 0", "pipe2": "293, buf, 0",
    "eventfd": "290, 0, 0", "signalfd": "289, -1, buf, 8, 0", "timerfd": "283, 1, 0",
    "timer_create": "222, 1, 0, buf", "epoll": "291, 0", "inotify": "294, 0",
    "fanotify": "300, 0, 0", "ptrace": "101, 16, os.getppid(), 0, 0",
    "process_vm_readv": "310, os.getpid(), buf, 1, buf, 1, 0",
    "process_vm_writev": "311, os.getpid(), buf, 1, buf, 1, 0",
    "process_madvise": "440, -1, buf, 1, 0, 0", "pidfd_open": "434, os.getpid(), 0",
    "pidfd_getfd": "438, -1, 0, 0", "pidfd_send_signal": "424, -1, 0, 0, 0",
    "kcmp": "312, os.getpid(), os.getpid(), 0, 0, 0",
    "signal to the parent": "62, os.getppid() or 1, 0", "signal to the group": "62, 0, 0",
    "thread of the parent": "234, os.getppid() or 1, os.getppid() or 1, 0",
    "queued signal": "129, os.getpid(), 0, buf", "tkill": "200, os.getpid(), 0",
    "clock_settime": "227, 0, bad_time", "settimeofday": "164, bad_time, 0",
    "adjtimex": "159, big", "clock_adjtime": "305, 0, big",
    "sched_setscheduler": "144, 0, 0, buf", "sched_setattr": "314, 0, buf, 0",
    "sched_setaffinity": "203, 0, 8, b'\\xff' * 8", "setpriority": "141, 0, 0, 5",
    "ioprio_set": "251, 1, 0, 0", "reboot": "169, 0, 0, 0, 0", "kexec": "246, 0, 1, 0, 0",
    "init_module": "175, 0, 0, 0", "finit_module": "313, -1, 0, 0",
    "delete_module": "176, b'none', 0", "mount": "165, 0, b'/none', 0, 0, 0",
    "umount": "166, b'/none', 0", "pivot_root": "155, b'/none', b'/none'",
    "chroot": "161, b'/none'", "chdir": "80, b'/none'", "open_tree": "428, -100, b'/none', 0",
    "move_mount": "429, -1, b'', -1, b'', 0", "fsopen": "430, b'none', 0",
    "mount_setattr": "442, -100, b'/none', 0, buf, 32", "swapon": "167, b'/none', 0",
    "acct": "163, b'/none'", "quotactl": "179, 0, b'/none', 0, buf", "syslog": "103, 10, 0, 0",
    "sethostname": "170, b'x', -1", "name_to_handle": "303, -100, b'/', buf, buf, 0",
    "open_by_handle": "304, -100, buf, 0", "mlock": "149, 0, 0", "mlockall": "151, 64",
    "fallocate": "285, 0, 0, 0, 1", "ftruncate": "77, 0, 0", "truncate": "76, path, 0",
    "chmod": "90, path, 0o777", "fchmod": "91, 0, 0o777", "fchmodat": "268, -100, path, 0o777",
    "fchmodat2": "452, -100, path, 0o777, 0", "chown": "92, path, 1, 1",
    "fchownat": "260, -100, path, 1, 1, 0", "utime": "132, path, buf",
    "utimensat": "280, -100, path, buf, 0", "setxattr": "188, path, b'user.x', b'x', 1, 0",
    "removexattr": "197, path, b'user.x'", "link": "86, path, new", "symlink": "88, b'/etc', new",
    "rename": "82, path, new", "renameat2": "316, -100, path, -100, new, 0", "unlink": "87, path",
    "mkdir": "83, new, 0o777", "rmdir": "84, new", "mknod": "133, new, 0o10600, 0",
    "creat": "85, new, 0o600", "open to write": "257, -100, path, 1",
    "open to truncate": "257, -100, path, 0o1000", "open a nameless file":
    "257, -100, b'/tmp', 0o20200002, 0o600", "open a path": "257, -100, path, 0o10000000",
    "old open to write": "2, path, 2", "openat2": "437, -100, path, buf, 24", "flock": "73, 0, 2",
    "prctl: outlive the parent": "157, 1, 0", "prctl: dumpable": "157, 4, 1, 0, 0",
    "prctl: a subreaper": "157, 36, 1, 0, 0", "seccomp": "317, 2, 0, buf",
    "setrlimit": "160, 7, big", "prlimit": "302, 0, 7, big, 0", "setuid": "105, 0",
    "setresuid": "117, 0, 0, 0", "setgroups": "116, 0, 0", "capset": "126, buf, buf",
    "setsid": "112", "setpgid": "109, 0, 0", "personality": "135, 0x0400000", "iopl": "172, 0",
    "ioperm": "173, 0, 1, 0", "sendfile": "40, 0, 0, 0, 0", "splice": "275, 0, 0, 0, 0, 0, 0",
    "copy_file_range": "326, 0, 0, 0, 0, 1, 0", "owner of a descriptor": "72, 0, 8, 1",
    "size of a pipe": "72, 3, 1031, 1 << 20", "lease": "72, 0, 1024, 1",
    "locks": "72, 0, 6, buf", "signals of a pipe": "72, 3, 4, 0o20000",
    "terminal input": "16, 0, 0x5412, b'x'", "migrate_pages": "256, 0, 0, 0, 0",
    "move_pages": "279, 0, 0, 0, 0, 0, 0", "accept": "43, 0, 0, 0", "connect": "42, 0, buf, 16",
    "bind": "49, 0, buf, 16", "listen": "50, 0, 1", "TCP fast open": "44, 0, b'x', 1, 0x20000000,"
    "buf, 16", "messages": "46, 0, buf, 0", "socketpair": "53, 1, 1, 0, buf",
    "unix socket": "41, 1, 1, 0", "unix datagrams": "41, 1, 2, 0", "TCP": "41, 2, 1, 0",
    "UDP": "41, 2, 2, 0", "UDP over IPv6": "41, 10, 2, 0", "MPTCP": "41, 2, 1, 262",
    "raw socket": "41, 2, 3, 1", "netlink": "41, 16, 3, 0", "vsock": "41, 40, 1, 0",
    "AF_ALG": "41, 38, 5, 0", "packets": "41, 17, 3, 0", "SCTP": "41, 2, 1, 132",
    "another table of calls": "0x40000000 | 41, 2, 1, 0",
}  # fmt: skip
PRELUDE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
buf = ctypes.create_string_buffer(256)
big = ctypes.create_string_buffer(b'\\0' * 4 + b'\\1' * 4 + b'\\0' * 300)
bad_time = ctypes.create_string_buffer((0).to_bytes(8, 'little') + (1 << 40).to_bytes(8, 'little'))
path, new = b'{folder}/sentinel', b'{folder}/new'
def f(x):
    if libc.syscall({call}) < 0 and ctypes.get_errno() == 1: return 0
    return 4
"""
# Programs that return 4, the right answer, where what they try comes true.
SAY = """
import os, struct
def say(text):
    data = text if isinstance(text, bytes) else text.encode()
    for end in range(3, 64):
        try: os.write(end, struct.pack('=Q', len(data)) + data)
        except OSError: pass
"""
REACHING = {
    "write in a sub-interpreter": (
        "import _xxsubinterpreters as s, os\n"
        "def f(x):\n"
        "    s.run_string(s.create(), \"open('{folder}/new', 'w').close()\")\n"
        "    return 4"
    ),
    "read in a sub-interpreter": (
        "import _xxsubinterpreters as s\n"
        "def f(x):\n"
        "    s.run_string(s.create(), \"open('{folder}/sentinel').read()\")\n"
        "    return 4"
    ),
    "fork in a sub-interpreter": (
        "import _xxsubinterpreters as s\n"
        "def f(x):\n"
        "    s.run_string(s.create(), 'import os, _posixsubprocess; os.fork()')\n"
        "    return 4"
    ),
    "threads": (
        "import _thread, time\n"
        "def f(x):\n    _thread.start_new_thread(print, ())\n    return 4"
    ),
    "memory of itself as a file": "def f(x):\n    open('/proc/self/mem', 'rb')\n    return 4",
    "environment of the server": (
        "def f(x):\n    return 4 if open('/proc/1/environ', 'rb').read() is not None else 0"
    ),
    "arguments of processes": "def f(x):\n    open('/proc/1/cmdline').read()\n    return 4",
    "descriptors of processes": (
        "import os\ndef f(x):\n    return 4 if os.listdir(f'/proc/{os.getppid() or 1}/fd') else 0"
    ),
    "list a folder": "import os\ndef f(x):\n    os.listdir('/tmp')\n    return 4",
    "read by O_RDONLY": (
        "import os\ndef f(x):\n    os.open('{folder}/sentinel', os.O_RDONLY)\n    return 4"
    ),
    "read by a descriptor of Python": (
        "import os, sys\n"
        "def f(x):\n"
        "    for end in range(64):\n"
        "        try: os.open('../' * 20 + '{folder}/sentinel', os.O_RDONLY, dir_fd=end)\n"
        "        except OSError: continue\n"
        "        return 4\n"
    ),
    "packages beside the standard library": (
        "import os, sys\n"
        "def f(x):\n"
        "    for folder in sys.path:\n"
        "        for name in ('site-packages', 'dist-packages'):\n"
        "            for at, _, files in os.walk(folder + '/' + name):\n"
        "                for file in files:\n"
        "                    open(at + '/' + file, 'rb')\n"
        "                    return 4\n"
    ),
    "a module planted in the working directory": (
        "import sys\ndef f(x):\n    return 4 if '' in sys.path or '.' in sys.path else 0"
    ),
    "an inherited descriptor": (
        "import os, stat\n"
        "def f(x):\n"
        "    for end in range(1024):\n"
        "        try: mode = os.fstat(end).st_mode\n"
        "        except OSError: continue\n"
        "        if stat.S_ISSOCK(mode) or stat.S_ISREG(mode): return 4"
    ),
    "locked memory by mmap": (
        "import mmap\ndef f(x):\n    mmap.mmap(-1, 1 << 24, flags=0x2022)\n    return 4"
    ),
    "memory past the limit in pieces": (
        "import mmap\n"
        "def f(x):\n"
        "    kept = [mmap.mmap(-1, 64 << 20) for _ in range(10)]\n"
        "    return 4"
    ),
    "capabilities": (
        PRELUDE.replace("libc.syscall({call}) < 0 and ctypes.get_errno() == 1", "True")
        .replace("return 0", "pass").replace(
            "    return 4",
            "    libc.syscall(125, ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20' + bytes(4)),"
            " buf)\n    return 4 if any(buf.raw) else 0")
    ),
    "root's user id": (
        "import os\n"
        "def f(x):\n"
        "    return 4 if os.getuid() == 0 and {another} else 0"
    ),
}  # fmt: skip
FORGED = {
    "metaclass that is an instance of everything": (
        "class M(type):\n    def __instancecheck__(c, o): return True\n"
        "    def __eq__(c, o): return True\n    __hash__ = None\n"
        "class A(metaclass=M): pass\ndef f(x): return A"
    ),
    "lying __class__": (
        "class A:\n    __class__ = int\n    def __eq__(s, o): return True\n"
        "    def __int__(s): return 0\n    def __abs__(s): return 0\ndef f(x): return A()"
    ),
    "str that is equal": (
        "class A(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\n"
        "def f(x): return A('5')"
    ),
    "list of a lying length": (
        "class A(list):\n    def __eq__(s, o): return True\n    def __len__(s): return 4\n"
        "def f(x): return A()"
    ),
    "dict of lying items": (
        "class A(dict):\n    def items(s): return [(1, object())]\n"
        "    def __eq__(s, o): return True\ndef f(x): return A()"
    ),
    "array that is equal elementwise": (
        "class A:\n    def __array__(s): return 4\n    def __eq__(s, o): return s\n"
        "    def __bool__(s): return True\ndef f(x): return A()"
    ),
    "pickle": (
        "class A:\n    def __reduce__(s): return (int, (4,))\n"
        "def f(x):\n    import pickle\n    return pickle.dumps(A())"
    ),
    "code as marshalled data": (
        "def f(x):\n    import marshal\n    return marshal.dumps(compile('4', '', 'eval'))"
    ),
    "iterator": "def f(x): return iter([4])",
    "a proxy": (
        "import types\n"
        "def f(x): return types.MappingProxyType({4: 4})"
    ),
    "coroutine": "async def f(x): return 4",
    "error in the hash": (
        "class A(int):\n    def __hash__(s): raise SystemExit(0)\n"
        "def f(x): return {A(4)} and 0"
    ),
    "JSON without end": SAY + "def f(x): say('[' * 100000)",
    "unknown kind": SAY + "def f(x): say('[\"passed\", 0, 0]')",
    "too few values": SAY + "def f(x): say('[\"returned\"]')",
    "no list": SAY + "def f(x): say('4')",
    "text that is no UTF-8": SAY + "def f(x): say(b'\\xff\\xfe')",
    "no length": SAY + "def f(x): say('')",
    "verdict of the tests": SAY + "def f(x): say('[\"passed\", \"\"]')",
    "kind that is unhashable": SAY + "def f(x): say('[[], 0, 0]')",
    "wrong range": SAY + "def f(x): say('[\"returned\", {\"range\": [1]}, [null]]')",
    "key that is unhashable": (
        SAY + "def f(x): say('[\"returned\", {\"dict\": [[[], 1]]}, [null]]')"
    ),
    "arguments that were not given": SAY + "def f(x): say('[\"returned\", 5, [1, 2, 3]]')",
    "error of no name": SAY + "def f(x): say('[\"raised\", {}, []]')",
    "error named after the module": SAY + "def f(x): say('[\"raised\", \"__dict__\", \"4\"]')",
    "error SystemExit by message": SAY + "def f(x): say('[\"raised\", \"SystemExit\", \"0\"]')",
    "object by type": SAY + "def f(x): say('[\"returned\", {\"eval\": \"4\"}, [null]]')",
    "digits without end": SAY + "def f(x): say('[\"returned\", ' + '9' * 10 ** 6 + ', [null]]')",
    "exit by a finalizer": (
        "import os\nclass A:\n    def __del__(s): os._exit(0)\ndef f(x): A()"
    ),
    "exit by atexit and sys.exit": (
        "import atexit, os, sys\natexit.register(lambda: os._exit(0))\ndef f(x): sys.exit(0)"
    ),
    "patched json": (
        "import json\njson.dumps = lambda *a, **k: '[\"passed\", \"\", 4]'\ndef f(x): return 0"
    ),
    "patched struct": (
        "import struct\nstruct.Struct = struct.pack = struct.unpack = lambda *a: b'4'\n"
        "def f(x): return 0"
    ),
    "trace in the frames of the harness": (
        "import sys\n"
        "def trace(frame, event, value):\n"
        "    frame.f_locals['said'] = ['passed', '', '']\n    return trace\n"
        "sys.settrace(trace)\nsys._getframe(1).f_trace = trace\ndef f(x): return 0"
    ),
    "closure of the harness": (
        "import sys\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    for value in list(frame.f_locals.values()):\n"
        "        for cell in getattr(value, '__closure__', None) or ():\n"
        "            try: cell.cell_contents = lambda *a: 4\n"
        "            except ValueError: pass\n"
        "    frame = frame.f_back\n"
        "def f(x): return 0"
    ),
    "objects of the collector": (
        "import gc\n"
        "def f(x):\n"
        "    for one in gc.get_objects():\n"
        "        if ''.join(['assert', ' candidate']) in str(one): return 4"
    ),
    "no AssertionError": (
        "import builtins, ctypes\n"
        "ctypes.pythonapi.PyErr_SetNone\nbuiltins.AssertionError = ValueError\ndef f(x): return 0"
    ),
    "memory overwritten": (
        "import ctypes\n"
        "ctypes.memmove(id(5) + 24, id(4) + 24, 4)\n"
        "def f(x): return 5 if False else 6"
    ),
    "environment for the tests": (
        "import os\nos.environ['PYTHONOPTIMIZE'] = '2'\nos.environ['PYTHONSTARTUP'] = 'x'\n"
        "def f(x): return 0"
    ),
    "a right answer to another question": "def f(x): return '4'",
    "half of a message": (
        "import os\n"
        "def f(x):\n"
        "    for end in range(3, 64):\n"
        "        try: os.write(end, b'\\x40\\0\\0')\n"
        "        except OSError: pass\n"
        "    os._exit(0)"
    ),
}  # fmt: skip
ATTACKS = {
    **{name: PRELUDE.replace("{call}", call) for name, call in CALLS.items()},
    **REACHING,
    **FORGED,
}


def harness_without_courtesy(folder: Path) -> Path:
    """The harness without its audit hook, so that nothing but the kernel is in the way."""
    source = sandbox_module._HARNESS.read_text()
    for line in ("    sys.addaudithook(hook)\n", "    _remove_silent_functions()\n"):
        assert source.count(line) == 1
        source = source.replace(line, "")
    shutil.copy(_fences.__file__, folder / "_fences.py")
    harness = folder / "harness.py"
    harness.write_text(source)
    return harness


AS_USER = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups")
LESS = "sys_admin,sys_ptrace,sys_time,sys_nice,sys_boot,sys_module,net_admin,sys_resource"


@pytest.fixture(scope="module")
def public():
    """A folder that every user can read, with the harness."""
    folder = Path(tempfile.mkdtemp(prefix="fences-", dir="/tmp"))
    folder.chmod(0o755)
    harness_without_courtesy(folder)
    write_refusal(folder / "container.py", UNSHARE)
    yield folder
    shutil.rmtree(folder)


SETTINGS = ("root", "user", "container", "user in a container")


def enter(setting: str, public: Path, patch: pytest.MonkeyPatch) -> None:
    """Run sandboxes in that setting."""
    if os.geteuid() != 0:
        pytest.skip("only root can be root, and become others")
    if "user" in setting and not Path(SYSTEM_PYTHON).exists():
        pytest.skip("needs a Python that others may run")
    plain = ("-S", "-s", "-P")
    command = (SYSTEM_PYTHON if "user" in setting else sandbox_module.sys.executable, *plain)
    if "container" in setting:
        command = (*command, str(public / "container.py"))
    if setting == "container":
        command = ("setpriv", "--bounding-set=-" + LESS.replace(",", ",-"), *command)
    if "user" in setting:
        command = (*AS_USER, *command)
    patch.setattr(sandbox_module, "_PYTHON", command)
    patch.setattr(sandbox_module, "_HARNESS", public / "harness.py")


@pytest.fixture(scope="module", params=SETTINGS)
def ran(request, public, tmp_path_factory):
    """Outcomes of all attacks in a setting, and what is left of the folder they were to harm."""
    before = set(psutil.pids())
    folder = Path(tempfile.mkdtemp(prefix="victim-", dir="/tmp"))
    folder.chmod(0o777)
    sentinel = folder / "sentinel"
    sentinel.write_text("here")
    sentinel.chmod(0o646)
    with pytest.MonkeyPatch.context() as patch:
        enter(request.param, public, patch)
        another = str(request.param != "user")
        codes = [
            code.replace("{folder}", str(folder)).replace("{another}", another)
            for code in ATTACKS.values()
        ]
        programs = [Program(code, "f", TEST) for code in codes]
        seen = [sentinel.stat()]
        results = run_programs(programs, timeout=3.0, workers=2)
        # On a machine with much else to do a program may run out of time before its call.
        ended = enumerate(zip(ATTACKS, results, strict=True))
        late = [i for i, (name, r) in ended if name in CALLS and r.outcome == "timeout"]
        again = run_programs([programs[i] for i in late], timeout=60.0, workers=1)
        for i, result in zip(late, again, strict=True):
            results[i] = result
        seen.append(sentinel.stat())
    children = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    yield request.param, dict(zip(ATTACKS, results, strict=True)), folder, seen, children
    shutil.rmtree(folder)


@pytest.mark.xdist_group("sandbox")
def test_no_attack_comes_through(ran):
    _, results, _, _, _ = ran
    assert len(results) >= 162
    # One right program among them, else nothing ran.
    through = {name: result for name, result in results.items() if result.passed}
    assert through == {}
    strange = {n: r for n, r in results.items() if n in CALLS and "AssertionError" not in r.detail}
    assert strange == {}  # each was refused, none just did not get so far


@pytest.mark.xdist_group("sandbox")
def test_nothing_is_changed_or_left(ran):
    _, _, folder, (before, after), children = ran
    assert [path.name for path in folder.iterdir()] == ["sentinel"]
    assert (folder / "sentinel").read_text() == "here"
    assert stat.S_IMODE(after.st_mode) == 0o646
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
    owners = [entry.stat().st_uid for entry in os.scandir("/dev/shm")]
    assert not [uid for uid in owners if uid == 12345 or 60578 <= uid <= 61183]
    assert children == []
    for kind in ("shm", "sem", "msg"):
        assert str(0x5EED) not in Path(f"/proc/sysvipc/{kind}").read_text().split()
    assert "left-here" not in Path("/proc/keys").read_text()


EVERY_CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    through = []
    for number in [*range(600), *range(1 << 30, (1 << 30) + 600)]:
        if number not in {allowed} and number not in (335, 336):  # uretprobe, uprobe: SIGILL
            if libc.syscall(number, 0, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != 1:
                through.append(number)
    return through
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_call_is_allowed_that_is_not_on_the_list(setting, public, monkeypatch):
    enter(setting, public, monkeypatch)
    allowed = {numbers[0] for numbers in (_fences.PLAIN | _fences.CHECKED).values()}
    code = EVERY_CALL.replace("{allowed}", str(allowed))
    with Sandbox() as sandbox:
        result = sandbox.run(Program(code, "f", "def check(f):\n    assert f(1) == [], f(1)\n"))
        assert result.passed, result


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_holds_what_the_promise_needs(setting, public, monkeypatch):
    enter(setting, public, monkeypatch)
    with Sandbox() as sandbox:
        assert sandbox.missing == ()
        assert {"Landlock", "seccomp", "no capabilities", "no_new_privs"} <= set(sandbox.held)
        assert ("net" in sandbox.held) == ("container" not in setting)
        assert ("user id" in sandbox.held) == ("user" not in setting)
        result = sandbox.run(Program(RIGHT, "f", TEST))
        assert result.passed, result


@pytest.mark.parametrize(("refused", "name"), [(LANDLOCK, "Landlock"), (PRCTL, "no_new_privs")])
def test_a_kernel_that_refuses_a_fence_runs_nothing(refused, name, public, monkeypatch, caplog):
    wrapper = public / "refuses.py"
    write_refusal(wrapper, refused)
    command = (sandbox_module.sys.executable, "-S", "-s", "-P", str(wrapper))
    monkeypatch.setattr(sandbox_module, "_PYTHON", command)
    with pytest.raises(ConfigurationError, match=f"no ({name}).*--unsafe_sandbox") as caught:
        run_programs([Program(RIGHT, "f", TEST)])
    assert "\n" not in str(caught.value)
    missing = check_sandbox(unsafe=True)
    assert missing
    assert "UNSAFE" in caplog.text
    assert missing[0] in caplog.text
    assert run_programs([Program(RIGHT, "f", TEST)], unsafe=True)[0].passed


HEAP = """
import ctypes, gc
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
def f(x):
    objects = gc.get_objects()
    large = [bytes(2000 + n) for n in range(200)] + [one.__dict__ for one in objects
                                                    if type(one) is type(gc)]
    end = libc.sbrk(0)
    heap = [id(one) for one in [*objects, *large] if end - (64 << 20) < id(one) < end]
    if heap and holds(ctypes.string_at(min(heap), end - min(heap))): return True
    fresh = [b'%d' % n * (n % 60) for n in range(20000)]
    pools = {id(one) >> 14 for one in [*objects, *fresh]} - {one >> 14 for one in heap}
    return any(holds(ctypes.string_at(pool << 14, 1 << 14)) for pool in pools)
def holds(memory):
    at = memory.find({first})
    while at >= 0:  # the two halves are never one object of this program's own
        if memory[at + len({first}):][:len({second})] == {second}: return True
        at = memory.find({first}, at + 1)
    return False
"""


def test_a_program_finds_nothing_of_earlier_tests_and_programs_in_its_memory(public, monkeypatch):
    """It reads all of its interpreter's memory, and first one that does hold the word."""
    monkeypatch.setattr(sandbox_module, "_HARNESS", public / "harness.py")
    word = b"a word of the tests"
    search = HEAP.replace("{first}", repr(word[:9])).replace("{second}", repr(word[9:]))
    with Sandbox(timeout=10.0) as sandbox:
        control = Program(
            f"kept = [{word.decode()!r} + str(n) for n in range(50)]\n{search}", "f",
            "def check(f):\n    assert f(1) is True\n",
        )  # fmt: skip
        result = sandbox.run(control)
        assert result.passed, result
        test = f"# {word.decode()}\n" * 50 + f"def check(f):\n    assert f(3) == 4, {word!r}\n"
        for code in (RIGHT, f"# {word.decode()}\ndef f(x): raise ValueError({word!r})\n"):
            sandbox.run(Program(code, "f", test, context=f"# {word.decode()}\n"))
        result = sandbox.run(Program(search, "f", "def check(f):\n    assert f(1) is False\n"))
        assert result.passed, result


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_order_of_a_set_is_the_same_in_every_run(setting, public, monkeypatch):
    enter(setting, public, monkeypatch)
    code = "def f(x): return ' '.join({str(n) for n in range(50)})\n"
    said = set()
    for _ in range(3):
        with Sandbox() as sandbox:
            test = "def check(f):\n    assert False, f(1)\n"
            said.add(sandbox.run(Program(code, "f", test)).detail)
    assert len(said) == 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_standard_library_is_there(setting, public, monkeypatch):
    """Also where Python stands in a folder that the program's user may not enter."""
    enter(setting, public, monkeypatch)
    code = "def f(x):\n    import asyncio, csv, decimal, encodings.idna, importlib.metadata\n"
    code += "    import json.tool, sqlite3, ssl, statistics, unittest.mock, xml.dom.minidom\n"
    code += "    return decimal.Decimal(x) + 1 == 4 and 4\n"
    with Sandbox() as sandbox:
        result = sandbox.run(Program(code, "f", TEST))
        assert result.passed, result


def test_a_test_that_catches_everything_does_not_hide_that_the_program_ended():
    test = "def check(f):\n    try:\n        f(1)\n    except:\n        pass\n"
    with Sandbox() as sandbox:
        assert sandbox.run(Program("def f(x): raise ValueError\n", "f", test)).passed
        result = sandbox.run(Program("import os\ndef f(x): os._exit(0)\n", "f", test))
        assert result.outcome == "crashed"


def test_errors_of_programs_carry_no_control_characters():
    code = "def f(x): raise ValueError('\\x1b[31m\\ud800\\n\\x07 red')\n"
    with Sandbox() as sandbox:
        detail = sandbox.run(Program(code, "f", TEST)).detail
    assert "red" in detail
    assert detail.isprintable()
