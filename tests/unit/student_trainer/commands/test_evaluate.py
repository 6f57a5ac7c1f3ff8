"""An evaluation that is interrupted goes on, and ends as if it had not been."""

import json
import platform
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.mini_humaneval.prepare import make_dataset
from examples.mini_humaneval.settings import Settings
from student_trainer.commands import evaluation_completions, evaluation_prompts, run_evaluation
from student_trainer.commands.main import main
from student_trainer.config.arguments import DatasetArguments
from student_trainer.config.suites import where_from
from student_trainer.evaluation import sandbox as sandbox_module
from student_trainer.evaluation.journal import EvaluationJournal
from student_trainer.evaluation.passk import read_samples
from student_trainer.rollouts import Rollout, TransformersRollouts
from tests.support.fences import LANDLOCK, write_refusal
from tests.support.flags import installed
from tests.support.models import save_model, save_tokenizer

TINY = Settings(pretrain_rows=4, warmup_rows=1, labelled_rows=1, prompt_rows=1, held_out_rows=3)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    save_tokenizer(folder)
    save_model(folder, hidden_size=16, max_position_embeddings=512)
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    checker = {"kind": "exact_match", "answer": "x"}
    lines = [{"prompt": c, "completion": "x", "checker": checker} for c in "abcde"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def words(model, rows, output, **options):
    settings = {
        "model_name_or_path": model, "dataset_name": rows, "output_dir": output, "n": 2,
        "temperature": 1.0, "max_new_tokens": 6, "generation_batch_size": 2, **options,
    }  # fmt: skip
    return ["evaluate", *(f"--{name}={value}" for name, value in settings.items())]


class StoppedError(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """Return how many completions were requested, interrupted after ``stop_after`` groups."""

    class Engine(TransformersRollouts):
        requests = []  # noqa: RUF012
        stop_after = None

        def generate(self, requests):
            Engine.requests.append(len(requests))
            for count, group in enumerate(super().generate(requests), start=1):
                yield group
                if count == Engine.stop_after:
                    raise StoppedError

    monkeypatch.setattr(evaluation_completions, "TransformersRollouts", Engine)
    return Engine


def test_an_interrupted_evaluation_goes_on_where_it_stopped(model, rows, tmp_path, asked):
    assert main(words(model, rows, tmp_path / "whole")) == 0
    asked.stop_after = 2
    with pytest.raises(StoppedError):
        main(words(model, rows, tmp_path / "cut"))
    there = len((tmp_path / "cut" / "unfinished.jsonl").read_text().splitlines()) - 1
    assert 1 <= there < 10
    asked.stop_after = None
    assert main(words(model, rows, tmp_path / "cut")) == 0
    assert asked.requests == [10, 10, 10 - there]
    whole, cut = (read_samples(tmp_path / name / "samples.jsonl") for name in ("whole", "cut"))
    assert cut == whole
    assert len({sample["completion"] for sample in whole}) > 5
    assert not (tmp_path / "cut" / "unfinished.jsonl").exists()


@pytest.mark.parametrize("change", ["temperature", "weights", "rows"])
def test_what_was_generated_otherwise_is_not_taken_over(model, rows, tmp_path, asked, change):
    asked.stop_after = 1
    with pytest.raises(StoppedError):
        main(words(model, rows, tmp_path / "out"))
    asked.stop_after = None
    options = {"temperature": 0.5} if change == "temperature" else {}
    if change == "weights":
        save_model(model, hidden_size=16, seed=1)
    if change == "rows":
        rows.write_text(rows.read_text().replace('"prompt": "a"', '"prompt": "z"'))
    assert main(words(model, rows, tmp_path / "out", **options)) == 0
    assert asked.requests == [10, 10]


def test_samples_tell_prompt_and_reference_once_for_each_problem(model, rows, tmp_path):
    assert main(words(model, rows, tmp_path / "out")) == 0
    samples = read_samples(tmp_path / "out" / "samples.jsonl")
    assert [sample.get("prompt") for sample in samples[:4]] == ["a", None, "b", None]
    assert samples[0]["reference"] == "x"


def test_a_line_that_was_cut_is_written_again(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    with EvaluationJournal(path, {"n": 1}) as file:
        file.add(0, "a\nb", truncated=False)
        file.add(2, "c", truncated=True)
    path.write_text(path.read_text() + '[1, "half')
    with EvaluationJournal(path, {"n": 1}) as file:
        assert file.texts == {0: "a\nb", 2: "c"}
        assert file.truncated == {0: False, 2: True}
        file.add(1, "d", truncated=False)
    with EvaluationJournal(path, {"n": 1}) as file:
        assert file.texts == {0: "a\nb", 2: "c", 1: "d"}
    with EvaluationJournal(path, {"n": 2}) as file:
        assert file.texts == {}


def test_suites_without_a_file_come_from_the_hub(model, tmp_path, capsys):
    assert where_from(DatasetArguments(), "gsm8k") == ("openai/gsm8k", "main", "test", "gsm8k")
    given = DatasetArguments(dataset_name="rows.jsonl")
    assert where_from(given, "gsm8k") == ("rows.jsonl", None, "train", "gsm8k")
    assert main(["evaluate", f"--model_name_or_path={model}", f"--output_dir={tmp_path}"]) == 2
    assert "--dataset_name is missing" in capsys.readouterr().err


def test_a_suite_is_a_path_of_rows_in_any_form(model, rows, tmp_path):
    """The quickstart's own rows, and a folder of rows with a checker."""
    held_out = tmp_path / "held_out.jsonl"
    lines = (json.dumps(row) + "\n" for row in make_dataset(0, TINY).held_out)
    held_out.write_text("".join(lines))
    folder = tmp_path / "folder"
    folder.mkdir()
    rows.rename(folder / "rows.jsonl")
    for suite, problems, score in ((held_out, 3, "pass@1"), (folder, 5, "exact_match")):
        given = {"dataset_name": "", "suite": suite, "max_new_tokens": 2}
        assert main(words(model, None, tmp_path / score, **given)) == 0
        results = json.loads((tmp_path / score / "results.json").read_text())
        assert (results["dataset"], results["problems"]) == (str(suite), problems)
        assert results[score] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "mini_humaneval"}, "examples.mini_humaneval.prepare --output_dir DIR"),
        ({"suite": "humanevel"}, "--suite humanevel: no such file or folder, and neither human"),
        ({"suite": "there.jsonl", "dataset_name": "x"}, "must be one of auto, humaneval, gsm8k"),
    ],
)
def test_suites_that_are_none_are_refused(model, tmp_path, capsys, options, message):
    given = {"dataset_name": "", **options}
    assert main(words(model, None, tmp_path / "out", **given)) == 2
    assert message in capsys.readouterr().err


