"""Folders that cannot be written to are told before anything loads."""

from pathlib import Path

import pytest

from shared.errors import ConfigurationError, DatasetError
from student_trainer.config.arguments import DatasetArguments, ModelArguments
from student_trainer.config.checks import check_model
from student_trainer.config.files import check_output_folder, check_rows_exist


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=f"{tmp_path / 'file'} is no folder that can be"):
        check_output_folder(str(tmp_path / "file" / "out"))


def test_one_that_could_be_made_is_not_made(tmp_path, monkeypatch):
    check_output_folder(str(tmp_path / "a" / "b"))
    monkeypatch.chdir(tmp_path)
    check_output_folder("c/d")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_where_not_even_root_makes_one_is_refused():
    with pytest.raises(ConfigurationError, match="/proc is no folder that can be written to"):
        check_output_folder("/proc/out")


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigurationError, match="give another"):
        check_output_folder(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-9/a.jsonl"], ids=["long", "no home"])
def test_names_that_the_system_refuses_are_missing_and_no_traceback(name):
    with pytest.raises(DatasetError, match="no such file or folder"):
        check_rows_exist(DatasetArguments(dataset_name=[name]))
    with pytest.raises(ConfigurationError, match="does not exist"):
        check_model(ModelArguments(model_name_or_path=name))
    check_output_folder(name)
