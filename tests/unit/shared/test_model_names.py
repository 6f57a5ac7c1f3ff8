"""A folder that is not there is not looked for on the Hub."""

import pytest

from shared.model_names import describe_missing, looks_local, models_below, near_path


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


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name in ("student/config.json", "runs/a/checkpoint-9/config.json", "runs/b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("studnet", "student"),
        ("./studnet", "./student"),
        ("prompt.jsonl", "prompts.jsonl"),
        ("run/a/checkpoint-9", "runs/a/checkpoint-9"),
        ("runs/a/checkpoint-90", "runs/a/checkpoint-9"),
    ],
)
def test_a_path_that_is_nearly_there_is_named(files, name, meant):
    assert near_path(name) == f" (did you mean {meant}?)"
    if "/" in name and not name.startswith("runs"):
        return
    assert describe_missing(f"./{name.removeprefix('./')}").endswith("?)")


@pytest.mark.parametrize(
    "name", ["student", "zebra", "run/zebra", "/no/such", "~nobody-9/a", "a" * 300, "", "x\0y"]
)
def test_a_path_like_no_other_is_not(files, name):
    assert near_path(name) == ""


def test_models_one_folder_deeper_are_named(files, tmp_path):
    assert models_below(tmp_path / "runs" / "a") == (
        f" (did you mean {tmp_path / 'runs' / 'a' / 'checkpoint-9'}?)"
    )
    assert models_below(tmp_path / "runs" / "b") == ""
    assert models_below(tmp_path / "nothing") == ""
