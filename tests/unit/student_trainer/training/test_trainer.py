"""The trainer on a tiny model: what it overrides, and that a step learns what it says."""

import inspect
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from student_trainer.config.training_arguments import CommonTrainingArguments
from student_trainer.data.sample import Example, Sample
from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.training import durable, trainer
from student_trainer.training.durable import DurableTrainer
from student_trainer.training.plan import TrainingPlan
from student_trainer.training.trainer import DistillationTrainer
from tests.support.models import save_model, save_tokenizer

METHOD = DistillationConfig(
    lmbda=0.0, seq_kd=False, seq_kd_temperature=0.0, divergence=Divergence(0.0), top_k=1,
    max_new_tokens=4, seed=0, stop_ids=(1,),
)  # fmt: skip


def overridden(kind):
    return {
        name
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and name != "__init__" and hasattr(Trainer, name)
    }


@pytest.mark.parametrize(
    ("kind", "module"), [(DistillationTrainer, trainer), (DurableTrainer, durable)]
)
def test_the_modules_table_names_what_is_overridden(kind, module):
    table = module.__doc__.split("method ", 1)[1]
    column = "\n".join(line[:32].strip() for line in table.splitlines())
    named = re.findall(r"\w+", column.replace("and_\n", "and_"))
    assert {name for name in named if hasattr(Trainer, name)} == overridden(kind)


@pytest.fixture
def tiny(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    save_model(tmp_path, hidden_size=16)
    return AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer


def example(index, ids, start, learned):
    sample = Sample(np.array(ids, np.uint32), start, np.array(learned), source="dataset")
    return Example(index, f"row {index}", sample.token_ids[:start], sample, None, "")


def trained(tiny, tmp_path, rows, **options):
    model, tokenizer = tiny
    args = CommonTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", learning_rate=0.1, use_cpu=True,
        optim="sgd", max_grad_norm=0.0, warmup_steps=0, lr_scheduler_type="constant",
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    DistillationTrainer(
        model, TrainingPlan(METHOD, vocab_size=260), teacher=None, args=args, train_dataset=rows,
        processing_class=tokenizer,
    ).train()  # fmt: skip
    return model


@pytest.mark.parametrize(("size", "substeps"), [(4, 1), (2, 2), (1, 4)])
def test_an_sft_step_is_one_of_the_mean_cross_entropy_of_its_tokens(tiny, tmp_path, size, substeps):
    """Prompts and unlearned tokens do not count, however rows are divided into micro-batches."""
    rows = [
        example(0, [5, 6, 7, 8, 1], 2, [True, True, True]),
        example(1, [9, 10, 11], 1, [False, True]),
        example(2, [12, 13, 14, 15, 16, 17, 1], 3, [True, False, True, True]),
        example(3, [18, 19, 20, 1], 3, [True]),
    ]
    model, _ = tiny
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    losses, count = [], 0
    for row in rows:
        ids = torch.tensor(row.sample.token_ids.astype(np.int64))[None]
        logits = twin(input_ids=ids).logits[0, row.sample.completion_start - 1 : -1]
        next_ids = ids[0, row.sample.completion_start :]
        learned = torch.tensor(row.sample.completion_mask)
        losses.append(torch.nn.functional.cross_entropy(
            logits[learned], next_ids[learned], reduction="sum"
        ))  # fmt: skip
        count += int(learned.sum())
    (sum(losses) / count).backward()
    with torch.no_grad():
        for weight in twin.parameters():
            weight -= 0.1 * weight.grad
    learner = trained(
        tiny, tmp_path, rows, per_device_train_batch_size=size,
        gradient_accumulation_steps=substeps,
    )  # fmt: skip
    assert learner is model
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)
