"""Several named teachers, adapters of one server among them, teach one student by rows."""

import json
import signal

import pytest
from peft import LoraConfig, get_peft_model

from student_trainer.commands.main import main
from tests.e2e.test_distillation import flags, history
from tests.support.http import until
from tests.support.reference import load_model
from tests.support.server import running_server, server_running
from tests.support.trainer_process import assert_same_weights, running

NAMES = ("math", "code")
METRICS = (
    "train/divergence/{}", "teacher/top_k_mass/{}", "teacher/tokens_per_second/{}",
    "time/teacher/{}",
)  # fmt: skip


@pytest.fixture(scope="module")
def experts(unserved_world, tmp_path_factory):
    """Two adapters of the world's teacher, as ``--lora-modules`` takes them."""
    modules = []
    for name in NAMES:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
        folder = tmp_path_factory.mktemp(name)
        get_peft_model(load_model(unserved_world.teacher), config).save_pretrained(folder)
        modules.append(f"{name}={folder}")
    return modules


@pytest.fixture(scope="module")
def served(unserved_world, experts):
    """A server of both adapters that computes each sequence alone: runs are compared to the bit."""
    arguments = ("--max-batch-tokens", "1", "--lora-modules", *experts)
    with running_server(unserved_world.teacher, *arguments) as url:
        yield url


@pytest.fixture(scope="module")
def rows(unserved_world, tmp_path_factory):
    """The world's rows, every third of them the coder's."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.loads(line) for line in unserved_world.rows.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["teacher"] = NAMES[number % 3 == 2]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def words(world, output, served, rows, **options):
    settings = {"top_k_logprobs": 16, "max_steps": 6, "dataset_name": rows, **options}
    urls = [f"{name}={served}" for name in NAMES]
    return ["distill", *flags(world, output, **settings), "--teacher_url", *urls]


@pytest.mark.parametrize("method", [{"lmbda": 0}, {"lmbda": 0, "seq_kd": "true"}, {"lmbda": 1}])
def test_each_row_is_learned_from_its_own_teacher(
    unserved_world, tmp_path, served, rows, experts, method
):
    measured = {"eval_dataset_name": rows, "eval_strategy": "steps", "eval_steps": 6}
    argv = words(unserved_world, tmp_path / "both", served, rows, **measured, **method)
    assert main(argv) == 0
    logged = [e for e in history(tmp_path / "both") if "train/loss" in e]
    assert all(name.format(teacher) in logged[-1] for name in METRICS for teacher in NAMES)
    held_out = [e for e in history(tmp_path / "both") if "eval/divergence" in e]
    assert len(held_out) == 1
    assert all(f"eval/divergence/{name}" in held_out[0] for name in NAMES)
    assert "eval/context_divergence" not in held_out[0]
    # Together they are what is logged without names: rows of each, by their tokens.
    for entry in logged:
        low, high = sorted(entry[f"train/divergence/{name}"] for name in NAMES)
        assert low <= entry["train/divergence"] <= high
    inputs = json.loads((tmp_path / "both" / "training_inputs.json").read_text())["same"]
    assert inputs["the teacher math's weights"] != inputs["the teacher code's weights"]
    card = (tmp_path / "both" / "README.md").read_text()
    assert "`math`: `math` (" in card
    assert "`code`: `code` (" in card


def test_a_teacher_of_all_rows_is_one_without_a_name(
    unserved_world, tmp_path, served, rows, experts
):
    """The same adapter as the only teacher, by its model's name, gives the same weights."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    mine = tmp_path / "math.jsonl"
    mine.write_text("".join(json.dumps({**one, "teacher": None}) + "\n" for one in lines))
    options = {"top_k_logprobs": 16, "max_steps": 4, "dataset_name": mine, "lmbda": 0.5}
    for name, url in (("one", f"{served}#math"), ("named", f"math={served}")):
        argv = flags(unserved_world, tmp_path / name, **options, teacher_url=url)
        assert main(["distill", *argv]) == 0
    assert_same_weights(tmp_path / "one", tmp_path / "named")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_column": "who"}, "code=…: no row has this teacher"),
        ({"dataset_teacher": "art"}, "--dataset_teacher art: no --teacher_url has this name"),
    ],
)
def test_teachers_that_rows_and_flags_do_not_agree_on_end_the_run_at_its_start(
    unserved_world, tmp_path, served, rows, capsys, change, message
):
    assert main(words(unserved_world, tmp_path / "out", served, rows, lmbda=0, **change)) == 2
    assert message in capsys.readouterr().err


