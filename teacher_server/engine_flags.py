"""Check the spelling of flags that go to vLLM's engine, before vLLM is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from shared.command_line import did_you_mean
from shared.errors import ConfigurationError

# Read as text from vLLM 0.32, since its import takes many seconds.
_ARGUMENTS = "engine/arg_utils.py"


def check_engine_flags(flags: Sequence[str], engine: str, own: Sequence[str]) -> None:
    """Refuse flags that nobody takes, with the name that was probably meant.

    Flags that are like no known one are left to vLLM, which a plugin may have taught others.

    Args:
        flags: what is not this server's own, with values, as it was typed.
        engine: "vllm", or another engine, which takes no flags.
        own: this server's flags.

    Raises:
        ConfigurationError: names the flag and the one that it is like.
    """
    if not flags:
        return
    for flag in flags:
        if flag.split("=")[0] == "--model":
            raise ConfigurationError(
                f"{flag} is set by this server; give the model alone: teacher-server serve MODEL"
            )
    if engine != "vllm":
        meant = did_you_mean(flags[0].split("=")[0], own) if flags[0].startswith("-") else ""
        raise ConfigurationError(
            f"{' '.join(flags)}: unknown to this server, and the transformers backend takes no "
            f"engine flags.{meant or ' Check the spelling, or use --backend vllm'}"
        )
    names = vllm_flags()
    for flag in flags if names else ():
        name = re.sub(r"[=.].*", "", flag, flags=re.DOTALL).replace("_", "-")
        positive = name.replace("--no-", "--", 1)
        # vLLM takes a flag by its beginning, too.
        if not name.startswith("--") or any(known.startswith(positive) for known in names):
            continue
        if meant := did_you_mean(name, [*own, *names]):
            raise ConfigurationError(f"{name}: neither this server nor vLLM takes it.{meant}")


@cache
def vllm_flags() -> frozenset[str]:
    """Return the long names of the engine's flags; none where vLLM's source is not found."""
    spec = find_spec("vllm")
    file = Path(getattr(spec, "origin", None) or "").parent / _ARGUMENTS
    if not file.is_file():
        return frozenset()
    return frozenset(re.findall(r'"(--[a-z][a-z0-9-]+)"', file.read_text(encoding="utf-8")))
