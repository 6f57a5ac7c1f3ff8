"""The divergence that `evaluate` tells is the dense one, where the teacher names every token."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.commands.main import main
from student_trainer.losses import Divergence, generalized_jsd


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_held_out_divergence_is_the_dense_one(world, tmp_path, beta):
    rows = tmp_path / "rows.jsonl"
    checker = {"kind": "exact_match", "answer": "x"}
    lines = [{"prompt": c, "completion": c * 5, "checker": checker} for c in "abc"]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        f"--model_name_or_path={world.student}", f"--dataset_name={rows}", "--max_new_tokens=2",
        f"--teacher_url={world.url}", "--top_k_logprobs=256", "--teacher_logprob_dtype=float32",
        f"--beta={beta}", f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert main(["evaluate", *words]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    ids = torch.tensor(tokenizer([f"{c * 6}<|end|>" for c in "abc"])["input_ids"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits[:, :-1].flatten(0, 1)
        for folder in (world.student, world.teacher)
    )
    with torch.no_grad():
        dense = float(generalized_jsd(student, teacher, Divergence(beta)).mean())
    assert results["divergence"] == pytest.approx(dense, rel=1e-2)
