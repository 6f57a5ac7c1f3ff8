"""The launcher's files: accelerate reads them, and the trainer takes what it then hears."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from student_trainer.config.arguments import Recipe
from student_trainer.config.machine import check_machine
from tests.support.flags import (
    command_lines,
    read_server,
    read_trainer,
    server_lines,
    trainer_lines,
    with_key,
)
from tests.support.server import free_port

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "accelerate"
PAGE = ROOT / "docs" / "how-to" / "several-nodes.md"
PORT = free_port()  # accelerate insists on it
LINE = (
    "distill --model_name_or_path org/student --teacher_url http://127.0.0.1:8000 --dataset_name "
    "data.jsonl --output_dir out --use_peft --gradient_accumulation_steps 8"
)


@pytest.fixture(params=["ddp", "fsdp2", "zero2", "zero3", "zero3_offload"])
def launched(request, monkeypatch):
    """(name, accelerate's view of the file, the environment in which processes are started)."""
    line = ["--config_file", str(FOLDER / f"{request.param}.yaml"),
            "--main_process_port", str(PORT), "-m", "student_trainer"]  # fmt: skip
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    return request.param, args, environment


def test_the_trainer_takes_what_the_launcher_says(launched, monkeypatch):
    name, args, environment = launched
    *parts, _, trainer = read_trainer(LINE.split())
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(type(trainer), "world_size", 16)
    if args.use_deepspeed:
        trainer.deepspeed_plugin = DeepSpeedPlugin()
        zero = trainer.deepspeed_plugin.deepspeed_config["zero_optimization"]
        assert zero["stage"] == (2 if name == "zero2" else 3)
        offloaded = "cpu" if name == "zero3_offload" else "none"
        assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == offloaded
    check_machine(Recipe(*parts), trainer)
    assert environment.get("FSDP_VERSION") == ("2" if name == "fsdp2" else None)
    assert [args.multi_gpu, args.use_fsdp, args.use_deepspeed] == [
        name == "ddp", name == "fsdp2", name.startswith("zero"),
    ]  # fmt: skip


def test_two_nodes_are_launched_without_ssh(launched):
    """Each by a command of its own, and both meet at node 0's address."""
    _, args, _ = launched
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 0)
    assert args.rdzv_backend == "static"
    assert args.rdzv_endpoint == f"10.0.0.1:{PORT}"


def test_flags_decide_what_the_files_leave_open(launched):
    """Precision, accumulation and clipping have one place: the trainer's flags."""
    _, _, environment = launched
    for key in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"):
        assert environment.get(key) is None
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def test_the_commands_of_the_page_are_accepted(tmp_path, monkeypatch):
    (words,) = trainer_lines(PAGE)
    *_, teacher, args = read_trainer(with_key(words, tmp_path))
    assert len(teacher.teacher_url) == 2
    assert args.ddp_timeout > teacher.teacher_timeout
    (words,) = server_lines(PAGE)
    assert read_server(with_key(words, tmp_path), monkeypatch).port == 8000
    (words,) = (words for words in command_lines(PAGE) if "student_trainer" in words)
    launch = launch_command_parser().parse_args(words[2:])
    assert (ROOT / launch.config_file).exists()
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 16, 0)
