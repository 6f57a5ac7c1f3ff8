"""The numbers of the data and the models, each with its reason; study.yaml has the training's.

They were found with one thread on one core, over several seeds.
"""

from dataclasses import dataclass

from examples.mini_humaneval.models import ModelShape


@dataclass(frozen=True)
class Settings:
    """The settings of `prepare`."""

    # Words are whole tokens at this size, so a prompt and its completion take about 45 tokens.
    vocabulary_size: int = 768
    # The longest row has fewer than 70 tokens; the rest is room for a student that writes on.
    max_length: int = 128
    # Two layers suffice to find a word and copy it; width is what tells teacher from student
    # (0.5 and 0.13 million parameters). Initialised at the usual 0.02, models this narrow spend
    # their first hundreds of updates on a plateau; about 0.5 / sqrt(width) avoids it.
    teacher_shape: ModelShape = ModelShape(128, 384, 2, 4, initializer_range=0.05)
    student_shape: ModelShape = ModelShape(64, 160, 2, 4, initializer_range=0.06)

    # Three epochs of these are the pretraining; tokenizing them takes about two seconds.
    pretrain_rows: int = 12_000
    # The student has seen a part of what the teacher has seen.
    warmup_rows: int = 4_000
    # Few and noisy, like a real user's labels: 30 % have a plausible but wrong body.
    labelled_rows: int = 200
    noise_share: float = 0.3
    # Many prompts without labels; three epochs of them in the distillation.
    prompt_rows: int = 4_000
    # One standard error of pass@1 is about .03 at this size.
    held_out_rows: int = 256
    # Single steps show what each operation is called, apart from any partner.
    pretrain_single_share: float = 0.1
    # Conditions are the longer third; the rest are chains of two steps.
    branch_share: float = 0.35


SETTINGS = Settings()
