"""`--dry_run`: everything is told and checked, nothing is loaded or written."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest

from shared.errors import ConfigurationError
from shared.identity import tokenizer_identity
from student_trainer.api import distill
from student_trainer.commands import dry_run
from student_trainer.commands.dry_run_teacher import dry_run_flags, token_bytes
from student_trainer.commands.main import main
from student_trainer.config.arguments import TeacherArguments
from tests.support.stub import StubTeacher, info
from tests.support.stub_vllm import StubVllm
from tests.support.world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def stub(tokenizer):
    facts = info(tokenizer=tokenizer_identity(tokenizer), vocab_size=260)
    with StubTeacher(facts).serving() as served:
        yield served


@pytest.fixture(autouse=True)
def _no_weights_are_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were to be loaded")

    monkeypatch.setattr("student_trainer.training.recipe.load_student", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


def run(world, tmp_path, command="distill", *, url=None, **options):
    words = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "report_to": "none",
        "output_dir": tmp_path / "out", "dry_run": True, "max_new_tokens": 10,
        **({} if url is None else {"teacher_url": url, "top_k_logprobs": 8}), **options,
    }  # fmt: skip
    before = sorted(path for path in world.folder.rglob("*"))
    code = main([command, *(f"--{name}={value}" for name, value in words.items())])
    assert not (tmp_path / "out").exists()
    assert sorted(path for path in world.folder.rglob("*")) == before
    return code


def told(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {line[2:].split("  ")[0]: line[2:].partition("  ")[2].strip() for line in lines if line}


@pytest.mark.parametrize(
    ("options", "method", "tokens"),
    [
        ({"lmbda": 0}, "supervised KD (--lmbda 0)", "about 69 of the dataset"),
        ({"lmbda": 0, "seq_kd": True}, "SeqKD (--lmbda 0, --seq_kd)", "at most 80 of the teacher"),
        ({"lmbda": 1}, "on-policy GKD (--lmbda 1)", "at most 80 of the student"),
        (
            {"lmbda": 0.25},
            "a mixture of on-policy GKD and supervised KD (--lmbda 0.25)",
            "about 69 of the dataset, or at most 80 of the student",
        ),
    ],
)
def test_the_method_is_told_by_name(world, stub, tmp_path, capsys, options, method, tokens):
    assert run(world, tmp_path, url=stub.url, **options) == 0
    found = told(capsys)
    assert (found["method"], found["tokens a step"]) == (method, tokens)
    assert found["updates"].startswith("18, 6 an epoch; 8 rows each: 8 a micro-batch x 1")
    assert found["learning rate"].startswith("5e-05, linear, 0 warm-up steps; adamw_torch")
    assert found["teacher"].startswith("stub: float32, stub 1, fingerprint 0000000000000000")


def test_sampling_and_the_completions_of_a_prompt_are_told(world, stub, tmp_path, capsys):
    options = {"lmbda": 1, "rollout_top_p": 0.9, "rollout_min_p": 0.05, "rollout_temperature": 0.8}
    batch = {"num_generations": 4, "gradient_accumulation_steps": 2}
    assert run(world, tmp_path, url=stub.url, **options, **batch) == 0
    found = told(capsys)
    assert found["rollouts"] == (
        "sampled with temperature 0.8, top-p 0.9, min-p 0.05, so not from the distribution that "
        "the loss compares: not strictly on-policy"
    )
    # 48 rows: 12 steps of 4 prompts make an epoch.
    assert found["updates"].startswith("36, 12 an epoch; 4 prompts x 4 completions each: 8 a micro")
    assert found["tokens a step"] == "at most 160 of the student"
    assert run(world, tmp_path, url=stub.url, lmbda=1) == 0
    assert "rollouts" not in told(capsys)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm sends the weights")
def test_a_bound_below_one_completion_is_refused_at_the_start(world, stub, tmp_path, capsys):
    servers = {"rollout_url": "http://127.0.0.1:9", "rollout_max_tokens_in_flight": 20}
    assert run(world, tmp_path, url=stub.url, lmbda=1, **servers) == 2
    assert "--rollout_max_tokens_in_flight 20: a prompt and its" in capsys.readouterr().err


def test_the_teacher_is_asked_about_four_rows(world, stub, tmp_path, capsys):
    assert run(world, tmp_path, url=stub.url, beta=0, lmbda=0) == 0
    assert [len(request.sequences) for request in stub.requests] == [2, 2, 4]  # twice, to compare
    found = told(capsys)
    # The stub gives each of a hundred tokens as much: eight, and the next one if it is none of
    # them (the end token is, of each row), and nine of them are not in the tail.
    assert found["scored"].startswith("4 rows, 38 tokens of their completions")
    assert found["cross-entropy"].startswith(f"{math.log(100):.3f} nats")
    assert found["top-k mass"].startswith("0.0900: below 0.9, ")
    assert found["top-k mass"].endswith(": raise --top_k_logprobs")
    named = (34 * 9 + 4 * 8) / 38
    entropy = named * 0.01 * math.log(100) - 0.91 * math.log(0.91)
    assert found["entropy"].startswith(f"{entropy:.3f} nats")
    assert found["traffic"].startswith("56 bytes a completion token (k = 8, float16)")


@pytest.mark.parametrize(
    ("dtype", "m", "size"), [("float16", 0, 392), ("float32", 0, 520), ("float16", 16, 424)]
)
def test_bytes_of_a_token(dtype, m, size):
    flags = TeacherArguments(["http://host"], teacher_logprob_dtype=dtype)
    assert token_bytes(flags, m) == size


def test_bare_prompts_are_shown_and_scored(world, stub, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "count to {n}"}}\n' for n in range(8)))
    assert run(world, tmp_path, url=stub.url, lmbda=1, dataset_name=prompts) == 0
    out = capsys.readouterr().out
    assert "the student writes the completions" in out
    assert "36 tokens of their bare prompts" in out  # ten bytes, of which the first is given
    assert "nats, of prompts, which says nothing of completions" in out
    assert "    count to 3\n" in out
    assert "[[" not in out.split("The first prompts")[1]


def test_what_is_learned_stands_in_brackets_where_there_are_no_colours(world, tmp_path, capsys):
    assert run(world, tmp_path, "sft") == 0
    out = capsys.readouterr().out
    assert "    <|user|>tkgnkuhmp<|end|><|assistant|>[[nhtqgx<|end|>]]\n" in out
    assert "\033" not in out


def test_what_is_learned_is_green_and_the_rest_dim_in_a_terminal(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(dry_run, "has_colours", lambda stream: True)
    assert run(world, tmp_path, "sft") == 0
    out = capsys.readouterr().out
    assert (
        "\033[2m<|user|>tkgnkuhmp<|end|><|assistant|>\033[0m\033[32mnhtqgx<|end|>\033[0m\n" in out
    )
    assert "[[" not in out


def test_turns_between_are_told_apart_token_by_token(world, tmp_path, capsys):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    options = {"dataset_name": tmp_path / "rows.jsonl", "assistant_only_loss": True}
    assert run(world, tmp_path, "sft", **options) == 0
    shown = "<|user|>a<|end|><|assistant|>[[b<|end|>]]<|user|>c<|end|><|assistant|>[[d<|end|>]]"
    assert shown in capsys.readouterr().out


def test_control_characters_of_the_data_are_spelled_out(world, tmp_path, capsys):
    row = {"prompt": "a\x1b[31mb\r\n", "completion": "c" * 700}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    options = {"dataset_name": tmp_path / "rows.jsonl", "max_length": 256}
    assert run(world, tmp_path, "sft", **options) == 0
    out = capsys.readouterr().out
    assert "    a\\x1b[31mb\\r\n    [[ccc" in out
    assert "247 learned, cut at the limit" in out


def test_precompute_counts_its_questions_and_makes_no_cache(world, stub, tmp_path, capsys):
    options = {"lmbda": 0, "eval_dataset_name": world.held_out, "teacher_cache": tmp_path / "cache"}
    assert run(world, tmp_path, "precompute", url=stub.url, **options) == 0
    assert told(capsys)["requests"].startswith("64 for the teacher")
    assert not (tmp_path / "cache").exists()


def test_what_is_wrong_ends_with_2(world, stub, tmp_path, capsys):
    def error(**options):
        assert run(world, tmp_path, url=stub.url, **options) == 2
        return capsys.readouterr().err

    assert "--lmbda 2.0 must be from 0 to 1" in error(lmbda=2)
    assert "no such file" in error(dataset_name=tmp_path / "none.jsonl")
    assert "over the teacher's limit" in error(top_k_logprobs=5000)
    (tmp_path / "file").write_text("")
    assert "is no folder that can be written to" in error(output_dir=tmp_path / "file" / "out")
    stub.info = info(vocab_size=260)
    assert "different vocabularies" in error()


def test_a_teacher_that_is_not_there_ends_with_1(world, tmp_path, capsys):
    assert run(world, tmp_path, url="http://127.0.0.1:9", teacher_timeout=0.5) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_a_teacher_is_not_waited_for_as_long_as_in_a_run():
    flags = dry_run_flags(TeacherArguments(["http://host"], teacher_cache="x"))
    assert (flags.teacher_timeout, flags.teacher_cache) == (30.0, None)
    flags = TeacherArguments(["http://host"], teacher_timeout=90.0)
    assert dry_run_flags(flags).teacher_timeout == 90.0


def test_a_stock_vllm_is_asked_as_well(world, tokenizer, tmp_path, capsys):
    stub = StubVllm(tokenizer, np.full(260, 1 / 260), max_model_len=256)
    with stub.serving() as served:
        assert run(world, tmp_path, url=served.url, teacher_protocol="vllm", lmbda=0) == 0
    found = told(capsys)
    assert found["cross-entropy"].startswith(f"{math.log(260):.3f} nats")
    assert found["traffic"].endswith("measured in these short ones")


def test_the_python_api_refuses_it(world, tmp_path):
    with pytest.raises(ConfigurationError, match="dry_run is for `student-trainer distill`"):
        distill(world.student, "http://host", world.rows, output_dir=tmp_path / "o", dry_run=True)
