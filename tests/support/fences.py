"""A kernel that refuses some of the sandbox's fences, imitated by a seccomp filter."""

from pathlib import Path

from student_trainer.evaluation import _fences

UNSHARE, LANDLOCK, PRCTL = 272, 444, 157  # system calls of x86_64

_WRAPPER = """
import os, sys
sys.path.insert(0, {folder!r})
import _fences
libc = _fences.load_libc()
libc.prctl(38, 1, 0, 0, 0)
refused = {refused!r}
code = _fences._step(_fences._LOAD, 0)
for number in refused:
    code += _fences._step(_fences._EQUAL, number, 0, 1) + _fences._step(_fences._RETURN, 0x50001)
_fences.install_filter(libc, code + _fences._step(_fences._RETURN, _fences._ALLOW))
os.execv(sys.executable, [sys.executable, "-S", "-s", "-P", *sys.argv[1:]])
"""


def write_refusal(script: Path, *calls: int) -> None:
    """Write a script that runs Python with its arguments, where these calls fail with EPERM.

    The fences' module is taken from the script's folder if it is there, for users who may not
    read this checkout.
    """
    beside = script.with_name("_fences.py")
    folder = (beside if beside.exists() else Path(_fences.__file__)).parent
    script.write_text(
        _WRAPPER.replace("{folder!r}", repr(str(folder))).replace("{refused!r}", str(list(calls)))
    )
