"""`evaluate --rollout_engine vllm` by the real engine, on CPU, and one start of it."""

import json

import pytest

from student_trainer.commands import evaluation_completions
from student_trainer.commands.main import main
from student_trainer.evaluation.passk import read_samples
from student_trainer.rollouts import Rollout
from tests.support.models import save_model, save_tokenizer
from tests.support.vllm import VLLM, forked_engines

pytestmark = VLLM


class StoppedError(Exception):
    pass


class StandIn:
    """An engine that writes one completion, the prompt, and is stopped."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def sync(self, version):
        pass

    def generate(self, requests):
        yield [(0, Rollout(requests[0].prompt_ids, truncated=False))]
        raise StoppedError


def test_vllm_writes_what_transformers_does_where_an_evaluation_was_interrupted(
    tmp_path, monkeypatch
):
    model, rows = tmp_path / "model", tmp_path / "HumanEval.jsonl"
    save_tokenizer(model)
    save_model(model, head_dim=32, hidden_size=16, seed=1)  # smaller heads vLLM cannot do
    problems = [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}",
         "test": f"def check(candidate):\n    assert candidate({i}) == {i}\n",
         "canonical_solution": "    return x\n"}
        for i in range(5)
    ]  # fmt: skip
    rows.write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    def run(engine):
        out = tmp_path / engine
        words = [f"--suite={rows}", f"--output_dir={out}", f"--rollout_engine={engine}"]
        model_words = [f"--model_name_or_path={model}", "--max_new_tokens=24", "--raw_prompt"]
        code = main(["evaluate", *model_words, *words])
        assert code == 0
        return read_samples(out / "samples.jsonl"), json.loads((out / "results.json").read_text())

    expected, results = run("transformers")
    with monkeypatch.context() as patched:
        patched.setattr(evaluation_completions, "VllmEngine", StandIn)
        patched.setattr(evaluation_completions, "VllmRollouts", StandIn)
        with pytest.raises(StoppedError):
            run("vllm")
    with forked_engines():
        samples, found = run("vllm")
    assert samples[0]["completion"] == problems[0]["prompt"]  # is kept
    assert samples[1:] == expected[1:]
    assert len({sample["completion"] for sample in samples}) == 5
    assert [sample["task_id"] for sample in samples] == [p["task_id"] for p in problems]
    assert found["perplexity"] == pytest.approx(results["perplexity"])
    assert not (tmp_path / "vllm" / "unfinished.jsonl").exists()
