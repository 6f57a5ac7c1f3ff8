"""The main job through the command line, against a real server process."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_trainer.commands.main import main
from student_trainer.pipeline.prefetched import load_prefetched
from student_trainer.reporting.runs import INPUTS_FILE
from tests.support import trainer_process


def flags(world, output, **options):
    settings = {
        "model_name_or_path": world.student,
        "dataset_name": world.rows,
        "output_dir": output,
        "max_new_tokens": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        **options,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def distill(world, output, **options):
    options = {"teacher_url": world.url, "top_k_logprobs": 16, "max_steps": 4, **options}
    return main(["distill", *flags(world, output, **options)])


def history(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def weights(output):
    return load_file(output / "model.safetensors")


def assert_same_weights(a, b, *, tolerance):
    others = weights(b)
    for name, value in weights(a).items():
        torch.testing.assert_close(others[name], value, atol=tolerance, rtol=0, msg=name)


METHODS = {
    "supervised KD": {"lmbda": 0},
    "SeqKD": {"lmbda": 0, "seq_kd": "true"},
    "on-policy GKD": {"lmbda": 1},
    "mixed": {"lmbda": 0.5},
}


@pytest.mark.parametrize(
    ("method", "beta"),  # each method, each beta, and what is most used with both ends
    [
        ("supervised KD", 0), ("SeqKD", 0.5), ("mixed", 0.5),
        ("on-policy GKD", 0), ("on-policy GKD", 1),
    ],
)  # fmt: skip
def test_divergence_on_held_out_prompts_falls(world, tmp_path, method, beta):
    # Trained on the support that held-out divergences are measured on.
    code = distill(
        world, tmp_path, beta=beta, request_student_top_m=0, max_steps=30,
        eval_dataset_name=world.held_out, eval_strategy="steps", eval_steps=30,
        eval_on_start="true", **METHODS[method],
    )  # fmt: skip
    assert code == 0
    divergences = [e["eval/divergence"] for e in history(tmp_path) if "eval/divergence" in e]
    assert len(divergences) == 2
    assert divergences[1] < 0.8 * divergences[0]
    shown = json.loads((tmp_path / "_held_out_samples.json").read_text())
    samples, count = shown["samples"], len(world.held_out.read_text().splitlines())
    assert [int(one["name"].rpartition(":")[2]) for one in samples] == [
        1 + i * (count - 1) // 3 for i in range(4)
    ]
    assert shown["rows"] == count
    for sample in samples:
        before, after = (sum(e["divergence"]) for e in sample["evaluations"])
        assert [e["step"] for e in sample["evaluations"]] == [0, 30]
        assert after < before
        assert sample["tokens"][-1] == "<|end|>"


def test_sft_learns_the_data_without_a_teacher(world, tmp_path):
    options = {
        "max_steps": 30, "eval_dataset_name": world.held_out, "eval_strategy": "steps",
        "eval_steps": 30, "eval_on_start": "true",
    }  # fmt: skip
    assert main(["sft", *flags(world, tmp_path, **options)]) == 0
    losses = [entry["eval/loss"] for entry in history(tmp_path) if "eval/loss" in entry]
    assert losses[1] < 0.8 * losses[0]


def test_sft_weight_mixes_the_cross_entropy_of_the_data_into_the_loss(world, tmp_path):
    options = {"lmbda": 0, "beta": 0.5, "max_steps": 1}
    assert distill(world, tmp_path / "mixed", sft_weight=0.25, **options) == 0
    entry = history(tmp_path / "mixed")[0]
    expected = 0.75 * entry["train/divergence"] + 0.25 * entry["train/cross_entropy"]
    assert entry["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert distill(world, tmp_path / "plain", **options) == 0
    plain = history(tmp_path / "plain")[0]
    assert plain["train/loss"] == pytest.approx(entry["train/divergence"], rel=1e-4)
    assert plain["train/cross_entropy"] == pytest.approx(entry["train/cross_entropy"], rel=1e-4)


def test_renormalize_drops_the_tail(world, tmp_path):
    options = {"lmbda": 0, "beta": 1, "max_steps": 1, "request_student_top_m": 0}
    losses = []
    for tail in ("bucket", "renormalize"):
        assert distill(world, tmp_path / tail, tail=tail, **options) == 0
        losses.append(history(tmp_path / tail)[0]["train/loss"])
    assert abs(losses[1] - losses[0]) > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_draws_from_the_teacher_lower_the_divergence_on_held_out_prompts(world, tmp_path, method):
    code = distill(
        world, tmp_path, beta=0, teacher_support="sampled", max_steps=30,
        eval_dataset_name=world.held_out, eval_strategy="steps", eval_steps=30,
        eval_on_start="true", **METHODS[method],
    )  # fmt: skip
    assert code == 0
    entries = history(tmp_path)
    divergences = [e["eval/divergence"] for e in entries if "eval/divergence" in e]
    assert divergences[1] < 0.8 * divergences[0]
    steps = [e for e in entries if "train/divergence" in e]
    assert all(e["train/divergence"] == pytest.approx(e["train/loss"], rel=1e-4) for e in steps)
    unknown = {
        "teacher/top_k_mass",
        "teacher/entropy",
        "train/top1_agreement",
        "train/divergence_gap_bound",
    }
    assert not unknown & steps[0].keys()


TWO_STEPS = {"lmbda": 0.5, "optim": "sgd", "learning_rate": 1.0, "max_steps": 2}


@pytest.fixture(scope="module")
def two_steps(world, tmp_path_factory):
    """The folder of a run of two steps, to compare runs with that compute the same otherwise."""
    output = tmp_path_factory.mktemp("two_steps")
    assert distill(world, output, loss_kernel="torch", **TWO_STEPS) == 0
    return output


def test_the_triton_kernel_trains_the_same_weights(world, two_steps, tmp_path):
    assert distill(world, tmp_path, loss_kernel="triton", **TWO_STEPS) == 0
    assert_same_weights(two_steps, tmp_path, tolerance=2e-5)


def test_logs_tell_what_happened(world, tmp_path):
    assert distill(world, tmp_path, lmbda=1) == 0
    entry = history(tmp_path)[0]
    assert entry["train/on_policy"] == 1.0
    assert 0 < entry["teacher/top_k_mass"] < 1
    assert 0 < entry["train/student_top_k_mass"] < 1
    assert 0 < entry["teacher/entropy"] < 5
    assert 0 < entry["train/student_entropy"] < 5
    assert 1 <= entry["train/completion_length"] <= 12
    assert 0 <= entry["train/truncated"] <= 1
    assert 0 <= entry["train/top1_agreement"] <= 1
    assert 0 < entry["train/divergence_gap_bound"] < 0.7  # the entropy of a coin at most
    assert entry["train/cross_entropy"] > 0
    assert entry["train/divergence"] == pytest.approx(entry["train/loss"], rel=1e-4)
    # 16 ids and float16 log-probs, next token and tail in float32; and what is around them.
    assert entry["teacher/bytes_per_token"] > 16 * (4 + 2) + 2 * 4
    parts = [entry[f"time/{name}"] for name in ("generating", "forward_backward", "optimizer")]
    assert min(parts) > 0
    assert sum(parts) + entry["time/teacher"] <= entry["time/step"]
    assert entry["time/syncing"] < 1e-3  # the student writes by itself
    assert 0 <= entry["time/stall_fraction"] < 1
    assert entry["teacher/tokens_per_second"] > 0
    assert entry["train/staleness"] == entry["train/staleness_max"] == 0


SAMPLED = {"lmbda": 1, "num_generations": 4, "rollout_top_p": 0.9, "rollout_top_k": 50}
BATCHED = pytest.mark.parametrize(
    "method",
    [{"lmbda": 0}, {"lmbda": 1}, SAMPLED],
    ids=["off-policy", "on-policy", "four a prompt"],
)


@BATCHED
def test_accumulated_small_batches_equal_one_large_batch(world, tmp_path, method):
    plain = {**method, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0}
    assert distill(world, tmp_path / "whole", **plain) == 0
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert distill(world, tmp_path / "parts", **plain, **small) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", tolerance=2e-5)


@BATCHED
def test_two_processes_equal_one(world, tmp_path, method):
    plain = {**method, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0}
    assert distill(world, tmp_path / "one", **plain) == 0
    words = flags(
        world, tmp_path / "two", teacher_url=world.url, top_k_logprobs=16, max_steps=4,
        **{**plain, "per_device_train_batch_size": 4},
    )  # fmt: skip
    trainer_process.train_on_two_ranks(["distill", *words])
    assert_same_weights(tmp_path / "one", tmp_path / "two", tolerance=2e-5)
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for a, b in zip(one[:4], two[:4], strict=True):
        for name in (
            "train/loss",
            "train/divergence",
            "train/completion_length",
            "teacher/top_k_mass",
        ):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name


def test_a_model_sharded_over_two_processes_learns_what_one_learns(world, tmp_path):
    """By FSDP, off-policy and on-policy, and once more from a checkpoint."""
    assert distill(world, tmp_path / "one", lmbda=0.5) == 0
    assert {entry["train/on_policy"] for entry in history(tmp_path / "one")[:4]} == {0, 1}
    output = tmp_path / "two"
    words = flags(
        world, output, teacher_url=world.url, top_k_logprobs=16, max_steps=4, lmbda=0.5,
        per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    words = ["distill", *words, "--fsdp", "--resume_from_checkpoint=auto"]
    for _ in range(2):
        with trainer_process.two_ranks(words) as ranks:
            for rank in ranks:
                rank.join(300)
                assert rank.exitcode == 0
        assert_same_weights(tmp_path / "one", output, tolerance=2e-5)
        assert (output / "checkpoint-2" / "pytorch_model_fsdp.bin").exists()  # it was sharded
        shutil.rmtree(output / "checkpoint-4")
        (output / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "how", [["--gradient_checkpointing"], ["--torch_compile", "--torch_compile_backend=aot_eager"]],
    ids=["gradient checkpointing", "compiled"],
)  # fmt: skip
def test_how_the_forward_pass_is_run_changes_no_weights(world, two_steps, tmp_path, how):
    words = flags(world, tmp_path, teacher_url=world.url, top_k_logprobs=16, **TWO_STEPS)
    # In a process of its own: accelerate keeps what it compiles with until the process ends.
    trainer_process.train(["distill", *words, *how])
    assert_same_weights(two_steps, tmp_path, tolerance=2e-5)


@pytest.mark.parametrize(
    "method",
    [
        {"lmbda": 0},
        {"lmbda": 0.5},
        {"lmbda": 1},
        {"lmbda": 0, "request_student_top_m": 4},
        {"lmbda": 0, "seq_kd": "true", "request_student_top_m": 4},
        {"lmbda": 0.5, "beta": 0, "teacher_support": "sampled"},
        {**SAMPLED, "rollout_staleness": 1},
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(world, tmp_path, method):
    plain = {**method, "max_steps": 9, "save_strategy": "steps", "save_steps": 4}
    assert distill(world, tmp_path, **plain) == 0
    uninterrupted = weights(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-8")
    shutil.rmtree(tmp_path / "checkpoint-9")
    (tmp_path / "model.safetensors").unlink()
    assert distill(world, tmp_path, **plain, resume_from_checkpoint="true") == 0  # from step 4
    resumed = weights(tmp_path)
    for name, value in uninterrupted.items():
        torch.testing.assert_close(resumed[name], value, atol=0, rtol=0, msg=name)


def test_epochs_end_where_the_trainer_counts_them(unserved_world, tmp_path):
    """48 rows are 7 batches, and those 2 steps, the second one of 3; an epoch and a half is 3."""
    options = {
        "per_device_train_batch_size": 7, "gradient_accumulation_steps": 4,
        "num_train_epochs": 1.5, "eval_dataset_name": unserved_world.held_out,
        "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1,
        "load_best_model_at_end": "true",
    }  # fmt: skip
    assert main(["sft", *flags(unserved_world, tmp_path, **options)]) == 0
    entries = history(tmp_path)
    epochs = [round(entry["epoch"] * 7) for entry in entries if "train/loss" in entry]
    assert epochs == [4, 7, 11]
    evaluated = [entry for entry in entries if "eval/loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 3]
    best = min(evaluated, key=lambda entry: entry["eval/loss"])
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [
        f"checkpoint-{best['step']}"
    ]
    kept = load_file(tmp_path / f"checkpoint-{best['step']}" / "model.safetensors")
    assert all(value.equal(kept[name]) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize("stream", [[], ["--streaming"]], ids=["rows in memory", "a stream"])
def test_four_completions_of_a_prompt_fill_a_step(world, tmp_path, stream):
    """48 rows are 24 steps of 2 prompts, and an eighth of an epoch is 3 steps."""
    length = {"max_steps": 3} if stream else {"max_steps": -1, "num_train_epochs": 0.125}
    options = {**SAMPLED, **length, "teacher_url": world.url, "top_k_logprobs": 16}
    saved = {"save_strategy": "steps", "save_steps": 2, "rollout_staleness": 1}
    words = ["distill", *flags(world, tmp_path, **options, **saved), *stream]
    assert main(words) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["max_steps"], state["global_step"]) == (3, 3)
    assert stream or state["epoch"] == 0.125
    # The next step's completions, written a step ahead.
    [ahead] = load_prefetched(tmp_path / "checkpoint-2" / "ahead-0.npz")
    prompts = [tuple(sample.prompt_ids.tolist()) for sample in ahead.samples]
    assert [prompts.count(prompt) for prompt in prompts] == [4] * 8
    assert [ahead.examples[place] for place in (0, 4)] == [ahead.examples[3], ahead.examples[7]]
    written = [tuple(sample.completion_ids.tolist()) for sample in ahead.samples]
    assert len(set(written)) == 8
    card = (tmp_path / "README.md").read_text()
    assert "on 6 rows " in card
    assert "It wrote 4 completions of each prompt in a step." in card
    inputs = json.loads((tmp_path / "checkpoint-2" / INPUTS_FILE).read_text())["same"]
    assert {name: inputs[f"--{name}"] for name in SAMPLED} == SAMPLED
    learned = weights(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-3")
    (tmp_path / "model.safetensors").unlink()
    assert main([*words, "--resume_from_checkpoint=auto"]) == 0
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(learned[name], value, atol=0, rtol=0, msg=name)


def test_checkers_of_held_out_rows_are_asked_while_training(world, tmp_path):
    talk = [{"role": "user", "content": "say ab"}, {"role": "assistant", "content": "ab"}]
    program = {
        "kind": "python", "prompt": "def f():\n", "entry_point": "f",
        "test": "def check(f):\n    assert f() == 1\n",
    }  # fmt: skip
    rows = [
        {"messages": talk, "checker": {"kind": "exact_match", "answer": "ab"}},
        {"messages": talk, "checker": {"kind": "exact_match", "answer": "other"}},
        {"messages": talk[:1], "checker": program},
    ]
    held_out, train = tmp_path / "held_out.jsonl", tmp_path / "train.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.write_text((json.dumps({"messages": talk}) + "\n") * 8)
    options = {"eval_dataset_name": held_out, "eval_strategy": "steps", "eval_steps": 30}
    assert main(["sft", *flags(world, tmp_path / "out", dataset_name=train, max_steps=30,
                               eval_on_start="true", **options)]) == 0  # fmt: skip
    before, after = (e for e in history(tmp_path / "out") if "eval/loss" in e)
    assert (before["eval/exact_match"], before["eval/pass@1"]) == (0.0, 0.0)
    assert (after["eval/exact_match"], after["eval/pass@1"]) == (0.5, 0.0)  # "ab" is learned


def test_the_launch_line_trains_adapters(world, tmp_path):
    line = (
        f"--teacher_url {world.url} --learning_rate 2e-5 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 8 --logging_steps 2 --num_train_epochs 1 "
        "--gradient_checkpointing --lmbda 0.5 --beta 0.5 --use_peft --lora_r 32 --lora_alpha 16 "
        "--trust_remote_code --bf16 --save_strategy steps --save_steps 180 --save_total_limit 5 "
        "--warmup_steps 10 --lr_scheduler_type cosine --torch_dtype bfloat16"
    )
    output = tmp_path / "out"
    launch(
        ["accelerate.commands.launch", "-m", "student_trainer", "distill",
         f"--model_name_or_path={world.student}",
         f"--dataset_name={world.rows}", f"--output_dir={output}", *line.split()]
    )  # fmt: skip
    adapters = load_file(output / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapters.items() if "lora_B" in name)
    assert "lm_head" not in " ".join(adapters)


def launch(words):
    """A launcher in a process of its own; its output is shown when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_tensorboard_works_as_in_any_trainer_run(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    measured = {"eval_dataset_name": world.held_out, "eval_strategy": "steps", "eval_steps": 2}
    assert distill(world, tmp_path / "out", report_to="tensorboard", max_steps=2, **measured) == 0
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    windows = history(tmp_path / "out")
    drawn = {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    for window in windows:
        for name, value in window.items():
            if name != "step":
                tag = "train/epoch" if name == "epoch" else name  # all others have their group
                assert drawn[tag, window["step"]] == pytest.approx(value, nan_ok=True)
    learned = {
        "train/loss",
        "train/divergence",
        "teacher/entropy",
        "train/top1_agreement",
        "time/teacher",
    }
    assert learned <= {tag for tag, _ in drawn}
    assert ("eval/divergence", 2) in drawn


def test_seq_kd_generates_once_and_reuses_over_epochs(world, tmp_path):
    import httpx

    def generated():
        lines = httpx.get(f"{world.url}/metrics").text.splitlines()
        line = 'teacher_requests_total{route="/v1/generate",status="200"} '
        return sum(float(text.removeprefix(line)) for text in lines if text.startswith(line))

    before = generated()
    # 48 rows in batches of 8: 6 steps an epoch, one request each in the first epoch only
    assert distill(world, tmp_path, lmbda=0, seq_kd="true", max_steps=18) == 0
    assert generated() - before == 6


def test_padded_vocabularies_are_no_mismatch(world, tmp_path):
    from tests.support.models import save_model, save_tokenizer

    save_tokenizer(tmp_path / "padded")
    save_model(tmp_path / "padded", vocab_size=272, hidden_size=16, seed=3)
    assert distill(world, tmp_path / "out", model_name_or_path=tmp_path / "padded", lmbda=1) == 0
    before = load_file(tmp_path / "padded" / "model.safetensors")["lm_head.weight"]
    after = weights(tmp_path / "out")["lm_head.weight"]
    moved = (after - before).abs().amax(dim=1)
    assert moved[:260].min() > 0
    assert moved[260:].max() < 0.02  # no gradient there: only AdamW's weight decay


def test_another_vocabulary_is_refused_with_both_fingerprints(world, tmp_path, capsys):
    from transformers import AutoTokenizer

    from tests.support.models import save_model

    folder = tmp_path / "other"
    save_model(folder, vocab_size=270)
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    tokenizer.add_tokens(["brand-new"])
    tokenizer.save_pretrained(folder)
    assert distill(world, tmp_path / "out", model_name_or_path=folder) == 2
    message = capsys.readouterr().err
    assert "different vocabularies" in message
    assert message.count("tokens)") == 2
    assert not (tmp_path / "out").exists()


def test_bare_prompts_off_policy_are_refused_before_training(world, tmp_path, capsys):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 8)
    assert distill(world, tmp_path / "out", dataset_name=bare, lmbda=0.5) == 2
    assert "bare.jsonl:1: no completion to learn from" in capsys.readouterr().err


def test_an_unreachable_teacher_is_waited_for_and_then_named(world, tmp_path, capsys):
    url = "http://127.0.0.1:9"
    assert distill(world, tmp_path / "out", teacher_url=url, teacher_timeout=1.5) == 1
    message = capsys.readouterr().err
    assert f"the teacher at {url} is not reachable" in message
    assert "raise --teacher_timeout" in message


def test_missing_files_are_told_before_a_teacher_is_waited_for(world, tmp_path, capsys):
    away = {"teacher_url": "http://127.0.0.1:9", "teacher_timeout": 60}
    assert distill(world, tmp_path / "out", **away, dataset_name=tmp_path / "no.jsonl") == 2
    assert f"{tmp_path / 'no.jsonl'}: no such file" in capsys.readouterr().err
    missing = {"eval_dataset_name": tmp_path / "held_out.jsonl", "eval_strategy": "steps"}
    assert distill(world, tmp_path / "out", **away, **missing) == 2
    assert "held_out.jsonl: no such file" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_refused(world, capsys):
    assert main(["sft", *flags(world, "/proc/nowhere/out", max_steps=1)]) == 2
    assert "--output_dir /proc/nowhere/out: /proc is no folder" in capsys.readouterr().err


def test_k_over_the_teachers_limit_is_refused_before_training(world, tmp_path, capsys):
    assert distill(world, tmp_path / "out", top_k_logprobs=261) == 2
    assert "over the teacher's limit of 260" in capsys.readouterr().err


def test_a_prompt_without_room_for_the_completion_is_refused_by_name(world, tmp_path, capsys):
    assert distill(world, tmp_path / "out", max_new_tokens=300, lmbda=1) == 2
    assert "rows.jsonl:1: a prompt of" in capsys.readouterr().err


def test_long_rows_are_told_with_what_would_help(world, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    talk = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    long.write_text(json.dumps({"messages": talk}) + "\n")
    assert distill(world, tmp_path / "out", dataset_name=long, lmbda=0) == 2
    assert "That is the context of student and teacher; pass --skip" in capsys.readouterr().err
    assert distill(world, tmp_path / "out", dataset_name=long, lmbda=0, max_length=100) == 2
    assert "Raise --max_length, up to 256, or pass --skip" in capsys.readouterr().err
    assert distill(world, tmp_path / "out", lmbda=0, max_length=512) == 2
    assert "--max_length 512 is over the context of student and teacher, 256" in (
        capsys.readouterr().err
    )


def test_completions_that_never_end_are_told(world, tmp_path, caplog):
    assert distill(world, tmp_path, lmbda=1, max_new_tokens=1, max_steps=2) == 0
    told = [record.message for record in caplog.records if "are cut at" in record.message]
    assert len(told) == 1
    assert "--max_new_tokens 1 " in told[0]
