"""The files that hold the rows of a dataset's name, and their formats; none is opened here."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from shared.errors import DatasetError
from shared.model_names import looks_local

TABLES = {".csv": ",", ".tsv": "\t"}
ARROW = {".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_FORMATS = (".jsonl", ".ndjson", ".json", *TABLES, *ARROW)
READABLE = f"{', '.join(_FORMATS)} (text also with {', '.join(_COMPRESSED)})"
# Files that `datasets` and the Hub put beside the rows.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
    "evaluation": "test", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation",
}  # fmt: skip


def is_hub_id(name: str) -> bool:
    """Return whether a name is a Hub id: it does not exist as a path, and does not look like one.

    Raises:
        DatasetError: it looks like a path, but there is no such file or folder.
    """
    path = Path(name).expanduser()
    if path.exists() or glob.has_magic(name):
        return False
    if format_of(path) or looks_local(name):
        raise DatasetError(
            f"{name}: no such file or folder; give a file ({READABLE}), a folder of them, a glob, "
            "or a Hub id"
        )
    return True


def is_saved(path: Path) -> bool:
    """Return whether a path is a folder of `save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def files_of(name: str, split: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a path or glob in the order of reading, and those of other splits.

    Raises:
        DatasetError: there is no file of rows.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path], []
    if path.is_dir():
        return _files_in(path, split)
    if path.exists():
        raise DatasetError(f"{name} is neither a file nor a folder")
    found = sorted(map(Path, glob.iglob(str(path), recursive=True)))  # noqa: PTH207
    files = [file for file in found if file.is_file()]
    if not files:
        raise DatasetError(f"{name}: the pattern matches no file")
    return files, []


def format_of(path: Path) -> str | None:
    """Return the suffix that names a file's format, without compression; None if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSED:
        inner = suffixes[0] if len(suffixes) == 2 else ""
        return inner if inner in _FORMATS and inner not in ARROW else None
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _files_in(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and format_of(path) and path.name not in _ABOUT
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DatasetError(f"{folder}: the folder holds no file of rows ({READABLE})")
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(named.values()):
        return files, []
    wanted = [path for path in files if named[path] == _SPLITS.get(split, split)]
    if not wanted:
        raise DatasetError(
            f"{folder} has no file of the split {split!r}; its files are of "
            f"{', '.join(sorted({found for found in named.values() if found}))}"
        )
    return wanted, [path for path in files if path not in wanted]


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name or folder names, as `datasets` reads it; or None."""
    for part in reversed(path.parts):
        for word in re.findall(r"[a-z]+", part.lower().split(".")[0]):
            if word in _SPLITS:
                return _SPLITS[word]
    return None
