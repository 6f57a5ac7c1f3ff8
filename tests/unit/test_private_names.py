"""Private names of other people's code stand in the compat files, and nowhere else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPAT = (
    "shared/compat.py",
    "student_trainer/runtime/compat.py",
    "teacher_server/backends/compat.py",
)
# They run in the sandbox's interpreter, where none of these files is.
ALONE = ("student_trainer/evaluation/_harness.py", "student_trainer/evaluation/_fences.py")
# `os._exit` and a named tuple's `_asdict` are documented; the last is ours, put on a model.
ALLOWED = {"_exit", "_asdict", "_forward_before"}

# They use what another function of the file names.
WITHOUT_NAMES = {"replace_prompt_logprobs_method", "checked_method"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_its_own(tree: ast.Module) -> set[str]:
    """Return the private names that a module defines: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                names.add(node.attr)
    return names


def names_read(tree: ast.Module):
    """Yield (line number, private name) of attributes, also of those that `getattr` names."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name):
                yield node.lineno, name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if is_private(name):
                yield node.lineno, name


@pytest.mark.parametrize("package", ["shared", "student_trainer", "teacher_server"])
def test_private_names_of_others_are_in_the_compat_files(package):
    files = sorted((ROOT / package).rglob("*.py"))
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}
    ours = set().union(*map(names_of_its_own, trees.values())) | ALLOWED
    found = [
        f"{file}:{number}: {name}"
        for file, tree in trees.items()
        if file not in (*COMPAT, *ALONE)
        for number, name in names_read(tree)
        if name not in ours
    ]
    assert found == []


@pytest.mark.parametrize("name", COMPAT)
def test_a_compat_file_imports_neither_torch_nor_transformers(name):
    tree = ast.parse((ROOT / name).read_text())
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in imported for alias in node.names} | {
        node.module for node in imported if isinstance(node, ast.ImportFrom)
    }
    assert {str(module).split(".")[0] for module in modules} & {"torch", "transformers"} == set()


@pytest.mark.parametrize("name", COMPAT)
def test_each_function_names_the_version_that_it_was_read_from(name):
    tree = ast.parse((ROOT / name).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in WITHOUT_NAMES:
            assert ", from " in (ast.get_docstring(node) or ""), node.name
