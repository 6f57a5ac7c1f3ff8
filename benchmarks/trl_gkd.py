"""Run TRL's side of `benchmarks.against_trl`: its trainers as published, in its own environment.

PYTHON benchmarks/trl_gkd.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

# TRL's defaults would train in bfloat16, and GKDTrainer would generate without a KV cache.
COMMON: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


class Coins(TrainerCallback):
    """A callback that makes each optimizer step on-policy or not, as on our side.

    GKDTrainer draws ``random() <= lmbda`` for each micro-batch; here lmbda is 0 or 1 for a step.
    """

    def __init__(self, coins: list[bool]) -> None:
        self.coins = coins
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.lmbda = float(self.coins[state.global_step])


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype="float32")
        for name in ("teacher", "student")
    )
    rows = [json.loads(line) for line in Path(settings["dataset"]).read_text().splitlines()]
    common: dict[str, Any] = {"model": student, "teacher_model": teacher}
    trainer: Any
    if settings["trainer"] == "distillation":  # writes all completions itself, so it has no coins
        tokenizer = AutoTokenizer.from_pretrained(settings["student"], padding_side="left")
        arguments = dict(settings["arguments"])
        arguments["max_completion_length"] = arguments.pop("max_new_tokens")
        del arguments["lmbda"]
        trainer = DistillationTrainer(
            **common,
            args=DistillationConfig(**arguments, **COMMON),
            train_dataset=Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows]),
            processing_class=tokenizer,
        )
    else:
        coins = Coins(settings["coins"])
        trainer = GKDTrainer(
            **common,
            args=GKDConfig(**settings["arguments"], **COMMON),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(settings["student"]),
            callbacks=[coins],
        )
        coins.trainer = trainer
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