def test_a_row_of_an_unknown_teacher_is_named(unserved_world, tmp_path, served, rows, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(rows.read_text().replace('"code"', '"coder"', 1))
    assert main(words(unserved_world, tmp_path / "out", served, file, lmbda=0)) == 2
    assert "rows.jsonl:3: teacher 'coder'" in capsys.readouterr().err


def test_a_server_that_does_not_serve_the_teacher_says_what_it_serves(
    unserved_world, tmp_path, served, rows, capsys
):
    argv = words(unserved_world, tmp_path / "out", served, rows, lmbda=0)[:-2]
    assert main([*argv, f"math={served}#maths", f"code={served}"]) != 0
    error = capsys.readouterr().err
    assert "serves no model maths; it serves" in error
    assert f"math={served}#MODEL" in error


def test_answers_of_each_teacher_are_kept_apart_and_a_run_needs_no_teacher_then(
    unserved_world, tmp_path, served, rows
):
    cache = {"lmbda": 0, "teacher_cache": tmp_path / "cache"}
    asked = words(unserved_world, tmp_path / "asked", served, rows, **cache)
    assert main(["precompute", *asked[1:]]) == 0
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert main(asked) == 0
    gone = words(unserved_world, tmp_path / "gone", "http://127.0.0.1:9", rows, **cache)
    assert main(gone) == 0
    assert_same_weights(tmp_path / "asked", tmp_path / "gone")


def test_a_replica_of_one_teacher_that_is_killed_changes_nothing(
    unserved_world, tmp_path, served, rows, experts
):
    """Two teachers, three replicas, one killed in the middle: the same weights to the bit."""
    options = {"lmbda": 1, "max_steps": 12, "learning_rate": 1e-3}
    arguments = ("--max-batch-tokens", "1", "--lora-modules", *experts)
    whole = words(unserved_world, tmp_path / "whole", served, rows, **options)
    assert main(whole) == 0
    with server_running(unserved_world.teacher, *arguments) as second:
        argv = words(unserved_world, tmp_path / "killed", served, rows, **options)
        with running([*argv, f"math={second.url}"]) as process:
            log = tmp_path / "killed" / "_log_history.jsonl"
            until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
            second.process.send_signal(signal.SIGKILL)
            process.join()
            assert process.exitcode == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


class TestWhatOnlyTheTeacherSees:
    def test_a_prompt_of_its_own_changes_what_is_learned(self, unserved_world, tmp_path, served):
        lines = [json.loads(line) for line in unserved_world.rows.read_text().splitlines()]
        seen = tmp_path / "seen.jsonl"
        seen.write_text(
            "".join(
                json.dumps({**one, "hint": one["messages"][1]["content"]}) + "\n" for one in lines
            )
        )
        template = tmp_path / "hint.jinja"
        template.write_text("{{ messages[0].content }} {{ hint }}\n")
        base = {
            "top_k_logprobs": 16, "max_steps": 4, "dataset_name": seen,
            "teacher_url": f"{served}#math", "eval_dataset_name": seen, "eval_strategy": "steps",
            "eval_steps": 2,
        }  # fmt: skip
        losses = {}
        for name, more in (("plain", {}), ("hint", {"teacher_prompt_template": template})):
            for method, lmbda in (("dataset", 0), ("student", 1)):
                output = tmp_path / f"{name} {method}"
                argv = flags(unserved_world, output, **base, **more, lmbda=lmbda)
                assert main(["distill", *argv]) == 0
                losses[name, method] = history(output)[0]["train/divergence"]
                effects = [
                    entry.get("eval/context_divergence")
                    for entry in history(output) if "eval/divergence" in entry
                ]  # fmt: skip
                if name == "plain":
                    assert effects == [None, None]
                else:
                    assert effects[0] == effects[1] > 1e-5
        for method in ("dataset", "student"):
            assert abs(losses["plain", method] - losses["hint", method]) > 1e-5

    def test_the_teachers_own_column_is_the_same_as_the_template(
        self, unserved_world, tmp_path, served
    ):
        lines = [json.loads(line) for line in unserved_world.rows.read_text().splitlines()]
        files = {name: tmp_path / f"{name}.jsonl" for name in ("column", "template")}
        files["column"].write_text(
            "".join(
                json.dumps({**one, "teacher_prompt": f"Hint. {one['messages'][0]['content']}"})
                + "\n"
                for one in lines
            )
        )
        files["template"].write_text(unserved_world.rows.read_text())
        template = tmp_path / "hint.jinja"
        template.write_text("Hint. {{ messages[0].content }}")
        for name, more in (("column", {}), ("template", {"teacher_prompt_template": template})):
            argv = flags(
                unserved_world, tmp_path / name, dataset_name=files[name], lmbda=0, seq_kd="true",
                teacher_url=f"{served}#code", top_k_logprobs=16, max_steps=3, **more,
            )  # fmt: skip
            assert main(["distill", *argv]) == 0
        assert_same_weights(tmp_path / "column", tmp_path / "template")

    def test_a_prompt_beyond_the_teachers_context_is_named_before_training(
        self, unserved_world, tmp_path, served, capsys
    ):
        line = json.loads(unserved_world.rows.read_text().splitlines()[0])
        file = tmp_path / "long.jsonl"
        file.write_text(json.dumps({**line, "teacher_prompt": "x" * 600}) + "\n")
        argv = flags(
            unserved_world, tmp_path / "out", dataset_name=file, lmbda=0, max_steps=1,
            teacher_url=f"{served}#math",
        )  # fmt: skip
        assert main(["distill", *argv]) == 2
        error = capsys.readouterr().err
        assert "long.jsonl:1: the teacher's own prompt of" in error

    def test_options_of_a_prompt_that_no_row_has_are_refused(
        self, unserved_world, tmp_path, served, capsys
    ):
        argv = flags(
            unserved_world, tmp_path / "out", lmbda=0, max_steps=1, teacher_url=f"{served}#math",
            teacher_chat_template_kwargs='{"enable_thinking": true}',
        )  # fmt: skip
        assert main(["distill", *argv]) == 2
        assert "has no effect: no row has a prompt that only" in capsys.readouterr().err
