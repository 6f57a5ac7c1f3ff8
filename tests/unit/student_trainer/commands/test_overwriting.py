"""A run that may overwrite an earlier one leaves nothing of it; one that ends leaves no scratch."""

import pytest

from student_trainer.commands.main import main
from tests.support.world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def sft(world, output, **options):
    flags = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "report_to": "none",
        "output_dir": output, "save_steps": 1, "max_steps": 2, **options,
    }  # fmt: skip
    return main(["sft", *(f"--{name}={value}" for name, value in flags.items())])


def test_nothing_of_an_earlier_run_is_left(world, tmp_path, capsys):
    """Adapters replace a whole model, which would else be the one that is loaded."""
    out = tmp_path / "out"
    assert sft(world, out) == 0
    assert not (out / "_unfinished").exists()
    before = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "checkpoint-1", "checkpoint-2"} <= before
    assert sft(world, out, use_peft=True, max_steps=1) == 2
    assert "holds a trained model and 2 checkpoints of an earlier run" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == before
    assert sft(world, out, use_peft=True, max_steps=1, overwrite_output_dir=True) == 0
    after = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "checkpoint-1"} <= after
    assert not {"model.safetensors", "config.json", "checkpoint-2", "_unfinished"} & after


def test_one_that_cannot_begin_leaves_the_earlier_run_whole(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert sft(world, out, max_steps=1) == 0
    before = sorted(out.iterdir())
    assert sft(world, out, dataset_name="none.jsonl", overwrite_output_dir=True) == 2
    monkeypatch.setattr(
        "student_trainer.training.recipe.load_student", lambda *_, **__: 1 / 0, raising=True
    )
    with pytest.raises(ZeroDivisionError):
        sft(world, out, overwrite_output_dir=True)
    assert sorted(out.iterdir()) == before
