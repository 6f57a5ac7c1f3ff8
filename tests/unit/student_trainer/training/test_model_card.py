"""The card says what a model is made of, in the Hub's metadata too, and nothing of the machine."""

import pytest
from huggingface_hub import ModelCard

from shared.protocol import TeacherIdentity
from student_trainer.config.arguments import DistillFlags, SFTFlags
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.parse import parse
from student_trainer.training.model_card import TrainingRows, method_of, model_card

TEACHER = TeacherIdentity(
    model="/data/secret-folder/teacher", fingerprint="f" * 64, dtype="bfloat16", backend="vllm",
    version="0.32.0",
)  # fmt: skip
HISTORY = [
    {"step": 1, "train/loss": 2.0, "train/divergence": 0.5},
    {"step": 10, "eval/divergence": 0.25, "eval/pass@1": 0.125},
    {"step": 10, "train/runtime": 61.0},
]
ROWS = TrainingRows(4000, 16, 250)


def card_of(command, teachers, **options):
    settings = {
        "model_name_or_path": "org/base", "dataset_name": "org/rows", "output_dir": "/x/out",
        **options,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    arguments = parse(words, *ARGUMENTS[command], prog="", description="")
    return model_card(
        "student", HISTORY, arguments=arguments, teachers=teachers, rows=ROWS, dtype="bfloat16"
    )


def distilled(**options):
    return card_of("distill", {"": TEACHER}, teacher_url="http://10.0.0.7:8000", **options)


def test_the_metadata_are_those_of_the_hub():
    data = ModelCard(distilled()).data
    assert data.base_model == "org/base"
    assert data.datasets == ["org/rows"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["sparse-gkd", "knowledge-distillation"]
    adapters = ModelCard(card_of("sft", {}, use_peft=True)).data
    assert adapters.library_name == "peft"
    assert adapters.tags == ["sparse-gkd", "sft"]


def test_teacher_data_method_flags_and_numbers_are_told():
    schedule = {"eval_strategy": "epoch", "lr_scheduler_type": "cosine"}
    text = distilled(lmbda=1, beta=0, learning_rate=3e-5, eval_dataset_name="org/held", **schedule)
    for told in (
        "# student\n", "`teacher` (`bfloat16`, `vllm 0.32.0`; fingerprint `ffffffffffffffff`)",
        "on-policy GKD", "forward KL at temperature 1", "trained in bfloat16 by on-policy GKD",
        "on 160 rows drawn from the 4,000 of `org/rows` (10 optimizer steps of 16, 0.04 epochs).",
        "Given for this run; all others are the defaults",
        "| `--learning_rate` | `3e-05` |", "| `--beta` | `0.0` |",
        "| `--eval_strategy` | `epoch` |", "| `--lr_scheduler_type` | `cosine` |",
        "| held-out divergence, nats a token | 0.25 |", "| held-out pass@1 | 0.125 |",
        "| optimizer steps | 10 |", "AutoModelForCausalLM",
    ):  # fmt: skip
        assert told in text
    assert "AutoPeftModelForCausalLM" in card_of("sft", {}, use_peft=True)


def test_sampling_off_the_students_distribution_is_told():
    text = distilled(lmbda=1, rollout_top_k=20, num_generations=4, gradient_accumulation_steps=4)
    assert (
        "The student's completions were sampled with top-k 20, so not from the distribution that "
        "the loss compares: not strictly on-policy. It wrote 4 completions of each prompt in a "
        "step."
    ) in text
    assert "| `--rollout_top_k` | `20` |" in text
    # At the temperature at which the loss compares them.
    assert "sampled with" not in distilled(lmbda=1, temperature=0.5, rollout_temperature=0.5)
    assert "sampled with temperature 0.5" in distilled(lmbda=1, rollout_temperature=0.5)


def test_flags_at_their_defaults_are_not_told():
    text = card_of("sft", {})
    assert "| `--" not in text
    assert "All are the defaults of this version." in text


def test_adapters_are_told_with_their_rank():
    text = card_of("sft", {}, use_peft=True, lora_r=8)
    assert "LoRA adapters (rank 8, alpha 16) for `org/base`, trained" in text
    assert "| `--lora_alpha`" not in text


@pytest.mark.parametrize(
    ("rows", "steps", "drawn"),
    [
        (TrainingRows(4000, 32, 125), 5, 160),
        (TrainingRows(48, 8, 6), 15, 120),
        (TrainingRows(50, 8, 7), 7, 50),  # the last step of an epoch has the rest
        (TrainingRows(50, 8, 6), 12, 96),  # --dataloader_drop_last leaves 2 out
        (TrainingRows(5, 8, 1), 3, 15),
        (TrainingRows(800, 8, None), 100, 800),
    ],
)
def test_rows_are_counted_as_often_as_they_are_learned(rows, steps, drawn):
    assert rows.drawn(steps) == drawn


def test_nothing_of_this_machine_and_no_key_is_on_it(tmp_path, monkeypatch):
    key, rows, base = tmp_path / "secret.key", tmp_path / "rows.jsonl", tmp_path / "base"
    key.write_text("k" * 40)
    rows.touch()
    base.mkdir()
    monkeypatch.setenv("TEACHER_API_KEY", "e" * 40)
    text = distilled(
        model_name_or_path=base, dataset_name=rows, eval_dataset_name=rows, hub_token="h" * 40,
        teacher_api_key_file=key, teacher_cache=tmp_path / "cache", run_name="private",
    )  # fmt: skip
    for secret in (
        str(tmp_path), "10.0.0.7", "k" * 40, "e" * 40, "h" * 40, "secret", "private", "/x/out"
    ):  # fmt: skip
        assert secret not in text
    assert "`base`" in text
    assert "`rows.jsonl`" in text
    data = ModelCard(text).data
    assert data.base_model is None  # the Hub would look for it
    assert data.datasets is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lmbda": 0.0}, "supervised KD"),
        ({"lmbda": 0.0, "seq_kd": True}, "SeqKD"),
        ({"lmbda": 1.0}, "on-policy GKD"),
        ({"lmbda": 0.5}, "a mixture of on-policy GKD"),
        ({"lmbda": 0.5, "seq_kd": True}, "and SeqKD"),
    ],
)
def test_methods_are_called_by_their_names(tmp_path, options, name):
    assert name in method_of(DistillFlags(output_dir=str(tmp_path), **options))
    assert method_of(SFTFlags(output_dir=str(tmp_path))) == "supervised fine-tuning (SFT)"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "its 64 most probable tokens and an exact tail"),
        ({"tail": "renormalize"}, "its 64 most probable tokens, without a tail"),
        ({"teacher_support": "sampled", "top_k_logprobs": 8, "beta": 0}, "8 draws from its"),
        ({"beta": 0.25, "temperature": 2}, "generalized JSD with beta 0.25 at temperature 2."),
    ],
)
def test_what_the_student_saw_of_the_teacher_is_told(options, told):
    assert told in distilled(**options)


def test_each_of_several_teachers_is_told():
    other = TEACHER.model_copy(update={"model": "coder", "fingerprint": "a" * 64})
    teachers = {"math": TEACHER, "code": other}
    text = card_of("distill", teachers, teacher_url="math=http://10.0.0.7:8000")
    assert "The teachers, each of its own rows, were `math`: `teacher` (`bfloat16`" in text
    assert "`code`: `coder` (`bfloat16`" in text
    assert "fingerprint `aaaaaaaaaaaaaaaa`" in text
    assert "10.0.0.7" not in text
