"""A folder that is not there is not looked for on the Hub."""

import pytest

from shared.model_names import describe_missing, looks_local


@pytest.mark.parametrize(
    "name",
    ["./models/foo", "/nowhere/foo", "~/foo", "a/b/c", "runs/x", "models/x", "here/x", "a b", "x/",
     "C:\\models\\x", "a" * 300, "~nobody-9/foo"],
)  # fmt: skip
def test_a_name_that_can_only_be_a_folder_is_called_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert looks_local(name)
    assert describe_missing(name) == f"folder {name} does not exist"


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B", "org/model_1.5-x"])
def test_a_hub_id_is_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_local(name)
    assert describe_missing(name) == ""


def test_what_is_there_is_not_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foo").mkdir()
    assert describe_missing("./foo") == describe_missing("foo", owner=True) == ""
    assert describe_missing("bar", owner=True) == "folder bar does not exist"
