"""A resumed run has the weights of its checkpoint, all of them, and ends as the whole run."""

import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from shared.errors import CheckpointError
from student_trainer.config.training_arguments import SFTArguments
from student_trainer.data.sample import Example, Sample
from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.training import checkpoints
from student_trainer.training.plan import TrainingPlan
from student_trainer.training.trainer import DistillationTrainer
from tests.support.models import save_model, save_tokenizer

METHOD = DistillationConfig(
    lmbda=0.0, seq_kd=False, seq_kd_temperature=0.0, divergence=Divergence(0.0), top_k=1,
    max_new_tokens=4, seed=0, stop_ids=(1,),
)  # fmt: skip
MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "experts": {
        "family": "qwen3_moe", "moe_intermediate_size": 16, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip
ADAPTED = {"adapters": "llama", "adapters of experts": "experts"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of the models, by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in MODELS.items():
        save_model(folder / name, hidden_size=16, **options)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def student(models, name):
    model = AutoModelForCausalLM.from_pretrained(models / ADAPTED.get(name, name))
    if name not in ADAPTED:
        return model
    torch.manual_seed(0)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def rows(count, seed):
    rng = np.random.default_rng(seed)
    samples = [
        Sample(rng.integers(4, 260, 8).astype(np.uint32), 3, np.ones(5, bool), source="dataset")
        for _ in range(count)
    ]
    return [Example(i, f"row {i}", s.token_ids[:3], s, None, "") for i, s in enumerate(samples)]


def trainer_of(model, tokenizer, output, **options):
    args = SFTArguments(**{
        "output_dir": str(output), "max_steps": 6, "report_to": "none", "learning_rate": 0.01,
        "use_cpu": True, "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True,
        "per_device_train_batch_size": 4, **options,
    })  # fmt: skip
    return DistillationTrainer(
        model, TrainingPlan(METHOD, vocab_size=260), teacher=None, args=args,
        train_dataset=rows(22, 1), eval_dataset=rows(4, 2), processing_class=tokenizer,
    )  # fmt: skip


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", [*MODELS, *ADAPTED])
def test_a_resumed_run_equals_the_whole_run_to_the_bit(models, tokenizer, tmp_path, name, caplog):
    whole = student(models, name)
    start = weights(whole)
    trainer_of(whole, tokenizer, tmp_path).train()
    trained = {n for n, weight in whole.named_parameters() if weight.requires_grad}
    assert all(not torch.equal(start[n], w) for n, w in weights(whole).items() if n in trained)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = student(models, name)
    caplog.clear()
    trainer = trainer_of(resumed, tokenizer, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert_same(weights(resumed), weights(whole))
    assert "keys" not in caplog.text


class KeepWeights(TrainerCallback):
    """A callback that keeps the weights as they are evaluated, by step."""

    def __init__(self):
        self.found = {}

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.found[state.global_step] = weights(model)


def best_first(model, tokenizer, output, **options):
    """Return a trainer that finds its model the best after the first of three steps."""
    trainer = trainer_of(
        model, tokenizer, output, max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", **options,
    )  # fmt: skip
    trainer.held_out.run = lambda *arguments, step, **options: {"loss": float(step)}
    return trainer


@pytest.mark.parametrize("name", [*MODELS, *ADAPTED])
def test_the_best_model_is_loaded_whole(models, tokenizer, tmp_path, name):
    model, kept = student(models, name), KeepWeights()
    trainer = best_first(model, tokenizer, tmp_path)
    trainer.add_callback(kept)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert_same(weights(model), kept.found[1])


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(models, tokenizer, tmp_path):
    trainer_of(student(models, "experts"), tokenizer, tmp_path, max_steps=3).train()
    file = tmp_path / "checkpoint-3" / "model.safetensors"
    found = load_file(file)
    del found["model.layers.1.input_layernorm.weight"]
    save_file(found, file, metadata={"format": "pt"})
    trainer = trainer_of(student(models, "experts"), tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 weights are not in it, model\.layers\.1\.input"):
        trainer.train(resume_from_checkpoint=str(file.parent))


def test_a_damaged_checkpoint_is_refused(models, tokenizer, tmp_path):
    trainer_of(student(models, "llama"), tokenizer, tmp_path, max_steps=3).train()
    file = tmp_path / "checkpoint-3" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    trainer = trainer_of(student(models, "llama"), tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match="does not load, and nothing in it was run"):
        trainer.train(resume_from_checkpoint=str(file.parent))


def test_adapters_that_are_not_loaded_are_refused(models, tokenizer, tmp_path, monkeypatch):
    """Whatever loads them: the checkpoint has sums of what was trained."""
    trainer_of(student(models, "adapters"), tokenizer, tmp_path, max_steps=3).train()
    model = student(models, "adapters")
    monkeypatch.setattr(type(model), "load_adapter", lambda *arguments, **options: None)
    with pytest.raises(CheckpointError, match=r"weights are not what was saved, .*lora_A"):
        trainer_of(model, tokenizer, tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_a_run_resumed_at_its_end_learns_nothing_more(models, tokenizer, tmp_path):
    """In the middle of an epoch, of which the Trainer would learn one step more."""
    whole = student(models, "llama")
    trainer_of(whole, tokenizer, tmp_path, max_steps=5).train()
    last = tmp_path / "checkpoint-5"
    written = {file.name: file.stat().st_mtime_ns for file in last.iterdir()}
    resumed = student(models, "llama")
    trainer = trainer_of(
        resumed, tokenizer, tmp_path, max_steps=5, save_strategy="epoch", eval_strategy="epoch"
    )
    trainer.add_callback(kept := KeepWeights())
    trainer.train(resume_from_checkpoint=str(last))
    assert (trainer.state.global_step, trainer.stopped, kept.found) == (5, False, {})
    assert_same(weights(resumed), weights(whole))
    assert {file.name: file.stat().st_mtime_ns for file in last.iterdir()} == written


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(
    models, tokenizer, tmp_path, monkeypatch
):
    """At the run's end too, where the Trainer would delete all but the best one."""
    delete, cut = shutil.rmtree, []

    def half(path, *arguments, **options):
        weights_of = tmp_path / path / "model.safetensors"
        if weights_of.exists():
            weights_of.unlink()
            cut.append(weights_of.parent.name)
        else:
            delete(path, *arguments, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", half)
    best_first(student(models, "llama"), tokenizer, tmp_path, save_total_limit=1).train()
    assert cut == ["deleted-checkpoint-2", "deleted-checkpoint-3"]
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