def test_perplexity_is_that_of_the_references(model, rows, tmp_path):
    assert main(words(model, rows, tmp_path / "out")) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = torch.tensor(tokenizer([f"{c}x<|end|>" for c in "abcde"])["input_ids"])  # [5, 3]
    labels = prompts.clone()
    labels[:, 0] = -100
    plain = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        expected = float(plain(input_ids=prompts, labels=labels).loss.exp())
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k_logprobs": 8}, "no effect without --teacher_url"),
        ({"beta": 0.5}, "no effect without --teacher_url"),
        ({"beta": 2, "teacher_url": "http://host:1"}, "--beta 2.0 must be from 0 to 1"),
        ({"vllm_gpu_memory_utilization": 0.5}, "no effect without --rollout_engine vllm"),
        ({"rollout_engine": "vllm", "temperature": 3}, "vLLM samples from 0.01 to 2"),
        ({"teacher_url": "host"}, "must look like http://host:8000"),
    ],
)
def test_flags_of_teacher_and_engine_are_checked(model, rows, tmp_path, capsys, options, message):
    with installed("vllm"):
        assert main(words(model, rows, tmp_path / "out", **options)) == 2
    assert message in capsys.readouterr().err


def test_vllm_writes_the_completions_where_it_is_asked_to(model, rows, tmp_path, monkeypatch):
    """By a stand-in for the engine; the engine itself is tested with the trainer."""
    made = []

    class Engine:
        def __init__(self, student, **options):
            self.model = student
            made.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            made.append("closed")

        def sync(self, version):
            made.append(version)

    class Rollouts(evaluation_completions.VllmRollouts):
        def generate(self, requests):
            assert made[-1] == 0  # it has the weights
            for index, request in enumerate(requests):
                yield [(index, Rollout(request.prompt_ids, truncated=False))]

    monkeypatch.setattr(evaluation_completions, "VllmEngine", Engine)
    monkeypatch.setattr(evaluation_completions, "VllmRollouts", Rollouts)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    vllm = {"rollout_engine": "vllm", "vllm_gpu_memory_utilization": 0.5}
    assert main(words(model, rows, tmp_path / "out", **vllm)) == 0
    assert made == [
        {"max_model_len": 7, "dtype": "float32", "gpu_memory_utilization": 0.5, "max_num_seqs": 2},
        0,
        "closed",
    ]
    samples = read_samples(tmp_path / "out" / "samples.jsonl")
    assert [sample["completion"] for sample in samples] == list("aabbccddee")


def test_references_that_a_template_rewrites_have_no_perplexity(model, rows, tmp_path, capsys):
    template = "{{ messages | length }}{{ messages[0].content }}{{ messages[-1].content }}"
    (model / "chat_template.jinja").write_text(template)
    checker = {"kind": "exact_match", "answer": "x"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]
    rows.write_text(json.dumps({"messages": turns, "checker": checker}) + "\n")
    assert main(words(model, rows, tmp_path / "out")) == 0
    assert "perplexity" not in json.loads((tmp_path / "out" / "results.json").read_text())
    teacher = {"teacher_url": "http://127.0.0.1:1"}  # is not waited for
    assert main(words(model, rows, tmp_path / "with teacher", **teacher)) == 2
    assert "does not begin with the prompt" in capsys.readouterr().err


