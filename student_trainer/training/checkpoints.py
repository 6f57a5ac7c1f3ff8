"""The writing and deleting of checkpoints, so that each is there whole or not at all.

A checkpoint is written into `unfinished`, where no search for checkpoints looks, and renamed when
it is whole. It is renamed before it is deleted too, since a deletion may be cut short.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from shared.errors import CheckpointError
from student_trainer.config.output import checkpoints_in, model_files_in
from student_trainer.runtime.compat import sort_checkpoints

_UNFINISHED = "_unfinished"  # the Trainer's upload of the output folder leaves out names with _
# Texts of the RuntimeErrors by which torch.save reports a full disk.
_NOT_WRITTEN = ("PytorchStreamWriter", "unexpected pos", "file write")


def unfinished(output: Path) -> Path:
    """Return the folder of checkpoints that are being written or deleted."""
    return output / _UNFINISHED


def remove_unfinished(output: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    shutil.rmtree(unfinished(output), ignore_errors=True)


def remove_earlier_run(output: Path) -> None:
    """Delete the model and the checkpoints that an earlier run left in ``output``."""
    for file in model_files_in(output):
        file.unlink(missing_ok=True)
    for checkpoint in checkpoints_in(output):
        _delete(output, checkpoint)


def publish(output: Path, name: str) -> None:
    """Make the checkpoint in `unfinished` durable, then let it appear in ``output``.

    A checkpoint of the same name is replaced: it is from before the run was resumed.
    """
    written, final = unfinished(output) / name, output / name
    for folder, _, files in os.walk(written):
        for file in files:
            _sync(Path(folder) / file)
        _sync(Path(folder))
    if final.exists():
        _delete(output, final)
    written.rename(final)
    _sync(output)


def keep_latest(output: Path, limit: int | None, *, newest: str, best: str | None) -> None:
    """Delete the oldest checkpoints over ``limit``, but never the newest or the best one."""
    if limit is None or limit <= 0:
        return
    kept = {str(output / newest)} | ({str(Path(best))} if best else set())
    found = sort_checkpoints(str(output), PREFIX_CHECKPOINT_DIR)
    spare = [path for path in found if path not in kept]
    for path in spare[: max(0, len(found) - max(limit, len(kept)))]:
        _delete(output, Path(path))


@contextmanager
def writing(what: str, output: Path) -> Iterator[None]:
    """Turn errors of a full disk inside the context into a plain one.

    Raises:
        CheckpointError: names the room left in ``output``, and the checkpoint to go on from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        disk_full = any(text in str(error) for text in _NOT_WRITTEN)
        if isinstance(error, RuntimeError) and not disk_full:
            raise
        remove_unfinished(output)
        last = get_last_checkpoint(output) if output.is_dir() else None
        free = shutil.disk_usage(output).free / 2**20 if output.is_dir() else 0.0
        raise CheckpointError(
            f"{what} could not be written in {output} ({free:.1f} MiB are free there): {error}. "
            "Make room or lower --save_total_limit, then give the same command with "
            f"--resume_from_checkpoint auto; the last good checkpoint is {last or 'none yet'}"
        ) from error


def _delete(output: Path, checkpoint: Path) -> None:
    aside = unfinished(output) / f"deleted-{checkpoint.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
