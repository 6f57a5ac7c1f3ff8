"""A disk that takes no more: a small one of memory, really mounted and really filled."""

import subprocess

import pytest

from student_trainer.commands.main import main
from tests.support.trainer_process import assert_same_weights, checkpoints

MIB = 2**20


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def size(checkpoint, *names):
    """Bytes that files take on a disk of pages; of all, if none is named."""
    files = [file for file in checkpoint.iterdir() if not names or file.name in names]
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(
    command, serving, whole, disk, capsys, file
):
    """Two checkpoints fit, and of the third one's ``file`` only a part."""
    one = whole[0] / "checkpoint-2"
    before = () if file == "model.safetensors" else ("config.json", "model.safetensors")
    room = 2 * size(one) + size(one, *before) * bool(before) + size(one, file) // 2
    ballast, output = disk / "ballast", disk / "out"
    ballast.write_bytes(bytes(4 * MIB - room))
    with serving() as url:
        words = command(url, output)
        assert main(words) == 1
        said = capsys.readouterr().err
        assert f"the checkpoint after step 6 could not be written in {output} (" in said
        assert f"the last good checkpoint is {output}/checkpoint-4" in said
        assert checkpoints(output) == [2, 4]
        assert not list(output.glob("_unfinished/*"))
        ballast.unlink()
        assert main(words) == 0
    assert_same_weights(whole[0], output)


def test_a_trained_model_that_does_not_fit_is_told(command, serving, whole, disk, capsys):
    one = whole[0] / "checkpoint-2"
    ballast, output = disk / "ballast", disk / "out"
    ballast.write_bytes(bytes(4 * MIB - size(one) - size(one, "model.safetensors") // 2))
    with serving() as url:
        words = command(url, output, save_steps=10, save_total_limit=1)
        assert main(words) == 1
        said = capsys.readouterr().err
        assert f"the trained model could not be written in {output} (" in said
        ballast.unlink()
        assert main(words) == 0
    assert_same_weights(whole[0], output)
