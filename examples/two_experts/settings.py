"""The numbers of the data and the models, each with its reason; study.yaml has the training's."""

from dataclasses import dataclass

from examples.mini_humaneval.models import ModelShape


@dataclass(frozen=True)
class Settings:
    """The settings of `prepare`."""

    # As in mini-HumanEval: words and numbers are whole tokens.
    vocabulary_size: int = 768
    max_length: int = 128
    # Both experts are adapters of one model of the first shape.
    teacher_shape: ModelShape = ModelShape(96, 256, 2, 4, initializer_range=0.05)
    student_shape: ModelShape = ModelShape(64, 160, 2, 4, initializer_range=0.06)

    # Of each kind, in other wording than the task's: the base knows both kinds a little.
    pretrain_rows: int = 4_000
    # Of each kind; the student has seen a part of what the base has seen.
    warmup_rows: int = 1_500
    # Of each kind, all right: what makes its expert, and what SFT of the student learns from.
    labelled_rows: int = 400
    # Of each kind, without answers: what the students learn from their teachers on.
    prompt_rows: int = 1_500
    # Of each kind. One standard error of a share is about .04 at this size.
    held_out_rows: int = 128
    # Of the programs; the others are chains of two steps, without conditions, so texts are short.
    pretrain_single_share: float = 0.1


SETTINGS = Settings()
