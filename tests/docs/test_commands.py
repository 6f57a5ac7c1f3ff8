"""Every command of README.md and docs/ is run, or at least read by its own parser.

Each page is one test, in a folder of its own, from the first command to the last: what one writes,
the next one reads. Hosts and models are replaced, and work is cut down, by the tables below. A
command that no rule covers fails; so do flags that do not exist or that contradict each other.
"""

import argparse
import gzip
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import student_trainer.commands.main
import student_trainer.commands.run_training
import teacher_server.cli
import teacher_server.serve
import teacher_server.settings
from shared.errors import ConfigurationError
from teacher_server.app import TeacherApp
from teacher_server.backends.transformers import TransformersBackend
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.flags import installed
from tests.support.models import save_model, save_tokenizer
from tests.support.server import serving
from tests.support.vllm import VLLM

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]

# What stands in the text -> what is there instead. {url} is the address of a tiny teacher.
REPLACED = {
    "deepseek-ai/deepseek-coder-33b-instruct": "TEACHER",
    "deepseek-ai/deepseek-coder-6.7b-instruct": "STUDENT",
    "org/TEACHER": "TEACHER",
    "Qwen/Qwen2.5-7B-Instruct": "TEACHER",
    "Qwen/Qwen2.5-0.5B-Instruct": "STUDENT",
    "Qwen/Qwen2.5-1.5B-Instruct": "STUDENT",
    "openai/gsm8k --dataset_config main": "gsm8k_train.jsonl",
    "HuggingFaceH4/ultrachat_200k": "data.jsonl",
    "http://localhost:8000": "{url}",
    "http://teacher-host:8000": "{url}",
    "http://teacher-1:8000": "{url}",
    "http://teacher-2:8000": "{url}",
    "/shared/": "./",
    "distill …": "distill --model_name_or_path STUDENT --dataset_name data.jsonl --output_dir out"
    " --teacher_url {url}",
}
# Added to a training, or given instead of what is written.
SHRUNKEN = {
    "--max_steps": "1",
    "--per_device_train_batch_size": "2",
    "--gradient_accumulation_steps": "1",
    "--max_new_tokens": "4",
    "--teacher_timeout": "30",
    "--report_to": "none",
}
SHRUNKEN_IF_GIVEN = {"--eval_steps": "1", "--save_steps": "1", "--max_length": "128"}
SHRUNKEN_EVALUATION = {"--max_new_tokens": "4", "--limit": "2"}
# Cannot run here: flags are read and checked, and that is all.
ONLY_CHECKED = (
    "--teacher_protocol vllm", "--rollout_engine vllm", "--rollout_url",
    "--load_in_4bit", "--push_to_hub",
)  # fmt: skip
# Not run at all, since what they do is done by the test's own surroundings.
NOT_RUN = ("source .venv/bin/activate",)

# A line of a page that is indented as code is a command if it begins so.
_PROGRAMS = ("python ", "student-trainer ", "teacher-server ", "torchrun ", "accelerate ", "make ")
_SHELL = ("", "bash", "sh", "console", "shell")


@dataclass(frozen=True)
class Code:
    """A fenced block, or a run of indented lines that are commands."""

    language: str
    line: int
    text: str


def blocks(markdown):
    """The code of a page, in order."""
    lines, found = markdown.splitlines(), []
    number = 0
    while number < len(lines):
        if fence := re.match(r"( *)```(\w*)", lines[number]):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            inside = [line.removeprefix(fence[1]) for line in lines[number + 1 : end]]
            found.append(Code(fence[2], number + 2, "\n".join(inside)))
            number = end
        elif lines[number].startswith("    ") and lines[number].strip().startswith(_PROGRAMS):
            found.append(Code("", number + 1, lines[number].strip()))
        number += 1
    return found


def commands(code):
    """Each command of a block of shell: continued lines are joined, comments are left out."""
    found, lines = [], iter(code.text.replace("\\\n", " ").splitlines())
    for line in lines:
        line = line.strip().removeprefix("$ ")
        if heredoc := re.search(r"<<'(\w+)'$", line):
            body = []
            while (more := next(lines)) != heredoc[1]:
                body.append(more)
            found.append("\n".join([line, *body, heredoc[1]]))
        elif line and not line.startswith("#"):
            line = re.sub(r"\s+# .*$", "", line)
            found += [" ".join(part.split()) for part in re.split(r" && ", line)]
    return found


