"""A checkpoint that training goes on from is data: none of its files runs code."""

import shutil

import pytest
import torch

from student_trainer.commands.main import main
from tests.unit.test_untrusted_checkpoints import Exploit


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(
    command, serving, whole, tmp_path, file, capsys
):
    output, mark = tmp_path / "out", tmp_path / "exploited"
    shutil.copytree(whole[0] / "checkpoint-2", output / "checkpoint-2")
    torch.save(Exploit(mark), output / "checkpoint-2" / file)
    with serving() as url:
        assert main(command(url, output)) == 1
    said = capsys.readouterr().err
    assert f"{output}/checkpoint-2" in said
    assert not mark.exists()
    torch.load(output / "checkpoint-2" / file, weights_only=False)  # the trap was set
    assert mark.exists()
