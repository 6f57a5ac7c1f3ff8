"""The numbers of the experiment, in one place, each with its reason.

They were found with one thread on one core, over several seeds. The two students share the number
of updates, the batch size, the schedule and the best learning rate of a sweep made for SFT.
"""

from dataclasses import dataclass

from examples.mini_humaneval.models import ModelShape


@dataclass(frozen=True)
class Stage:
    """How one model is trained: AdamW with warm-up, then decay, over `updates` batches."""

    updates: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.0
    lr_scheduler_type: str = "cosine"


@dataclass(frozen=True)
class Settings:
    """Everything that `prepare` and `quickstart` need to know."""

    # Words are whole tokens at this size, so a prompt and its completion take about 45 tokens.
    vocabulary_size: int = 768
    # The longest row has fewer than 70 tokens; the rest is room for a student that rambles.
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
    # Many prompts without labels; three epochs of them at 400 updates of 32.
    prompt_rows: int = 4_000
    # One standard error of pass@1 is about .03 at this size.
    held_out_rows: int = 256
    # Single steps show what each operation is called, apart from any partner.
    pretrain_single_share: float = 0.1
    # Conditions are the longer third; the rest are chains of two steps.
    branch_share: float = 0.35

    # Past the plateau where copying is learnt (300 updates), until held-out wording is fluent.
    teacher_pretrain: Stage = Stage(1200, 32, 4e-3, 120, weight_decay=0.1)
    # Ten epochs: enough for the wording; more learns the wrong labels by heart.
    teacher_sft: Stage = Stage(60, 32, 1.5e-3, 6)
    # A short warm-up: it writes bodies that parse, and so is worth sampling from, but it does not
    # know the users' wording. After twice as many updates the labels alone carry it much further.
    student_warmup: Stage = Stage(250, 32, 6e-3, 25, weight_decay=0.1)
    # The best of a sweep over 1e-3, 3e-3 and 6e-3 for SFT, used for both.
    student_sft: Stage = Stage(400, 32, 3e-3, 40)
    student_distill: Stage = Stage(400, 32, 3e-3, 40)

    # On-policy throughout: every update learns from what the student would write now.
    lmbda: float = 1.0
    # Balanced Jensen-Shannon; the endpoints 0 and 1 are forward and reverse KL.
    beta: float = 0.5
    # Teacher and student are compared at the temperature at which the student is sampled.
    temperature: float = 1.0
    rollout_temperature: float = 1.0
    # 99.7 % of the teacher's mass on early rollouts; the tail bucket holds the rest exactly.
    top_k_logprobs: int = 16
    # The longest reference body has 40 tokens with its end token.
    max_new_tokens: int = 40
    # All held-out prompts in two batches.
    evaluation_batch_size: int = 128


SETTINGS = Settings()