class ParsedError(Exception):
    """Raised where a program has read its arguments and would begin to work."""


class Page:
    """Runs the commands of one page."""

    def __init__(self, url, stack, monkeypatch):
        self.url, self.stack, self.monkeypatch = url, stack, monkeypatch

    def run(self, command):
        """Raises where it fails; ``"parsed"`` for what was not really run."""
        if command.startswith(NOT_RUN):
            return "not run"
        text = command
        for written, instead in REPLACED.items():
            text = text.replace(written, instead.format(url=self.url))
        for beginning, rule in RULES.items():
            if re.match(beginning, text):
                return rule(self, text)
        raise AssertionError(f"no rule of this test covers: {command}")

    def shell(self, text):
        done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def export(self, text):
        for name in re.findall(r"(\w+)=", text):
            printed = subprocess.run(
                ["bash", "-ec", f'{text}; printf %s "${name}"'], capture_output=True, text=True
            ).stdout
            assert printed
            self.monkeypatch.setenv(name, printed)

    def setting(self, text):
        """A line of .env."""
        assert f"#{text.split('=')[0]}=" in (ROOT / ".env.example").read_text()
        return "parsed"

    def batch(self, text):
        """A script for Slurm, which is not here: its syntax."""
        self.shell(f"bash -n {shlex.split(text)[-1]}")
        return "parsed"

    def kubectl(self, text):
        """There is no cluster: what it reads exists."""
        files = [word for word in shlex.split(text) if word.startswith("examples/")]
        assert [file for file in files if not Path(file).exists()] == []
        return "parsed"

    def completion(self, text):
        """`eval "$(student-trainer …)"` and `source <(student-trainer …)`."""
        return self.trainer(re.search(r"\((.+)\)", text)[1])

    def make(self, text):
        subprocess.run([*shlex.split(text), "--dry-run"], check=True, capture_output=True, cwd=ROOT)
        return "parsed"

    def lm_eval(self, text):
        """Read by its own parser; `tests/e2e/test_lm_eval.py` runs those that measure."""
        from lm_eval._cli import HarnessCLI

        with mock.patch.object(sys, "argv", shlex.split(text)):
            HarnessCLI().parse_args()
        return "parsed"

    def pip(self, text):
        words = iter(shlex.split(text)[2:])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in words:
            if word in ("-c", "-r"):
                assert (ROOT / next(words)).exists()
            else:
                extras = Requirement(re.sub(r"^\.", known["name"], word)).extras
                assert extras <= set(known["optional-dependencies"])
        return "parsed"

    def openssl(self, text):
        if shutil.which("openssl") is None:
            return "parsed"
        return self.shell(text)

    def curl(self, text):
        if shutil.which("curl") is None:
            return "parsed"
        return self.shell(text.replace("curl ", "curl --silent --show-error --fail ", 1))

    def compose(self, text):
        profile = re.search(r"--profile (\w+)", text)
        after = shlex.split(re.split(r" (?:up|down|logs|build)(?: |$)", text)[1])
        services = {word for word in after if not word.startswith("-")}
        assert services <= compose_services(profile and profile[1])
        return "parsed"

    def trainer(self, text):
        words = shlex.split(text.split(" > ")[0])
        return self.train(words[1 if words[0] == "student-trainer" else 3 :])

    def torchrun(self, text):
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(shlex.split(text)[1:])
        assert launched.module
        assert launched.training_script == "student_trainer"
        return self.train(launched.training_script_args)

    def accelerate(self, text):
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(shlex.split(text)[2:])
        assert launched.module
        assert launched.training_script == "student_trainer"
        return self.train(launched.training_script_args)

    def train(self, words):
        words = [*words]
        joined = " ".join(words)
        for flag, value in SHRUNKEN_IF_GIVEN.items():
            if flag in words:
                words[words.index(flag) + 1] = value
        if words[0] in ("sft", "distill", "precompute"):
            flags = dict(SHRUNKEN)
            if words[0] == "sft":
                del flags["--teacher_timeout"]
            words += [word for pair in flags.items() for word in pair]
        if words[0] == "study":
            words.append("--dry_run")
        if words[0] == "evaluate":
            words += [word for pair in SHRUNKEN_EVALUATION.items() for word in pair]
        if not any(flags in joined for flags in ONLY_CHECKED):
            assert student_trainer.commands.main.main(words) == 0, words
            return "ran"
        with (
            installed("vllm"),
            mock.patch.object(
                student_trainer.commands.run_training, "read_rows", side_effect=ParsedError
            ),
            pytest.raises(ParsedError),
        ):
            student_trainer.commands.main.main(words)
        return "parsed"

    def serve(self, text):
        settings = settings_of(shlex.split(text)[1:])
        if settings.backend != "transformers":
            return "parsed"
        # As the command does, but in this process, at a free port.
        app = TeacherApp(settings, Metrics(), ApiKeys([]))
        app.ready(TransformersBackend(settings, app.metrics))
        self.url = self.stack.enter_context(serving(app))
        return "ran"

    def bench(self, text):
        assert (
            teacher_server.cli.main([*shlex.split(text)[1:], "--quick", "--num-prompts", "1"]) == 0
        )

    def stock_vllm(self, text):
        """`vllm serve`: its flags are read, where vLLM is."""
        if importlib.util.find_spec("vllm") is not None:
            cli_args = import_module("vllm.entrypoints.launchers.cli_args")
            parser = import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
            cli_args.make_arg_parser(parser).parse_args(shlex.split(text.partition("serve ")[2]))
        return "parsed"

    def prepare(self, text):
        """The example's data, of which a few rows are kept."""
        with mock.patch.object(sys, "argv", shlex.split(text)[2:]):
            import_module("examples.mini_humaneval.prepare").main()
        for path in Path(text.split("--output_dir ")[1].split()[0]).glob("*.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))

    def module(self, text):
        """`python -m benchmarks.…`, up to where its arguments are read."""
        words = shlex.split(text)[2:]
        parse = argparse.ArgumentParser.parse_args

        def read(parser, *arguments, **options):
            parse(parser, *arguments, **options)
            raise ParsedError

        with (
            mock.patch.object(sys, "argv", words),
            mock.patch.object(argparse.ArgumentParser, "parse_args", read),
            pytest.raises(ParsedError),
        ):
            import_module(words[0]).main()
        return "parsed"


# The first that matches the beginning of a command.
RULES = {
    r"student-trainer |python -m student_trainer ": Page.trainer,
    r"accelerate launch ": Page.accelerate,
    r"torchrun ": Page.torchrun,
    r"teacher-server serve ": Page.serve,
    r"teacher-server bench ": Page.bench,
    r"vllm serve ": Page.stock_vllm,
    r"python -m examples\.mini_humaneval\.prepare ": Page.prepare,
    r"python -m (benchmarks|examples)\.": Page.module,
    r"curl ": Page.curl,
    r"lm-eval ": Page.lm_eval,
    r"make ": Page.make,
    r"pip install ": Page.pip,
    r"docker compose ": Page.compose,
    r"openssl ": Page.openssl,
    r"export ": Page.export,
    r"(cat > |chmod )": Page.shell,
    r'(eval "\$|source <)\(student-trainer ': Page.completion,
    r'(\w+=("[^"]*"|\S+) )*sbatch ': Page.batch,
    r"kubectl ": Page.kubectl,
    r"VLLM_SERVER_DEV_MODE=1 vllm serve ": Page.stock_vllm,
    r"[A-Z_]+=": Page.setting,
}


def settings_of(words):
    """Return the settings that `teacher-server` makes of arguments, keys and certificates."""
    with (
        mock.patch.object(teacher_server.serve, "listen", side_effect=ConfigurationError) as listen,
        # Flags of vLLM's engine have a test of their own.
        mock.patch.object(teacher_server.settings, "find_spec", return_value=True),
    ):
        teacher_server.cli.main(words)
    return listen.call_args.args[0]


def compose_services(profile):
    """The services that docker compose knows under a profile."""
    if shutil.which("docker-compose"):
        command = ["docker-compose", "--file", str(ROOT / "docker-compose.yml")]
        command += ["--profile", profile] if profile else []
        listed = subprocess.run([*command, "config", "--services"], capture_output=True, text=True)
        assert listed.returncode == 0, listed.stderr
        return set(listed.stdout.split())
    described = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return {n for n, of in described.items() if profile in of.get("profiles", [profile])}


def conversation(user, assistant):
    turns = (("user", user), ("assistant", assistant))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# Under the names that the pages use.
ROWS = {
    "data.jsonl": [conversation(f"abc{i}", f"def{i}") for i in range(8)],
    "held_out.jsonl": [conversation(f"ghi{i}", f"jkl{i}") for i in range(4)],
    "gsm8k_train.jsonl": [{"question": f"1 + {i}?", "answer": f"#### {1 + i}"} for i in range(8)],
    "HumanEval.jsonl.gz": [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": "def f(x):\n",
            "entry_point": "f",
            "canonical_solution": "    return x\n",
            "test": f"def check(candidate):\n    assert candidate({i}) == {i}\n",
        }
        for i in range(3)
    ],
}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """A folder with what the pages take for granted, and the address of a teacher."""
    folder = tmp_path_factory.mktemp("pages")
    for name, hidden_size in (("STUDENT", 16), ("TEACHER", 32)):
        save_tokenizer(folder / name)
        save_model(folder / name, hidden_size=hidden_size)
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with (gzip.open if name.endswith(".gz") else open)(folder / name, "wt") as file:
            file.write(text)
    (folder / "teacher.key").write_text("k" * 64 + "\n")
    (folder / "run").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    settings = Settings(str(folder / "TEACHER"))
    app = TeacherApp(settings, Metrics(), ApiKeys([]))
    app.ready(TransformersBackend(settings, app.metrics))
    with serving(app) as url:
        yield folder, url


