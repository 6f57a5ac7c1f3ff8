"""The page for users of TRL names flags of ours that exist, and arguments that TRL has."""

import ast
import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import TrainingArguments

from student_trainer.config.flags import flags_of
from student_trainer.config.parse import ARGUMENTS
from teacher_server import cli
from tests.support.repository import ROOT

PAGE = (ROOT / "docs/how-to/from-trl.md").read_text()
TABLES = [line for line in PAGE.split("\n") if line.startswith("| ")]
# TRL's side is in the first column, ours in the second.
ROWS = [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in TABLES]
TEXT = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
# A column of a dataset, and a number in a model's configuration.
_NO_ARGUMENTS = {"teacher_id", "vocab_size"}


def of_training_arguments():
    return {one.name for one in dataclasses.fields(TrainingArguments)}


@pytest.fixture(scope="module")
def trl():
    """The names of all arguments of TRL's distillation trainers, read without importing them."""
    if (spec := find_spec("trl")) is None:
        pytest.skip("TRL is not installed")
    root = Path(spec.submodule_search_locations[0])
    experimental = ("gkd", "gold", "server_distillation", "async_distillation")
    files = [*(root / "trainer").glob("*.py")]
    files += [file for name in experimental for file in (root / "experimental" / name).glob("*.py")]
    names = of_training_arguments()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                fields = (one for one in node.body if isinstance(one, ast.AnnAssign))
                names |= {one.target.id for one in fields}
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                names |= {argument.arg for argument in node.args.args}
    return names


@pytest.fixture(scope="module")
def ours():
    """The flags of `distill` and of `teacher-server serve`."""
    trainer = {name for kind in ARGUMENTS["distill"] for name in flags_of(kind)}
    _, serve = cli._parsers()
    return {f"--{name}" for name in trainer | of_training_arguments()} | {
        option for action in serve._actions for option in action.option_strings
    }


def test_each_flag_of_ours_exists(ours):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE))
    assert len(named) > 30
    assert named - ours == set()


def test_each_argument_of_trl_exists(trl):
    code = [name for line in ROWS for name in _CODE.findall(line[0])]
    code += [name.partition("=")[0] for name in _CODE.findall(TEXT) if "_" in name]
    named = {name for name in code if re.fullmatch(r"[a-z_0-9]+", name)} - _NO_ARGUMENTS
    assert len(named) > 30
    assert named - trl == set()


@pytest.mark.parametrize("flag", ["--rollout_url", "--rollout_engine", "--teacher_url"])
def test_what_has_a_counterpart_has_a_row(flag):
    assert any(f"`{flag}" in line[1] for line in ROWS)
