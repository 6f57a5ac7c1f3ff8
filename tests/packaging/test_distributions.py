"""The built distributions are complete: they install elsewhere, and both commands start."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, **options):
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a wheel and an sdist of the tracked files."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", str(source))
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel in a folder of its own; its requirements are this environment's."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, f"--target={folder}", str(wheel))
    return folder


def test_the_wheel_holds_the_three_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {"shared", "teacher_server", "student_trainer"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    # Data files too: whatever is tracked.
    ours = set(run("git", "ls-files", *packages, cwd=ROOT).split("\n")) - {""}
    assert len({Path(name).suffix for name in ours}) > 1
    assert {name for name in names if ".dist-info" not in name} == ours


def test_the_sdist_carries_licence_and_readme(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "shared/protocol.py"} <= names
    assert {"CHANGELOG.md", "constraints.txt", "constraints-oldest.txt"} <= names


@pytest.mark.parametrize("module", ["teacher_server", "student_trainer"])
def test_both_commands_start_from_the_installed_wheel(installed, tmp_path, module):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    script = str(installed / "bin" / module.replace("_", "-"))
    for words in ([sys.executable, "-m", module], [sys.executable, script]):
        text = run(*words, "--version", cwd=tmp_path, env=environment)
        assert text == f"{module.replace('_', '-')} 0.1.0\n"
        assert "usage:" in run(*words, "--help", cwd=tmp_path, env=environment)
    where = f"import {module}; print({module}.__file__)"
    assert str(installed) in run(sys.executable, "-c", where, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("command", ["sft", "distill", "evaluate"])
def test_every_command_lists_its_flags(installed, tmp_path, command):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-m", "student_trainer", command, "--help"]
    text = run(*words, cwd=tmp_path, env=environment)
    assert "--model_name_or_path" in text
    assert "--dataset_name" in text
