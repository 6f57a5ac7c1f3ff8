"""TRL's own trainer with our server as its vLLM teacher."""

import math

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.support.http import metric
from tests.support.vllm import VLLM

pytestmark = VLLM  # TRL's client wants vLLM installed beside it, whatever backend answers

ANSWERED = 'teacher_requests_total{route="/v1/completions",status="200"}'


@pytest.mark.parametrize(("beta", "top_k"), [(0.0, 16), (0.5, 1), (1.0, 1)])
def test_trls_distillation_trainer_trains_on_our_answers(world, tmp_path, beta, top_k):
    from trl.experimental.server_distillation import (
        ServerDistillationConfig,
        ServerDistillationTrainer,
    )

    arguments = ServerDistillationConfig(
        output_dir=str(tmp_path), teacher_model_server_url=world.url, beta=beta, loss_top_k=top_k,
        max_completion_length=8, max_steps=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, use_cpu=True, bf16=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": f"abc{i}"}]} for i in range(16)]
    before = metric(world.url, ANSWERED)
    trainer = ServerDistillationTrainer(
        model=str(world.student), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(world.student),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert metric(world.url, ANSWERED) == before + 2
    assert len(losses) == 2
    assert all(0 < loss < math.inf for loss in losses)