@pytest.fixture
def humaneval(tmp_path):
    path = tmp_path / "humaneval.jsonl"
    row = {
        "task_id": "HumanEval/0", "prompt": 'def f(x):\n    """One more."""\n', "entry_point": "f",
        "test": "def check(f):\n    assert f(1) == 2\n", "canonical_solution": "    return x + 1\n",
    }  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    return path


def asked_of(model, rows, output, monkeypatch, **options):
    """results.json, the sample, and the text of the prompt that was generated from."""
    prompts = []

    class Engine(TransformersRollouts):
        def generate(self, requests):
            prompts.extend(request.prompt_ids for request in requests)
            return super().generate(requests)

    monkeypatch.setattr(evaluation_completions, "TransformersRollouts", Engine)
    options = {"n": 1, "temperature": 0.0, **options}
    assert main(words(model, rows, output, **options)) == 0
    [sample] = read_samples(output / "samples.jsonl")
    text = AutoTokenizer.from_pretrained(model).decode(prompts[0])
    return json.loads((output / "results.json").read_text()), sample, text


def test_humaneval_is_asked_by_an_instruction_where_there_is_a_template(
    model, humaneval, tmp_path, monkeypatch
):
    results, sample, prompt = asked_of(model, humaneval, tmp_path / "chat", monkeypatch)
    assert results["asked"] == "instruction"
    row = json.loads(humaneval.read_text())
    assert f"markdown code block:\n```\n{row['prompt'].strip()}\n```" in prompt
    assert sample["prompt"] in prompt
    assert prompt.endswith("```python\n")  # the answer is begun, as EvalPlus does
    assert sample["reference"] == f"{row['prompt']}    return x + 1\n```"

    results, sample, prompt = asked_of(
        model, humaneval, tmp_path / "raw", monkeypatch, raw_prompt=True
    )
    assert results["asked"] == "raw prompt"
    assert prompt.endswith(row["prompt"])
    assert "markdown" not in prompt
    assert sample["reference"] == row["canonical_solution"]


def test_humaneval_is_a_raw_prompt_where_there_is_no_template(
    model, humaneval, tmp_path, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    results, _, prompt = asked_of(model, humaneval, tmp_path / "raw", monkeypatch)
    assert results["asked"] == "raw prompt"
    assert "markdown" not in prompt


def test_a_raw_prompt_of_other_rows_is_refused(model, rows, tmp_path, capsys):
    assert main([*words(model, rows, tmp_path / "out"), "--raw_prompt"]) == 2
    assert "--raw_prompt has no effect" in capsys.readouterr().err


def test_the_share_of_truncated_completions_is_told(model, rows, tmp_path):
    assert main(words(model, rows, tmp_path / "out", max_new_tokens=1)) == 0
    samples = read_samples(tmp_path / "out" / "samples.jsonl")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # One token is the end token, of which no text is left, or it is cut.
    assert [s["truncated"] for s in samples] == [s["completion"] != "" for s in samples]
    assert results["truncated"] == sum(s["truncated"] for s in samples) / len(samples) > 0


def test_tokenizer_and_configuration_are_read_once(model, rows, tmp_path, monkeypatch):
    read = []
    for name in ("load_tokenizer", "load_config"):
        load = getattr(evaluation_prompts, name)

        def counted(model, name=name, load=load):
            read.append(name)
            return load(model)

        monkeypatch.setattr(evaluation_prompts, name, counted)
    assert main(words(model, rows, tmp_path / "out")) == 0
    assert sorted(read) == ["load_config", "load_tokenizer"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="refuses calls by x86_64's numbers")
def test_without_a_fence_no_program_runs_unless_that_is_wanted(
    model, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "programs.jsonl"
    checker = {"kind": "python", "prompt": "", "entry_point": "f", "test": "def check(f): f()\n"}
    path.write_text(json.dumps({"prompt": "a", "completion": "x", "checker": checker}) + "\n")
    assert main(words(model, path, tmp_path / "fenced")) == 0
    assert "unsafe_sandbox" not in json.loads((tmp_path / "fenced/results.json").read_text())
    write_refusal(tmp_path / "refuse.py", LANDLOCK)
    command = (sys.executable, "-S", "-s", "-P", str(tmp_path / "refuse.py"))
    monkeypatch.setattr(sandbox_module, "_PYTHON", command)
    loaded = []
    load = run_evaluation.load_model
    monkeypatch.setattr(
        run_evaluation, "load_model", lambda *a, **k: loaded.append(1) or load(*a, **k)
    )
    capsys.readouterr()
    assert main(words(model, path, tmp_path / "refused")) == 2
    assert "no Landlock" in capsys.readouterr().err
    assert not loaded
    assert not (tmp_path / "refused").exists()
    assert main(words(model, path, tmp_path / "unsafe", unsafe_sandbox=True)) == 0
    results = json.loads((tmp_path / "unsafe/results.json").read_text())
    assert results["unsafe_sandbox"] == ["Landlock"]