@pytest.mark.parametrize("path", PAGES)
def test_the_commands_of_a_page_run(path, surroundings, tmp_path, monkeypatch):
    code = blocks((ROOT / path).read_text())
    shell = [command for block in code if block.language in _SHELL for command in commands(block)]
    folder, url = surroundings
    shutil.copytree(folder, tmp_path / "page", symlinks=True)
    monkeypatch.chdir(tmp_path / "page")
    with ExitStack() as stack:
        page = Page(url, stack, monkeypatch)
        for command in shell:
            page.run(command)


def test_the_loss_alone_runs():
    page = (ROOT / "docs" / "how-to" / "python-api.md").read_text()
    (code,) = (b for b in blocks(page) if "SparseDistribution(" in b.text)
    logprobs = torch.randn(6, 9).log_softmax(-1)  # [N, V]
    names = {
        "token_ids": torch.arange(4).expand(6, 4),
        "logprobs": logprobs[:, :4],
        "tail_logprob": logprobs[:, 4:].logsumexp(-1),
        "hidden": torch.randn(6, 3, requires_grad=True),
        "weight": torch.randn(9, 3, requires_grad=True),
    }
    exec(code.text, names)
    assert names["loss"] > 0
    assert names["hidden"].grad.abs().sum() > 0


def test_the_code_of_the_notebook_page_runs(surroundings, tmp_path, monkeypatch):
    """All but the teacher's process, for which one is served here, and the chart."""
    page = (ROOT / "docs" / "tutorials" / "notebook.md").read_text()
    code = [block.text for block in blocks(page) if block.language == "python"]
    cells = [text for text in code if not re.search(r"subprocess|matplotlib|teacher\.wait", text)]
    assert len(code) - len(cells) == 3
    folder, url = surroundings
    shutil.copytree(folder, tmp_path / "page", symlinks=True)
    monkeypatch.chdir(tmp_path / "page")
    names = {}
    for cell in cells:
        exec(cell.replace("http://localhost:8000", url), names)
    assert names["scored"].scores.logprobs.shape == (3, 8)  # two bytes and the end
    assert names["result"].metrics["train/divergence"] > 0
    assert "divergence" in repr(names["result"])
    assert (tmp_path / "page" / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("mark", [pytest.param("", marks=VLLM)])
def test_the_engine_flags_of_all_pages_are_vllms(surroundings, monkeypatch, mark):
    from teacher_server.backends.vllm_engine import engine_arguments

    monkeypatch.chdir(surroundings[0])
    found = 0
    for path in PAGES:
        for block in blocks((ROOT / path).read_text()):
            for command in commands(block) if block.language in _SHELL else ():
                if not command.startswith("teacher-server serve ") or "--lora-" in command:
                    continue
                flags = shlex.split(command)[3:]
                settings = settings_of(["serve", "TEACHER", *flags])
                if settings.engine_flags:
                    engine_arguments(settings)
                    found += 1
    assert found
