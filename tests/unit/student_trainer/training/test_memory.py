"""The estimate of a dry run against what a real step holds."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from student_trainer.commands.main import main
from student_trainer.config.arguments import AdapterArguments, ModelArguments
from student_trainer.config.training_arguments import CommonTrainingArguments, SFTArguments
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence, projection
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.model.load import load_student
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution
from student_trainer.training.memory import bytes_of, estimate_memory
from tests.support.models import save_model
from tests.support.world import make_world


def estimated(folder, tmp_path, *, model=(), adapters=(), **options):
    args = SFTArguments(output_dir=str(tmp_path / "out"), **options)
    arguments = ModelArguments(str(folder), **dict(model)), AdapterArguments(**dict(adapters))
    return arguments, estimate_memory(*arguments, args, tokens=10)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "adapters", [{}, {"use_peft": True, "lora_r": 4}], ids=["all weights", "LoRA"]
)
def test_weights_gradients_and_optimizer_are_exact(tmp_path, family, tied, dtype, adapters):
    save_model(tmp_path / "model", family=family, tie_word_embeddings=tied)
    model = {"torch_dtype": dtype}
    arguments, found = estimated(tmp_path / "model", tmp_path, model=model, adapters=adapters)
    student = load_student(*arguments)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    student(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert found.parameters == sum(p.numel() for p in student.parameters())
    assert found.trainable == sum(p.numel() for p in trained)
    assert found.weights == bytes_of(student.parameters())
    assert found.gradients == bytes_of(p.grad for p in trained)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert found.optimizer == bytes_of(states)


def test_a_run_saves_what_was_estimated(tmp_path):
    world = make_world(tmp_path)
    words = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "max_steps": 1,
        "save_steps": 1, "report_to": "none", "output_dir": tmp_path / "out",
    }  # fmt: skip
    assert main(["sft", *(f"--{name}={value}" for name, value in words.items())]) == 0
    _, found = estimated(world.student, tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert found.weights == bytes_of(load_file(checkpoint / "model.safetensors").values())
    assert found.optimizer == bytes_of(v for state in saved.values() for v in state.values())


def test_sgd_keeps_nothing_and_an_optimizer_of_a_gpu_is_not_known(tmp_path):
    save_model(tmp_path / "model")
    assert estimated(tmp_path / "model", tmp_path, optim="sgd")[1].optimizer == 0
    assert estimated(tmp_path / "model", tmp_path, optim="adamw_8bit")[1].optimizer is None


def test_the_loss_holds_a_chunk_and_a_gradient_that_is_not_added_in_place(tmp_path, monkeypatch):
    save_model(tmp_path / "model", vocab_size=260, hidden_size=32)
    chunk, layer = 10 * 260 * 4, 260 * 32 * 4
    half = {"torch_dtype": "bfloat16"}
    assert estimated(tmp_path / "model", tmp_path)[1].loss == chunk
    assert estimated(tmp_path / "model", tmp_path, model=half)[1].loss == chunk + chunk // 2 + layer
    lora = {"use_peft": True}
    assert estimated(tmp_path / "model", tmp_path, adapters=lora)[1].loss == chunk
    monkeypatch.setattr(CommonTrainingArguments, "world_size", 2)
    assert estimated(tmp_path / "model", tmp_path)[1].loss == chunk + layer


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_step_holds_at_its_peak_what_was_estimated(tmp_path, monkeypatch, bf16):
    """Nearly all of this student is its vocabulary, so activations are small beside it."""
    monkeypatch.setattr(projection, "BLOCK_BYTES", 1 << 18)  # as small beside the student as they
    monkeypatch.setattr(projection, "CACHED_BYTES", 1 << 18)  # are beside a published one
    vocab_size = 20_000
    save_model(tmp_path / "model", vocab_size=vocab_size, hidden_size=64, tie_word_embeddings=True)
    arguments, found = estimated(tmp_path / "model", tmp_path, bf16=bf16, use_cpu=True)
    student = load_student(*arguments)
    install_sparse_loss(student)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)  # as the Trainer takes it
    sample = Sample(np.arange(12, dtype=np.uint32), 2, np.ones(10, bool), "dataset")

    def step():
        targets = SparseTargets(
            positions=predicting_positions([sample], [sample.completion_mask], packed=False),
            teacher=sparse_distribution([ScoredSample(sample, None)], vocab_size),
            divergence=Divergence(0.0),
            normalizer=1.0,
            vocab_size=vocab_size,
            in_place=True,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = student(**model_inputs([sample], 0, packed=False), sparse_targets=targets)
        loss["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    records = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    records.sort(key=lambda record: record.start_ns())
    peak = max(np.cumsum([record.nbytes() for record in records]))
    assert 0.9 < found.total / (found.weights + found.optimizer + peak) < 1.15


def test_ddp_holds_the_gradients_twice(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    alone = estimated(tmp_path / "model", tmp_path)[1]
    monkeypatch.setattr(CommonTrainingArguments, "world_size", 2)
    two = estimated(tmp_path / "model", tmp_path)[1]
    assert (alone.buckets, two.buckets) == (0, two.gradients)
    assert two.total - two.loss == alone.total - alone.loss + two.gradients


def test_quantised_weights_are_half_a_byte_and_their_scales(tmp_path):
    """All linear layers but the output layer, as bitsandbytes does it; 64 weights share a scale."""
    save_model(tmp_path / "model", tie_word_embeddings=False)
    model, lora = {"torch_dtype": "bfloat16"}, {"use_peft": True, "lora_r": 4}
    plain = estimated(tmp_path / "model", tmp_path, model=model, adapters=lora)[1]
    found = estimated(
        tmp_path / "model", tmp_path, model=model, adapters={**lora, "load_in_4bit": True}
    )[1]
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    others = plain.parameters - plain.trainable - linear  # in float32: peft lifts them
    scales = linear / 64 + 4 * linear / (64 * 256)
    assert found.weights == round(linear / 2 + scales) + 4 * others + 4 * plain.trainable
    assert found.gradients == 4 * plain.trainable


def test_nothing_of_a_large_model_is_made(tmp_path):
    """The model has 42 GB, and as much in gradients: few machines that run tests could hold it."""
    d, ff, kv, layers, vocab = 8192, 28672, 1024, 10, 128256
    AutoConfig.for_model(
        "llama", hidden_size=d, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=vocab,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    _, found = estimated(tmp_path / "model", tmp_path)
    layer = 2 * d * d + 2 * d * kv + 3 * d * ff + 2 * d
    assert found.parameters == layers * layer + 2 * vocab * d + d
    assert found.weights == found.gradients == 4 * found.parameters > 42e9
