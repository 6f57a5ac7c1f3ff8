"""Flags: what is accepted as it stands, and what is refused before a model loads."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from shared.errors import ConfigurationError
from student_trainer.config.arguments import (
    AdapterArguments,
    DistillFlags,
    MergeArguments,
    Recipe,
    traced_steps,
)
from student_trainer.config.checks import UNSUPPORTED, check_merge, check_recipe
from student_trainer.config.checks.rollouts import check_rollouts, rollout_addresses
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.habits import HABITS
from student_trainer.config.machine import check_machine
from student_trainer.config.parse import _flags, parse, parse_keywords
from student_trainer.config.trainer_flags import trainer_flags
from student_trainer.config.training_arguments import checkpoint_of, training_arguments
from tests.support.flags import checked

LAUNCH_LINE = (
    "--model_name_or_path {model} --teacher_url http://127.0.0.1:8000 --dataset_name data.jsonl "
    "--learning_rate 2e-5 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 "
    "--output_dir out --logging_steps 2 --num_train_epochs 1 --gradient_checkpointing --lmbda 0.5 "
    "--beta 0.5 --use_peft --lora_r 32 --lora_alpha 16 --trust_remote_code --bf16 "
    "--save_strategy steps --save_steps 180 --save_total_limit 5 --warmup_steps 10 "
    "--lr_scheduler_type cosine --torch_dtype bfloat16"
)
TYPES = ARGUMENTS["distill"]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def read(words: list[str]):
    parsed = parse(words, *TYPES, prog="student-trainer distill", description="")
    return (*parsed[:-1], checked(parsed))


def words(model_folder: Path, *more: str) -> list[str]:
    return [*LAUNCH_LINE.format(model=model_folder).split(), *more]


def test_the_launch_line_is_accepted_as_it_stands(model_folder):
    model, adapters, _, _, _, _, teacher, args = read(words(model_folder))
    assert (args.lmbda, args.beta, args.learning_rate) == (0.5, 0.5, 2e-5)
    assert (adapters.lora_r, adapters.lora_alpha, model.torch_dtype) == (32, 16, "bfloat16")
    assert args.gradient_accumulation_steps == 8
    assert args.bf16
    assert teacher.teacher_url == ["http://127.0.0.1:8000"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lmbda", "1.5"], "--lmbda 1.5 must be from 0 to 1"),
        (["--beta", "-0.1"], "--beta -0.1 must be from 0 to 1"),
        (["--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["--seq_kd", "--lmbda", "1"], "--seq_kd has no effect with --lmbda 1"),
        (["--seq_kd_temperature", "0.7"], "no effect without --seq_kd"),
        (["--top_k_logprobs", "0"], "--top_k_logprobs 0 must be at least 1"),
        (["--request_student_top_m", "-1"], "--request_student_top_m -1 must be 0 (none) or above"),
        (["--teacher_support", "sampled"], "forward KL alone, and --beta is 0.5: set --beta 0"),
        (
            ["--teacher_support", "sampled", "--beta", "0", "--tail", "renormalize"],
            "--tail renormalize has no effect with --teacher_support sampled",
        ),
        (
            ["--teacher_support", "sampled", "--beta", "0", "--request_student_top_m", "4"],
            "--request_student_top_m 4 would bias --teacher_support sampled",
        ),
        (
            ["--teacher_support", "sampled", "--beta", "0", "--teacher_protocol", "vllm"],
            "so --teacher_protocol vllm takes top_k only; use `teacher-server serve`",
        ),
        (
            ["--teacher_support", "sampled", "--beta", "0", "--teacher_cache", "answers"],
            "--teacher_cache answers keeps nothing of --teacher_support sampled",
        ),
        (["--sft_weight", "1"], "--sft_weight 1.0 must be 0 or above and below 1"),
        (["--sft_weight", "0.2", "--lmbda", "1"], "no effect with --lmbda 1"),
        (["--sft_weight", "0.2", "--temperature", "2"], "needs --temperature 1"),
        (["--rollout_staleness", "-1"], "--rollout_staleness -1 must be 0 or above"),
        (["--rollout_staleness", "1", "--lmbda", "0"], "no effect with --lmbda 0"),
        (
            [
                "--rollout_staleness",
                "1",
                "--lmbda",
                "0",
                "--request_student_top_m",
                "4",
                "--seq_kd",
            ],
            "no effect with --lmbda 0",
        ),
        (["--teacher_prefetch_steps", "-1"], "--teacher_prefetch_steps -1 must be 0 or above"),
        (["--teacher_prefetch_steps", "3", "--lmbda", "1"], "no effect with --lmbda 1"),
        (
            ["--teacher_prefetch_steps", "3", "--request_student_top_m", "4"],
            "--teacher_prefetch_steps 3 has no effect with --request_student_top_m 4",
        ),
        (["--bf16_full_eval"], "--bf16_full_eval True has no effect: evaluation computes as"),
        (["--trace_steps", "0"], "--trace_steps 0 must be a step from 1"),
        (["--trace_steps", "5-4"], "--trace_steps 5-4 must be a step from 1"),
        (["--trace_steps", "all"], "or a range such as 10-12"),
        (["--dataloader_num_workers", "2"], "rows are token ids in memory"),
        (["--ignore_data_skip"], "would learn rows twice"),
        (["--accelerator_config", '{"split_batches": true}'], "no effect here"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
        (["--teacher_timeout", "0"], "--teacher_timeout 0.0 must be above 0"),
        (["--teacher_repeat_tolerance", "-1"], "--teacher_repeat_tolerance -1.0 must be 0 or"),
        (["--enable_jit_checkpoint"], "SIGTERM saves a checkpoint anyway"),
        (["--teacher_url", "host:8000"], "must look like http://host:8000"),
        (["--teacher_url", "https://me:s3cret@host"], "--teacher_url holds a user or a password"),
        (["--teacher_api_key_file", "/no/key"], "--teacher_api_key_file /no/key: No such file"),
        (["--teacher_api_key=s3cret"], "unknown argument '--teacher_api_key'. Did you mean"),
        (
            ["--teacher_protocol", "vllm", "--temperature", "0.5"],
            "--temperature 0.5: vLLM never applies a temperature",
        ),
        (
            ["--teacher_protocol", "vllm", "--teacher_logprob_dtype", "float32"],
            "--teacher_logprob_dtype float32 has no effect with --teacher_protocol vllm",
        ),
        (["--model_name_or_path", "/no/such/model"], "folder /no/such/model does not exist"),
        (["--use_peft", "false"], "--lora_r has no effect without --use_peft"),
        (["--dataset_name", "a", ""], "--dataset_name holds an empty name"),
        (["--dataset_weights", "1"], "--dataset_weights 1 has no effect on one dataset"),
        (["--dataset_name", "a", "b", "--dataset_weights", "1"], "1 weights for 2 datasets"),
        (["--dataset_name", "a", "b", "--dataset_weights", "1", "0"], "each must be above 0"),
        (["--dataset_name", "a", "b", "--dataset_weights", "1", "nan"], "each must be above 0"),
        (["--dataset_num_proc", "0"], "--dataset_num_proc 0 must be at least 1"),
        (["--prompt_column", "completion"], "are both completion"),
        (["--shuffle_buffer_size", "9"], "--shuffle_buffer_size 9 has no effect without"),
        (["--streaming"], "--streaming needs --max_steps"),
        (["--streaming", "--max_steps", "9", "--shuffle_buffer_size", "0"], "must be at least 1"),
        (["--streaming", "--max_steps", "9", "--dataset_num_proc", "2"], "no effect with --stream"),
        (["--streaming", "--max_steps", "9", "--save_strategy", "epoch"], "has no epochs"),
        (["--eval_strategy", "steps"], "needs --eval_dataset_name"),
        (["--do_eval"], "--do_eval has no effect; say when: --eval_strategy steps or epoch"),
        (["--unsafe_sandbox"], "--unsafe_sandbox has no effect without --eval_dataset_name"),
        (["--max_length", "1"], "--max_length 1 must be at least 2"),
        (["--generation_batch_size", "0"], "must be at least 1"),
        (["--max_tokens_per_batch", "0"], "--max_tokens_per_batch 0 must be at least 1"),
        (["--fp16"], "--bf16 and --fp16 are two dtypes to compute in: give one of them"),
        (["--label_smoothing_factor", "0.1"], "has no effect on a divergence"),
        (["--auto_find_batch_size"], "--auto_find_batch_size True would mix"),
        (["--use_liger_kernel"], "the loss here is fused already"),
        (["--train_sampling_strategy", "group_by_length"], "the order is random"),
        (["--report_to", "comet_ml"], "is not installed here: pip install comet-ml. There is"),
        (["--report_to", "tensor_board"], "--report_to tensor_board is not one of azure_ml, "),
        (["--fsdp", "full_shard"], "--fsdp shards over several processes"),
        (["--deepspeed", "zero3.json"], "DeepSpeed is not installed here"),
        (["--lamda", "0.5"], "Did you mean --lmbda?"),
        (["--no_such_flag"], "unknown argument '--no_such_flag'"),
    ],
)
def test_what_cannot_work_is_refused_with_value_and_remedy(model_folder, more, message):
    with pytest.raises(ConfigurationError) as caught:
        read(words(model_folder, *more))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_flag_of_transformers_without_effect_is_refused(model_folder, name):
    flag = trainer_flags()[name]
    other = {"bool": str(not flag.default), "int": "1", "float": "0.5"}.get(flag.kind)
    value = other or next(one for one in [*flag.choices, "x"] if one != flag.default)
    with pytest.raises(ConfigurationError) as caught:
        read(words(model_folder, f"--{name}={value}"))
    assert str(caught.value) == f"--{name} {value} {UNSUPPORTED[name]}"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_its_package(
    model_folder, monkeypatch, name
):
    monkeypatch.setattr(
        "student_trainer.config.machine.get_available_reporting_integrations",
        lambda: ["tensorboard"],
    )
    with pytest.raises(ConfigurationError) as caught:
        read(words(model_folder, "--report_to", name))
    assert str(caught.value) == (
        f"--report_to {name} is not installed here: pip install {name}. There is tensorboard or "
        "none"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["none"], []),
        (["tensorboard"], ["tensorboard"]),
        (["tensorboard", "wandb"], ["tensorboard", "wandb"]),
    ],
)
def test_several_trackers_may_be_named(model_folder, monkeypatch, given, expected):
    monkeypatch.setattr(
        "student_trainer.config.machine.get_available_reporting_integrations",
        lambda: ["tensorboard", "wandb"],
    )
    assert read(words(model_folder, "--report_to", *given))[-1].report_to == expected


def pretend(monkeypatch, package, *, installed):
    find, found = importlib.util.find_spec, object() if installed else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: found if name == package else find(name, *a)
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lmbda", "0"], "--rollout_engine vllm has no effect with --lmbda 0"),
        (["--rollout_temperature", "2.5"], "--rollout_temperature 2.5: vLLM samples from 0.01 to"),
        (["--rollout_temperature", "0.001"], "vLLM samples from 0.01 to 2"),
        (["--vllm_gpu_memory_utilization", "1"], "1.0 must be between 0 and 1"),
        (["--vllm_tensor_parallel_size", "3"], "size 3 must divide the processes of each machine"),
        (["--vllm_tensor_parallel_size", "0"], "size 0 must divide the processes of each machine"),
        (
            ["--vllm_enable_sleep_mode", "--rollout_staleness", "1"],
            "--vllm_enable_sleep_mode frees no memory with --rollout_staleness 1",
        ),
        (["--use_peft", "--load_in_4bit"], "--rollout_engine vllm takes no 4-bit weights"),
    ],
)
def test_what_vllm_rollouts_cannot_do_is_refused(model_folder, monkeypatch, more, message):
    pretend(monkeypatch, "vllm", installed=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    read(words(model_folder, "--rollout_engine", "vllm", "--vllm_tensor_parallel_size", "2"))
    with pytest.raises(ConfigurationError) as caught:
        read(words(model_folder, "--rollout_engine", "vllm", *more))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rollout_engine", "vllm"], "both write the student's completions; drop one"),
        (["--rollout_url", "http://gpu2:8001/"], "--rollout_url http://gpu2:8001 is given twice"),
        (["--rollout_url", "http://me:hidden@gpu3"], "which every log would show"),
        (["--rollout_url", "gpu3:8001"], "must look like http://host:8000"),
        (["--rollout_timeout", "0"], "--rollout_timeout 0.0 must be above 0"),
        (["--lmbda", "0"], "--rollout_url has no effect with --lmbda 0"),
        (
            ["--vllm_tensor_parallel_size", "2"],
            "--vllm_tensor_parallel_size has no effect without --rollout_engine vllm",
        ),
        (
            ["--vllm_enable_sleep_mode"],
            "--vllm_enable_sleep_mode has no effect without --rollout_engine vllm",
        ),
        (["--rollout_max_tokens_in_flight", "0"], "in_flight 0 must be at least 1"),
    ],
    ids=[
        "two engines",
        "twice",
        "password",
        "no address",
        "no wait",
        "no rollouts",
        "split",
        "sleep",
        "no tokens",
    ],
)
def test_rollout_servers_that_cannot_work_are_refused(model_folder, monkeypatch, more, message):
    pretend(monkeypatch, "vllm", installed=True)
    url = ["--rollout_url", "http://gpu2:8001"]
    read(words(model_folder, *url))
    with pytest.raises(ConfigurationError) as caught:
        read(words(model_folder, *url, *more))
    assert message in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout_top_p", "0"], "--rollout_top_p 0.0 must be above 0, and 1 (off) or below"),
        (["--rollout_top_p", "1.1"], "--rollout_top_p 1.1 must be above 0"),
        (["--rollout_top_k", "-1"], "--rollout_top_k -1 must be 0 (off) or a number of tokens"),
        (["--rollout_min_p", "1.5"], "--rollout_min_p 1.5 must be from 0 (off) to 1"),
        (["--lmbda", "0", "--rollout_top_k", "5"], "--rollout_top_k 5 has no effect with --lmbda"),
        (["--lmbda", "1", "--num_generations", "0"], "--num_generations 0 must be at least 1"),
        (["--lmbda", "0", "--num_generations", "2"], "needs --lmbda 1, and it is 0: only the"),
        (["--num_generations", "2"], "--num_generations 2 needs --lmbda 1, and it is 0.5"),
        (
            ["--lmbda", "1", "--num_generations", "3", "--gradient_accumulation_steps", "4"],
            "does not divide the 16 completions that a process learns in a step "
            "(--per_device_train_batch_size 4 x --gradient_accumulation_steps 4)",
        ),
        (["--rollout_max_tokens_in_flight", "9"], "has no effect without --rollout_url"),
    ],
    ids=[
        "no top-p", "top-p over 1", "top-k below 0", "min-p over 1", "no rollouts to filter",
        "no generation", "no rollouts", "a mixture", "not divided", "no servers",
    ],
)  # fmt: skip
def test_sampling_that_cannot_work_is_refused(model_folder, flags, message):
    with pytest.raises(ConfigurationError) as caught:
        read(words(model_folder, *flags))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "accumulation", "count"), [(8, 1, 8), (2, 4, 8), (1, 4, 2), (8, 1, 4)]
)
def test_the_generations_of_prompts_fill_a_step(model_folder, batch, accumulation, count):
    flags = ["--lmbda", "1", "--per_device_train_batch_size", batch, "--num_generations", count]
    flags += ["--gradient_accumulation_steps", accumulation]
    args = read(words(model_folder, *map(str, flags)))[-1]
    assert args.num_generations == count


def test_each_rollout_url_adds_a_server(model_folder, monkeypatch):
    pretend(monkeypatch, "vllm", installed=True)
    flags = ["--rollout_url", "http://gpu2:8001", "--rollout_url", "http://gpu3:8001/"]
    args = read(words(model_folder, *flags))[-1]
    assert rollout_addresses(args) == ("http://gpu2:8001", "http://gpu3:8001")


def test_ranks_wait_longer_for_one_another_than_for_a_rollout_server(model_folder, monkeypatch):
    pretend(monkeypatch, "vllm", installed=True)
    url = ["--rollout_url", "http://gpu2:8001", "--rollout_timeout", "1800"]
    *parts, teacher, args = read(words(model_folder, *url))
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ConfigurationError, match="--rollout_timeout 1800: processes wait 1800 s"):
        check_machine(Recipe(*parts), args, teacher)
    args.ddp_timeout = 1801
    check_machine(Recipe(*parts), args, teacher)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without a GPU")
def test_an_engine_cannot_sleep_on_a_cpu(model_folder, monkeypatch):
    pretend(monkeypatch, "vllm", installed=True)
    with pytest.raises(ConfigurationError, match="frees memory of a GPU; drop it on a CPU"):
        read(words(model_folder, "--rollout_engine", "vllm", "--vllm_enable_sleep_mode"))


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_a_sharded_student_may_have_an_engine_beside_it(model_folder, monkeypatch, sharding):
    pretend(monkeypatch, "vllm", installed=True)
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    adapters, args = AdapterArguments(), DistillFlags(rollout_engine="vllm")
    check_rollouts(args, adapters)


def test_vllm_rollouts_without_vllm_are_refused(model_folder, monkeypatch):
    pretend(monkeypatch, "vllm", installed=False)
    with pytest.raises(ConfigurationError, match="--rollout_engine vllm: not installed; pip"):
        read(words(model_folder, "--rollout_engine", "vllm"))
    with pytest.raises(ConfigurationError, match="no effect without --rollout_engine vllm"):
        read(words(model_folder, "--vllm_gpu_memory_utilization", "0.5"))


@pytest.mark.parametrize("flag", ["--teacher_url", "--dataset_name", "--output_dir"])
def test_a_missing_flag_is_named(model_folder, flag):
    line = words(model_folder)
    at = line.index(flag)
    with pytest.raises(ConfigurationError, match=f"{flag} is missing"):
        read(line[:at] + line[at + 2 :])


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_triton_without_a_gpu_is_refused_unless_interpreted(model_folder, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigurationError, match="--loss_kernel triton needs a GPU"):
        read(words(model_folder, "--loss_kernel", "triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert read(words(model_folder, "--loss_kernel", "triton"))[-1].loss_kernel == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_4_bit_weights_without_a_gpu_are_refused(model_folder):
    with pytest.raises(ConfigurationError, match="--load_in_4bit needs a CUDA GPU"):
        read(words(model_folder, "--load_in_4bit"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without a GPU")
def test_float16_without_a_gpu_is_refused(model_folder):
    line = [word for word in words(model_folder, "--fp16") if word != "--bf16"]
    with pytest.raises(ConfigurationError, match="--fp16 needs a GPU"):
        read(line)


@pytest.mark.parametrize(
    ("more", "environment", "message"),
    [
        (["--fsdp", "--fsdp_config", '{"version": 1}'], {}, "--fsdp: version 1 is not"),
        ([], {"ACCELERATE_USE_FSDP": "true"}, "--fsdp: version 1 is not supported"),
        ([], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
        (["--fsdp"], {}, None),
        ([], {}, None),
    ],
)
def test_sharding_needs_the_second_fsdp(model_folder, monkeypatch, more, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = words(model_folder, *more)
    *parts, _, flags = parse(given, *TYPES, prog="student-trainer distill", description="")
    args = training_arguments(flags)
    monkeypatch.setattr(type(args), "world_size", 2)
    if message is None:
        check_machine(Recipe(*parts), args)
        return
    with pytest.raises(ConfigurationError) as caught:
        check_machine(Recipe(*parts), args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("max_tokens_per_batch", 512, "--max_tokens_per_batch 512: DeepSpeed counts"),
        ("nonfinite", "skip", "--nonfinite skip: the loss scaler of --fp16 skips steps by itself"),
    ],
)
def test_what_deepspeed_does_by_itself_is_refused(model_folder, monkeypatch, flag, value, message):
    *parts, _, flags = parse(words(model_folder), *TYPES, prog="distill", description="")
    setattr(flags, flag, value)
    check_recipe(Recipe(*parts), flags)
    pretend(monkeypatch, "deepspeed", installed=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigurationError, match=message):
        check_recipe(Recipe(*parts), flags)


def test_ranks_wait_longer_for_one_another_than_for_a_teacher(model_folder, monkeypatch):
    *parts, teacher, args = read(words(model_folder, "--teacher_timeout", "1800"))
    recipe = Recipe(*parts)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ConfigurationError, match="--teacher_timeout 1800: processes wait 1800 s"):
        check_machine(recipe, args, teacher)
    args.ddp_timeout = 1801
    check_machine(recipe, args, teacher)


@pytest.mark.parametrize(
    ("zero", "refused"),
    [
        ({"stage": 3}, True),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, False),
        ({"stage": 2}, False),
    ],
)
def test_zero_3_must_save_a_model(model_folder, zero, refused):
    *parts, _, args = read(words(model_folder))
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    if not refused:
        check_machine(Recipe(*parts), args)
        return
    with pytest.raises(ConfigurationError, match="stage3_gather_16bit_weights_on_model_save"):
        check_machine(Recipe(*parts), args)


@pytest.mark.parametrize(
    ("metric", "greatest"),
    [("loss", False), ("divergence", False), ("eval_divergence", False), ("pass@1", True)],
)
def test_the_best_model_has_the_least_divergence_or_the_most_tasks(model_folder, metric, greatest):
    chosen = ["--metric_for_best_model", metric]
    assert read(words(model_folder, *chosen))[-1].greater_is_better is greatest
    assert read(words(model_folder, *chosen, "--greater_is_better", "true"))[-1].greater_is_better


@pytest.mark.parametrize("file", ["dtype: bfloat16\n", "torch_dtype: float16\n", ""])
def test_dtype_is_another_name_of_torch_dtype(model_folder, tmp_path, file):
    """In a file, on the command line, which wins, and in Python."""
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: {model_folder}\ndataset_name: a.jsonl\n{file}")
    given = ["--config", str(path), "--output_dir", "out"]
    types = ARGUMENTS["sft"]
    of_file = parse(given, *types, prog="", description="")[0].torch_dtype
    assert of_file == (file.split()[-1] if file else "auto")
    told = parse([*given, "--dtype", "float32"], *types, prog="", description="")
    assert told[0].torch_dtype == "float32"
    keywords = {"model_name_or_path": model_folder, "dtype": torch.bfloat16}
    assert parse_keywords("distill", keywords)[0].torch_dtype == "bfloat16"


def test_two_names_of_a_flag_are_one_too_many(model_folder, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dtype: bfloat16\ntorch_dtype: float16\n")
    message = f"--config {path}, line 1: dtype and torch_dtype are one key; give one of them"
    with pytest.raises(ConfigurationError, match=message):
        parse(["--config", str(path)], *ARGUMENTS["sft"], prog="", description="")
    with pytest.raises(ConfigurationError, match=r"keyword dtype: invalid choice: 'half'"):
        parse_keywords("distill", {"model_name_or_path": model_folder, "dtype": "half"})


@pytest.mark.parametrize("number", ["0x10", "1:30", "0o10"])
def test_numbers_of_a_file_that_are_not_decimal_are_refused(tmp_path, number):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\nmax_steps: {number}\n")
    with pytest.raises(ConfigurationError, match=f"line 2: key max_steps: invalid int .*{number}"):
        parse(["--config", str(path)], *ARGUMENTS["sft"], prog="", description="")


def test_keywords_may_be_what_libraries_call_the_values(model_folder, tmp_path):
    keywords = {
        "model_name_or_path": model_folder, "teacher_url": ["http://127.0.0.1:8000"],
        "dataset_name": "data.jsonl", "output_dir": tmp_path, "torch_dtype": torch.bfloat16,
        "save_strategy": SaveStrategy.NO,
    }  # fmt: skip
    model, *_, flags = parse_keywords("distill", keywords)
    assert (model.torch_dtype, flags.save_strategy) == ("bfloat16", "no")
    assert training_arguments(flags).save_strategy == SaveStrategy.NO


def test_traced_steps_are_one_or_a_range(model_folder):
    for given, expected in (("7", (7, 7)), ("10-12", (10, 12))):
        assert traced_steps(read(words(model_folder, "--trace_steps", given))[-1]) == expected
    assert traced_steps(read(words(model_folder))[-1]) is None


def test_staleness_without_rollouts_is_for_proposals(model_folder):
    more = ["--rollout_staleness", "1", "--lmbda", "0", "--request_student_top_m", "4"]
    assert read(words(model_folder, *more))[-1].rollout_staleness == 1


def test_teacher_url_may_be_repeated(model_folder):
    teacher = read(words(model_folder, "--teacher_url", "http://b:1", "http://c:2"))[-2]
    assert teacher.teacher_url == ["http://127.0.0.1:8000", "http://b:1", "http://c:2"]


def test_yaml_holds_the_same_names_and_the_command_line_wins(model_folder, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {model_folder}\nteacher_url: [http://a:1, http://b:2]\n"
        "dataset_name: data.jsonl\noutput_dir: out\nlmbda: 1.0\nbeta: 0.1\nbf16: false\n"
        "lr_scheduler_kwargs: {min_lr: 1.0e-6}\nlr_scheduler_type: cosine_with_min_lr\n"
    )
    parsed = read(["--config", str(path), "--beta", "0.9", "--teacher_url", "http://c:3"])
    assert parsed[-1].lmbda == 1.0
    assert parsed[-1].beta == 0.9
    assert parsed[-2].teacher_url == ["http://c:3"]
    assert parsed[-1].lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lamda: 1\n", "unknown key 'lamda'. Did you mean lmbda?"),
        ("lmbda: half\n", "key lmbda: invalid float value: 'half'"),
        ("max_steps: true\n", "key max_steps: invalid int value: True"),
        ("bf16: maybe\n", "key bf16: invalid value: 'maybe' (choose from true, false)"),
        ("tail: none\n", "key tail: invalid choice: 'none' (choose from 'bucket', 'renormalize')"),
        ("lmbda: [0, 1]\n", "key lmbda: expected one value, got [0, 1]"),
        ("- a\n", "must hold `name: value` lines"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        read(["--config", str(path)])
    assert message in str(caught.value)


def test_an_unquoted_no_in_yaml_is_the_choice_no(model_folder, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("save_strategy: no\neval_strategy: No\n")
    args = read(words(model_folder, "--config", str(path)))[-1]
    # The line gives --save_strategy, which wins over the file.
    assert (args.save_strategy, args.eval_strategy) == (SaveStrategy.STEPS, IntervalStrategy.NO)
    *_, flags = parse(["--config", str(path)], *TYPES, prog="", description="")
    assert (flags.save_strategy, flags.eval_strategy) == ("no", "no")


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("save_strategy", "no", "no"),
        ("eval_strategy", "NO", "no"),
        ("packing", "on", "on"),
        ("packing", "Off", "off"),
        ("packing", "false", "off"),
        ("packing", "true", "on"),
        ("report_to", "no", ["no"]),
        ("run_name", "off", "off"),
        ("bf16", "yes", True),
        ("bf16", "off", False),
    ],
)
def test_yes_and_no_of_yaml_are_what_the_flag_takes(tmp_path, flag, text, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"{flag}: {text}\n")
    *_, flags = parse(["--config", str(path)], *TYPES, prog="", description="")
    assert getattr(flags, flag) == value


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model", "model_name_or_path"),
        ("teacher", "teacher_url"),
        ("dataset", "dataset_name"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch-size", "per_device_train_batch_size"),
        ("max_seq_length", "max_length"),
        ("max_completion_length", "max_new_tokens"),
        ("evaluation_strategy", "eval_strategy"),
        ("lora_rank", "lora_r"),
        ("teach", "teacher_url"),
    ],
)
def test_names_of_other_programs_are_understood(typed, meant):
    with pytest.raises(ConfigurationError, match=f"'--{typed}'.*--{meant}"):
        parse([f"--{typed}", "x"], *TYPES, prog="student-trainer distill", description="")


def test_every_habit_leads_to_a_flag():
    known = {name for types in ARGUMENTS.values() for name in _flags(types)}
    assert {flag for flags in HABITS.values() for flag in flags} <= known


def test_missing_yaml_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        read([f"--config={tmp_path / 'none.yaml'}"])


def test_the_checkpoint_is_the_one_given_or_the_last(model_folder, tmp_path):
    def checkpoint(output, value):
        line = words(model_folder, "--output_dir", str(output), "--resume_from_checkpoint", value)
        return checkpoint_of(read(line)[-1])

    for step in (2, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    last, first = (str(tmp_path / "out" / f"checkpoint-{step}") for step in (10, 2))
    assert checkpoint(tmp_path / "out", "true") == last
    assert checkpoint(tmp_path / "out", "auto") == last
    assert checkpoint(tmp_path / "none", "auto") is None
    assert checkpoint(tmp_path / "out", first) == first
    assert checkpoint(tmp_path / "out", "false") is None
    with pytest.raises(ConfigurationError, match="holds no checkpoint to resume from"):
        checkpoint(tmp_path / "none", "true")
    with pytest.raises(ConfigurationError, match="no checkpoint there; give a checkpoint-N folder"):
        checkpoint(tmp_path / "out", str(tmp_path / "out"))


def test_what_is_no_folder_of_adapters_is_not_merged(model_folder, tmp_path):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    check_merge(MergeArguments(str(adapters), str(tmp_path / "new")))
    with pytest.raises(ConfigurationError, match="holds no LoRA adapters to merge"):
        check_merge(MergeArguments(str(model_folder), str(tmp_path / "new")))
    with pytest.raises(ConfigurationError, match="exists already; give a new folder"):
        check_merge(MergeArguments(str(adapters), str(model_folder)))
    with pytest.raises(ConfigurationError, match="--output_dir is missing"):
        check_merge(MergeArguments(str(adapters)))
