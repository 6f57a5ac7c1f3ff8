"""A vLLM worker extension that takes adapters over HTTP, for servers that share no folder."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from base64 import b64decode
from pathlib import Path
from typing import Any

from shared.compat import lora_modules
from shared.vllm_sampling import SeededSampling

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]*")


class ReceivedAdapters(SeededSampling):
    """A worker extension (``--worker-extension-cls``) that writes adapters where vLLM loads them.

    vLLM's own route loads an adapter from a folder that the server sees. The methods here, which
    ``/collective_rpc`` calls, bring the files into such a folder. Every worker writes them, as
    workers may be on several machines.
    """

    _received: Any = None  # the part of a file that has come, a bytearray

    def receive_adapter(self, offset: int, part: str) -> None:
        """Keep a part of an adapter's weights.

        Args:
            offset: bytes before it; 0 begins anew.
            part: the bytes in base64.

        Raises:
            ValueError: a part before it is missing.
        """
        if offset == 0:
            self._received = bytearray()
        if self._received is None or len(self._received) != offset:
            raise ValueError(f"an adapter's part at byte {offset} does not follow the one before")
        self._received += b64decode(part)

    def write_adapter(self, run: str, version: str, config: str) -> str:
        """Write the adapter that was received, and return its folder.

        Other versions of the run are deleted.

        Args:
            config: content of ``adapter_config.json``.

        Raises:
            ValueError: nothing was received, or a name is none.
        """
        if self._received is None:
            raise ValueError("no adapter was received")
        home = _home(run)
        folder = home / _checked(version)
        home.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _replace(folder / "adapter_config.json", config.encode())
        _replace(folder / "adapter_model.safetensors", self._received)
        self._received = None
        for other in home.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return str(folder)

    def unused_adapter_modules(self) -> list[str]:
        """Return modules of the loaded adapters that this worker's part of the model has not.

        vLLM ignores them without a word.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        loaded, known = lora_modules(runner.lora_manager)
        return sorted(loaded - known)

    def delete_adapters(self, run: str) -> None:
        """Delete what `write_adapter` wrote for a run."""
        shutil.rmtree(_home(run), ignore_errors=True)


def _home(run: str) -> Path:
    return Path(tempfile.gettempdir()) / f"sparse-gkd-adapters-{_checked(run)}"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits and hyphens only")
    return name


def _replace(file: Path, data: bytes | bytearray) -> None:
    """Write a file that is whole at each moment, as other workers write it too."""
    number, beside = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(number, "wb") as output:
        output.write(data)
    Path(beside).replace(file)
