"""A run that begins on a plateau: the student is disjoint from its teacher."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from student_trainer.commands.main import main


def disjoint_student(world, folder):
    """Copy the student, sure of tokens that the teacher has no reason to take."""
    shutil.copytree(world.student, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 200.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def told(world, student, output, caplog, **options):
    options = {
        "model_name_or_path": student, "dataset_name": world.rows, "output_dir": output,
        "teacher_url": world.url, "top_k_logprobs": 128, "lmbda": 0, "max_new_tokens": 4,
        "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": "true", **options,
    }  # fmt: skip
    caplog.clear()
    assert main(["distill", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return [r.message for r in caplog.records if "shares few tokens" in r.message]


def test_it_is_told_once_with_the_remedy(world, tmp_path, caplog):
    student = disjoint_student(world, tmp_path / "student")
    [message] = told(world, student, tmp_path / "out", caplog)
    assert message.startswith("step 1: ")
    assert "--beta 0.5 has little gradient" in message
    assert told(world, student, tmp_path / "forward", caplog, beta=0) == []
    assert told(world, world.student, tmp_path / "near", caplog) == []
