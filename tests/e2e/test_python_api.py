"""The public Python API and its examples, against a real server."""

import copy
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import student_trainer
from shared.errors import (
    ConfigurationError,
    DatasetError,
    InvalidRequestError,
    TokenizerMismatchError,
)
from student_trainer import (
    Divergence,
    TeacherClient,
    distill,
    generalized_jsd,
    linear_sparse_jsd,
    teacher_distribution,
)
from tests.e2e.test_distillation import assert_same_weights, history
from tests.e2e.test_distillation import distill as run_command

EXAMPLES = Path(__file__).parents[2] / "examples" / "python"


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.student)


@pytest.fixture(scope="module")
def teacher(world, tokenizer):
    with TeacherClient(world.url, tokenizer=tokenizer) as client:
        yield client


def logprobs_of(folder, token_ids):
    """Return log-probs [L, V] of the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].log_softmax(-1)


class TestTeacherClient:
    def test_text_is_scored_as_training_sees_it(self, world, teacher, tokenizer):
        [scored] = teacher.score([{"prompt": "2+2=", "completion": "4"}], top_k=5)
        assert tokenizer.decode(scored.sample.token_ids) == "2+2=4<|end|>"
        assert scored.sample.completion_start == 4
        expected = logprobs_of(world.teacher, scored.sample.token_ids)[3:-1]  # [2, V]
        values, ids = expected.topk(5)
        assert scored.scores.token_ids.tolist() == ids.tolist()
        assert scored.scores.logprobs.dtype == np.float32
        np.testing.assert_allclose(scored.scores.logprobs, values, atol=1e-4)
        own = expected[[0, 1], scored.sample.completion_ids.astype(int)]
        np.testing.assert_allclose(scored.scores.next_token_logprob, own, atol=1e-4)

    def test_conversations_and_token_ids_are_scored_too(self, teacher, tokenizer):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
        [row] = teacher.score([{"messages": turns}], top_k=4)
        assert tokenizer.decode(row.sample.completion_ids) == "bc<|end|>"
        ids, start = row.sample.token_ids, row.sample.completion_start
        for given in (ids, ids.tolist(), ids.astype(np.int64)):
            [pair] = teacher.score([(given, start)], top_k=4)
            np.testing.assert_array_equal(pair.scores.logprobs, row.scores.logprobs)

    def test_a_temperature_divides_the_teachers_logits(self, world, teacher):
        [scored] = teacher.score([([10, 11, 12], 1)], top_k=3, temperature=2.0)
        logits = AutoModelForCausalLM.from_pretrained(world.teacher)(torch.tensor([[10, 11, 12]]))
        expected = (logits.logits[0, :2] / 2).log_softmax(-1).topk(3).values.detach()
        np.testing.assert_allclose(scored.scores.logprobs, expected, atol=1e-4)

    def test_what_it_generates_is_greedy_and_scored_like_the_same_sequence(
        self, world, teacher, tokenizer
    ):
        [by_text] = teacher.generate(["2+2="], max_new_tokens=6, top_k=4)
        [by_row] = teacher.generate([{"prompt": "2+2="}], max_new_tokens=6, top_k=4)
        [by_ids] = teacher.generate([tokenizer("2+2=")["input_ids"]], max_new_tokens=6, top_k=4)
        sample = by_text.sample
        for other in (by_row, by_ids):
            np.testing.assert_array_equal(other.sample.token_ids, sample.token_ids)
        greedy = logprobs_of(world.teacher, sample.token_ids)[3:-1].argmax(-1)
        assert sample.completion_ids.tolist() == greedy.tolist()
        assert sample.truncated == (tokenizer.eos_token_id not in sample.completion_ids)
        [scored] = teacher.score([(sample.token_ids, sample.completion_start)], top_k=4)
        np.testing.assert_allclose(by_text.scores.logprobs, scored.scores.logprobs, atol=1e-4)

    def test_the_first_call_may_generate_from_token_ids(self, world):
        with TeacherClient(world.url) as client:
            [written] = client.generate([[10, 11]], max_new_tokens=2, stop_token_ids=[1], top_k=4)
        assert len(written.scores) == len(written.sample.completion_ids)

    def test_scores_make_the_dense_loss_where_every_token_is_named(self, world, teacher):
        scored = teacher.score([([10, 11, 12, 13], 2), ([20, 21, 22], 1)], top_k=260)
        model = AutoModelForCausalLM.from_pretrained(world.student)
        hidden, dense = [], []
        for one in scored:
            ids = torch.from_numpy(one.sample.token_ids.astype(np.int64))[None]
            rows = slice(one.sample.completion_start - 1, -1)
            hidden.append(model.get_decoder()(ids).last_hidden_state[0, rows])
            student = logprobs_of(world.student, one.sample.token_ids)[rows]
            ours = logprobs_of(world.teacher, one.sample.token_ids)[rows]
            dense.append(generalized_jsd(student, ours, Divergence(0.5)))
        target = teacher_distribution(scored, 260)
        loss = linear_sparse_jsd(
            torch.cat(hidden), model.lm_head.weight, target, Divergence(0.5), normalizer=4
        ).loss
        assert loss.item() == pytest.approx(float(torch.cat(dense).mean()), rel=1e-4)

    def test_what_cannot_be_asked_is_told_by_name(self, world, teacher):
        with pytest.raises(DatasetError, match="row 1 has no completion to score"):
            teacher.score([{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
        with pytest.raises(InvalidRequestError, match="completion_start 3 must be from 1 to 2"):
            teacher.score([([10, 11, 12], 3)])
        with (
            TeacherClient(world.url) as without,
            pytest.raises(ConfigurationError, match="give TeacherClient the student's tokenizer"),
        ):
            without.generate(["a"])
        with pytest.raises(ConfigurationError, match="must look like http://host:8000"):
            TeacherClient("host:8000")

    def test_another_vocabulary_is_refused_each_time(self, world, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        other = AutoTokenizer.from_pretrained(tmp_path)
        other.add_tokens(["<|new|>"])
        with TeacherClient(world.url, tokenizer=other) as client:
            for _ in range(2):
                with pytest.raises(TokenizerMismatchError, match="different vocabularies"):
                    client.score([([10, 11], 1)])


FLAGS = {
    "max_new_tokens": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "top_k_logprobs": 16, "max_steps": 3, "lmbda": 0.5,
}  # fmt: skip


class TestDistill:
    def test_it_trains_to_the_same_weights_as_the_command(self, world, tmp_path):
        assert run_command(world, tmp_path / "command", lmbda=0.5, max_steps=3) == 0
        named = distill(
            str(world.student), world.url, world.rows, output_dir=tmp_path / "a", **FLAGS
        )
        rows = [json.loads(line) for line in world.rows.read_text().splitlines()]
        model = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)
        result = distill(
            model, [world.url], datasets.Dataset.from_list(rows),
            tokenizer=AutoTokenizer.from_pretrained(world.student), output_dir=tmp_path / "b",
            **FLAGS,
        )  # fmt: skip
        for folder in ("a", "b"):
            assert_same_weights(tmp_path / "command", tmp_path / folder, tolerance=0)
        assert (
            named.metrics["train/divergence"]
            == history(tmp_path / "command")[-2]["train/divergence"]
        )
        assert result.output_dir == tmp_path / "b"
        assert result.history == history(tmp_path / "b")
        assert result.model is model
        assert not result.stopped
        copied = copy.deepcopy(model)
        copied.get_decoder().norm.weight.data.zero_()  # so that all logits are 0
        assert not copied(torch.tensor([[10, 11]])).logits.any()
        assert model(torch.tensor([[10, 11]])).logits.any()
        card = (tmp_path / "b" / "README.md").read_text()
        assert "24 rows drawn from the 48 of `rows in memory`" in card
        assert "datasets:" not in card

    def test_adapters_are_put_into_a_model_in_memory(self, world, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(world.student)
        distill(
            model, world.url, [{"prompt": c} for c in "abcdefgh"], output_dir=tmp_path,
            tokenizer=AutoTokenizer.from_pretrained(world.student), use_peft=True, lora_r=4,
            **FLAGS | {"lmbda": 1, "max_steps": 1},
        )  # fmt: skip
        assert (tmp_path / "adapter_model.safetensors").exists()

    def test_a_script_of_ones_own_may_have_two_processes(self, world, tmp_path):
        script = tmp_path / "script.py"
        flags = {**FLAGS, "per_device_train_batch_size": 4, "ddp_backend": "gloo", "use_cpu": True}
        script.write_text(
            "import os\nfrom pathlib import Path\nfrom student_trainer import distill\n"
            f"result = distill({str(world.student)!r}, {world.url!r}, {str(world.rows)!r}, "
            f"output_dir={str(tmp_path / 'out')!r}, **{flags!r})\n"
            # Two processes that print at once mix their lines, so each writes a file of its own.
            f"folder = Path({str(tmp_path)!r})\n"
            "(folder / f'rank{os.environ[\"RANK\"]}').write_text(str(result))\n"
        )
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        ended = subprocess.run(
            [sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=600
        )
        assert ended.returncode == 0, ended.stderr
        for rank in "01":
            result = (tmp_path / f"rank{rank}").read_text()
            assert result.startswith("DistillationResult(")
            assert "3 steps, divergence " in result
        assert (tmp_path / "out" / "model.safetensors").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lmbd": 0.5}, r"distill\(\): unknown keyword 'lmbd'\. Did you mean lmbda\?"),
            ({"beta": 2}, r"^beta=2\.0 must be from 0 to 1"),
            ({"beta": "half"}, "keyword beta: invalid float value: 'half'"),
            ({"tail": "cut"}, "keyword tail: invalid choice: 'cut'"),
            ({"dataset_name": "rows.jsonl"}, "give dataset_name as dataset"),
            (
                {"eval_strategy": "steps", "eval_steps": 1},
                "^eval_strategy='steps' needs eval_dataset=",
            ),
            ({"tokenizer": object()}, "a folder or Hub id without"),
            ({"model": object()}, "comes with its tokenizer"),
            (
                {"model": torch.nn.Module(), "tokenizer": object(), "torch_dtype": "bfloat16"},
                "torch_dtype has no effect on a model that is loaded already",
            ),
        ],
    )
    def test_keywords_that_cannot_work_are_refused(
        self, unserved_world, tmp_path, changes, message
    ):
        given = {
            "model": unserved_world.student, "teacher_url": "http://127.0.0.1:1",
            "dataset": unserved_world.rows, "output_dir": tmp_path, **changes,
        }  # fmt: skip
        with pytest.raises(ConfigurationError, match=message):
            distill(**given)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "dataset holds no rows"),
            ([{"prompt": "a"}, "b"], "dataset row 1: expected a dict"),
        ],
    )
    def test_rows_that_are_none_are_refused(self, unserved_world, tmp_path, rows, message):
        with pytest.raises(DatasetError, match=message):
            distill(unserved_world.student, "http://127.0.0.1:1", rows, output_dir=tmp_path)


class TestExamples:
    def run(self, name, monkeypatch, capsys, *arguments):
        text = (EXAMPLES / name).read_text()
        assert len(text.splitlines()) < 40
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name))
        return capsys.readouterr().out

    def test_score_with_a_teacher(self, world, monkeypatch, capsys):
        out = self.run(
            "score_with_a_teacher.py", monkeypatch, capsys, world.student, world.url, "2+2=", "4"
        )
        assert out.splitlines()[1].startswith("'4' -")
        assert re.search(r"^perplexity \d+\.\d\d$", out, re.MULTILINE)

    def test_distill(self, world, tmp_path, monkeypatch, capsys):
        out = self.run("distill.py", monkeypatch, capsys, world.student, world.url, tmp_path)
        before, after = re.search(r"divergence (\S+) -> (\S+) nats", out).groups()
        assert float(after) < float(before)
        assert (tmp_path / "model.safetensors").exists()

    def test_loss_in_your_own_loop(self, world, tmp_path, monkeypatch, capsys):
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(world.rows.read_text().splitlines(keepends=True)[:16]))
        out = self.run(
            "loss_in_your_own_loop.py", monkeypatch, capsys, world.student, world.url, rows
        )
        losses = [float(line.split()[2]) for line in out.splitlines()]
        assert len(losses) == 3
        assert losses[0] > losses[1] > losses[2]


def test_every_public_name_is_there():
    assert dir(student_trainer) == student_trainer.__all__
    for name in student_trainer.__all__:
        assert getattr(student_trainer, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = student_trainer.distil


def test_importing_the_package_does_not_import_torch():
    code = "import sys, student_trainer.commands.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
