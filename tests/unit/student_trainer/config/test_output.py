"""An output folder of an earlier run is overwritten only when told to."""

import pytest

from shared.errors import ConfigurationError
from student_trainer.commands.main import main
from student_trainer.config.arguments import LoadedModel, ModelArguments, SFTFlags
from student_trainer.config.output import check_nothing_is_overwritten

MODEL = ("model.safetensors", "config.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_config.json")
SHARDS = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
CHECKPOINTS = ("checkpoint-9/trainer_state.json", "checkpoint-10/trainer_state.json")
UNFINISHED = ("_unfinished/checkpoint-1/x", "training_inputs.json", "_log_history.jsonl")


def folder_of(path, names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


def check(folder, model=None, **flags):
    check_nothing_is_overwritten(
        SFTFlags(output_dir=str(folder), **flags), model or ModelArguments("org/m")
    )


@pytest.mark.parametrize(
    ("names", "held", "remedy"),
    [
        (MODEL, "a trained model of", "give another folder, or replace what is there with --over"),
        (ADAPTERS, "a trained model of", "--overwrite_output_dir true"),
        (SHARDS, "a trained model of", "--overwrite_output_dir true"),
        (
            CHECKPOINTS, "2 checkpoints of an earlier run, the last of step 10",
            "or go on with --resume_from_checkpoint true, or replace",
        ),
        ((*MODEL, *CHECKPOINTS[:1]), "a trained model and 1 checkpoint of", "go on with"),
    ],
    ids=["model", "adapters", "shards", "checkpoints", "both"],
)  # fmt: skip
def test_a_folder_of_an_earlier_run_is_refused(tmp_path, names, held, remedy):
    folder = folder_of(tmp_path / "out", names)
    with pytest.raises(ConfigurationError) as caught:
        check(folder)
    assert str(caught.value).startswith(f"--output_dir {folder} holds {held}")
    assert remedy in str(caught.value)
    check(folder, overwrite_output_dir=True)


@pytest.mark.parametrize("names", [(), UNFINISHED, ("rows.jsonl", "config.json")])
def test_what_holds_no_weights_is_not_refused(tmp_path, names):
    check(folder_of(tmp_path / "out", names))
    check(tmp_path / "nothing here")


def test_a_run_that_goes_on_is_not_refused(tmp_path):
    folder = folder_of(tmp_path / "out", [*MODEL, *CHECKPOINTS])
    for resumed in ("true", "auto", str(folder / "checkpoint-9")):
        check(folder, resume_from_checkpoint=resumed)
    check(folder, resume_from_checkpoint="auto", overwrite_output_dir=True)


def test_one_that_goes_on_from_elsewhere_or_nothing_is(tmp_path):
    other = folder_of(tmp_path / "other", CHECKPOINTS)
    folder = folder_of(tmp_path / "out", MODEL)
    with pytest.raises(ConfigurationError, match="a trained model"):
        check(folder, resume_from_checkpoint=str(other / "checkpoint-9"))
    with pytest.raises(ConfigurationError, match="and no checkpoint to go on from"):
        check(folder, resume_from_checkpoint="auto")
    check(tmp_path / "new", resume_from_checkpoint=str(other / "checkpoint-9"))


def test_to_begin_anew_and_to_go_on_are_two_things(tmp_path):
    with pytest.raises(ConfigurationError, match="drop one of them"):
        check(tmp_path, resume_from_checkpoint="true", overwrite_output_dir=True)


@pytest.mark.parametrize("start", ["", "checkpoint-9"])
def test_the_model_that_a_run_begins_from_is_never_deleted(tmp_path, start):
    folder = folder_of(tmp_path / "out", [*MODEL, *CHECKPOINTS])
    model = ModelArguments(str(folder / start))
    with pytest.raises(ConfigurationError, match="would delete --model_name_or_path"):
        check(folder, model, overwrite_output_dir=True)
    model.loaded = LoadedModel(None, None)  # in memory
    check(folder, model, overwrite_output_dir=True)


def test_a_dry_run_says_it_too(tmp_path, capsys):
    """Before torch is imported: the model and the rows are not there."""
    folder = folder_of(tmp_path / "out", MODEL)
    base = folder_of(tmp_path / "base", ["config.json"])
    argv = f"--model_name_or_path {base} --dataset_name no.jsonl --output_dir {folder} --dry_run"
    assert main(["sft", *argv.split()]) == 2
    assert "holds a trained model of an earlier run: give another" in capsys.readouterr().err


def test_scores_are_not_overwritten(tmp_path, capsys):
    base = folder_of(tmp_path / "base", ["config.json"])
    folder = folder_of(tmp_path / "scores", ["results.json"])
    argv = f"--model_name_or_path {base} --suite gsm8k --output_dir {folder}".split()
    assert main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err
    assert f"--output_dir {folder} holds results.json of an earlier evaluation: give" in error
    assert "--overwrite_output_dir true" in error
