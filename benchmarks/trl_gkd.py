"""TRL's side of `benchmarks.against_trl`: GKDTrainer as it comes, run by TRL's own environment.

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
    coins = Coins(settings["coins"])
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        # TRL's defaults would train in bfloat16 and generate without a KV cache.
        args=GKDConfig(
            **settings["arguments"], use_cpu=True, bf16=False, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["student"]),
        callbacks=[coins],
    )
    coins.trainer = trainer
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
